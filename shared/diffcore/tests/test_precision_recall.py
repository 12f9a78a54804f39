import importlib

import pytest
import torch

from diffcore.metrics import PrecisionRecall, precision_recall
from diffcore.metrics.precision_recall import squared_radii
from diffcore.testing.distributed import run_forked
from diffcore.testing.metrics import check_metric


def points(n: int, seed: int, dim: int = 4, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute(real: torch.Tensor, fake: torch.Tensor, k: int, k_coverage: int) -> list[float]:
    """The definitions as loops, as far as no distance equals a radius."""

    def distance(x, y):
        return float((x.double() - y.double()).square().sum().sqrt())

    def radius(rows, i, kth):
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[kth - 1]

    real_balls = [(x, radius(real, i, k), radius(real, i, k_coverage)) for i, x in enumerate(real)]
    fake_balls = [(y, radius(fake, j, k)) for j, y in enumerate(fake)]
    precision = [any(distance(x, y) <= near for x, near, _ in real_balls) for y in fake]
    recall = [any(distance(x, y) <= near for y, near in fake_balls) for x in real]
    density = [sum(distance(x, y) <= wide for x, _, wide in real_balls) / k_coverage for y in fake]
    coverage = [any(distance(x, y) <= wide for y in fake) for x, _, wide in real_balls]
    return [sum(values) / len(values) for values in (precision, recall, density, coverage)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(("k", "k_coverage"), [(3, 5), (5, 2)])
def test_equals_brute_force(dtype, offset, k, k_coverage):
    real, fake = (points(50, 0) + offset).to(dtype), (1.2 * points(40, 1) + offset + 0.4).to(dtype)
    actual = [float(score) for score in precision_recall(real, fake, k=k, k_coverage=k_coverage)]
    assert actual == pytest.approx(brute(real, fake, k, k_coverage), abs=1e-10)


def test_duplicates_and_constant_features():
    real = points(20, 0).repeat(8, 1)  # more duplicates than neighbours: every radius is 0
    scores = [float(score) for score in precision_recall(real, real[:20], k=3, k_coverage=5)]
    assert scores == pytest.approx(brute(real, real[:20], 3, 5))
    assert scores[0] == scores[3] == 1
    constant = torch.ones(9, 3)
    assert [float(score) for score in precision_recall(constant, constant)] == pytest.approx([1, 1, 1, 1], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [points, lambda n, seed: points(n, seed).round(), lambda n, seed: points(n // 9, seed).repeat(9, 1)],
    ids=["distinct", "on a grid", "repeated"],
)
def test_a_set_compared_with_itself_has_density_one(make, dtype):
    same = make(180, 0).to(dtype)
    order = torch.randperm(len(same), generator=torch.Generator().manual_seed(1))
    assert [float(score) for score in precision_recall(same, same[order])] == pytest.approx([1, 1, 1, 1], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rows_of_half_precision_score_as_in_single(dtype, scale):
    real, fake = (
        (scale * points(80, 0, dim=512) + scale).to(dtype),
        (1.1 * scale * points(70, 1, dim=512) + scale).to(dtype),
    )
    assert precision_recall(real, fake) == precision_recall(real.float(), fake.float())
    assert precision_recall(real, fake.float()) == precision_recall(real.float(), fake.float())


def test_radii_are_exact_where_the_matrix_product_is_not():
    x = (points(300, 0, dim=64) * 1e-3 + points(1, 1, dim=64) * 100 * (torch.arange(300) % 2)[:, None]).float()
    (radii,) = squared_radii(x, (3,))
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, 3]
    torch.testing.assert_close(radii.sqrt(), expected, rtol=1e-6, atol=0)


def test_radii_are_those_of_float64():
    x = points(200, 0, dtype=torch.float32)
    radii = squared_radii(x, (3, 5))
    distances = (x.double()[:, None] - x.double()).square().sum(-1).sort(1).values
    torch.testing.assert_close(radii[0], distances[:, 3], rtol=1e-12, atol=0)
    torch.testing.assert_close(radii[1], distances[:, 5], rtol=1e-12, atol=0)


def test_clusters_closer_than_float32_products_can_tell():
    side = 100 * (torch.arange(40) % 2 * 2 - 1)[:, None]
    real = (1e-2 * points(40, 0) + side).float()
    fake = (1.5e-2 * points(40, 1) + side).float()
    scores = [float(score) for score in precision_recall(real, fake)]
    assert scores == pytest.approx(brute(real, fake, 3, 5), abs=1e-10)
    assert 0 < scores[0] < 1


def test_chunks_leave_no_seam(monkeypatch):
    real, fake = points(50, 0), points(40, 1)
    whole = precision_recall(real, fake)
    module = importlib.import_module("diffcore.metrics.precision_recall")
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_PAIRS", 11)
    assert precision_recall(real, fake) == whole


def test_shrunk_and_equal_distributions():
    real, fake = points(1500, 0, dim=16, dtype=torch.float32), points(1500, 1, dim=16, dtype=torch.float32)
    same, n = precision_recall(real, fake), 1500
    missing = torch.tensor([(n - i) / (2 * n - i) for i in range(5)]).prod()
    assert float(same.coverage) == pytest.approx(1 - float(missing), abs=0.02)
    assert float(same.density) == pytest.approx(1, abs=0.1)
    shrunk = precision_recall(real, 0.3 * fake)
    assert float(shrunk.precision) == 1
    assert float(shrunk.recall) < 0.01
    assert float(shrunk.density) > 2


def test_streams_in_batches_and_resets():
    real, fake = points(50, 0), points(40, 1)
    metric = PrecisionRecall()
    for part in real.split([1, 0, 20, 29]):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    assert metric.compute() == precision_recall(real, fake)
    metric.reset()
    with pytest.raises(ValueError, match="real has 0 rows"):
        metric.compute()


def test_however_the_rows_arrive():
    real, fake = points(50, 0).half().float(), points(40, 1).half().float()  # float16 holds them exactly
    check_metric(PrecisionRecall, [(real, True), (fake, False)], brute(real, fake, 3, 5), atol=1e-10, half_atol=1e-10)


def test_a_rank_without_rows_and_ranks_of_different_precision():
    real, fake = points(50, 0).float(), points(40, 1).float()

    def work(rank):
        values = []
        for precise in (False, True):
            metric = PrecisionRecall()
            if rank == 0:
                metric.update(real, real=True)  # the other rank has not seen a single batch of them
                metric.update(fake[:7], real=False)
            else:
                metric.update(fake[7:].to(torch.float64 if precise else torch.float32), real=False)
            values.append([float(score) for score in metric.compute()])
        return values

    expected = pytest.approx([float(score) for score in precision_recall(real, fake)])
    assert run_forked(work) == [[expected, expected]] * 2


def test_no_rank_has_rows():
    def work(rank):
        with pytest.raises(ValueError, match="real has 0 rows"):
            PrecisionRecall().compute()

    run_forked(work)


def test_bad_features_are_named():
    with pytest.raises(ValueError, match="fake has 5 rows; 5 neighbours need more"):
        precision_recall(points(9, 0), points(5, 1))
    bad = points(9, 0)
    bad[7] = torch.inf
    with pytest.raises(ValueError, match="real features has NaN or infinity in 1 of 9 rows: 7;"):
        precision_recall(bad, points(9, 1))
    metric = PrecisionRecall()
    metric.update(points(9, 0), real=True)
    with pytest.raises(ValueError, match="rows: 16;"):
        metric.update(bad, real=True)
    with pytest.raises(ValueError, match="at least 1"):
        PrecisionRecall(k=0)
