import pickle

import pytest
import torch

from diffcore.stats import RunningCovariance, RunningMoments, covariance, require_finite
from diffcore.testing.distributed import run_forked

METRICS = [RunningMoments, RunningCovariance]


def rows(count: int = 60, dim: int = 5) -> torch.Tensor:
    """Data far from zero with a small spread, which raw float32 sums get wrong."""
    return 30 + 0.1 * torch.randn(count, dim, generator=torch.Generator().manual_seed(0))


def spread(result) -> torch.Tensor:
    return result[2]


def expected(metric, x: torch.Tensor) -> torch.Tensor:
    return x.double().var(0) if metric is RunningMoments else x.double().T.cov()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 0, 40), (1,) * 60], ids=str)
def test_batches_add_up(metric, sizes):
    x, running = rows(), metric(5)
    for part in x.split(sizes):
        running.update(part)
    result = running.compute()
    assert int(result.num_rows) == 60
    torch.testing.assert_close(result.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(spread(result), expected(metric, x), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [17, 60], ids=["unequal", "one empty"])
def test_processes_add_up(metric, share):
    x = rows()

    def work(rank):
        running = metric(5)
        running.update(x[:share] if rank == 0 else x[share:])
        first, again = running.compute(), running.compute()
        running.update(x[:1])  # the states are local again
        return [value.numpy() for value in first], [value.numpy() for value in again], float(running.num_rows)

    answers = run_forked(work)
    for (first, again, local), size in zip(answers, (share, 60 - share), strict=True):
        assert first[0] == again[0] == 60
        torch.testing.assert_close(torch.from_numpy(first[1]), x.double().mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.from_numpy(first[2]), expected(metric, x), rtol=1e-9, atol=1e-15)
        assert local == size + 1


@pytest.mark.parametrize("metric", METRICS)
def test_states_stay_float64(metric):
    x, running = rows(), metric(5)
    torch.nn.ModuleList([running]).half()
    running.half().update(x)
    restored = pickle.loads(pickle.dumps(running))
    for each in (running, restored):
        assert spread(each.compute()).dtype == torch.float64
        torch.testing.assert_close(spread(each.compute()), expected(metric, x), rtol=1e-9, atol=1e-15)
    running.reset()
    assert int(running.num_rows) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_few_rows_have_no_variance(metric):
    running = metric(3)
    running.update(torch.ones(1, 3))
    assert torch.isnan(spread(running.compute())).all()
    running.update(torch.ones(1, 3))
    assert not spread(running.compute()).any()


def test_one_column_and_wrong_columns():
    running = RunningMoments(1)
    running.update(torch.tensor([[1.0], [3.0]]))
    assert float(running.compute().var) == 2
    with pytest.raises(ValueError, match="2 columns; 1 were announced"):
        running.update(torch.ones(2, 2))


def test_covariance_at_once_equals_torch():
    x = rows()
    torch.testing.assert_close(covariance(x).cov, x.double().T.cov(), rtol=1e-12, atol=1e-16)


def test_non_finite_rows_are_named():
    x = torch.ones(5, 2, 2)
    x[1, 0, 0], x[4, 1, 1] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match="features has NaN or infinity in 2 of 5 rows: 101, 104; "):
        require_finite("features", x, 100)
    require_finite("features", torch.ones(0, 3))
