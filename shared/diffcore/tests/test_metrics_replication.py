import importlib

import pytest
import torch

from diffcore.metrics import ReplicationScore, nearest_training_images
from diffcore.testing.metrics import check_metric


def features(n: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return x.half().float()  # float16 holds them exactly


def brute(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """All cosines, as loops."""
    cosines = [[float(a.double() @ b.double() / (a.double().norm() * b.double().norm())) for b in real] for a in fake]
    return torch.tensor(cosines, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("chunks", [(2048, 8192), (7, 5)])
def test_nearest_equals_brute_force(k, chunks, monkeypatch):
    module = importlib.import_module("diffcore.metrics.replication")
    monkeypatch.setattr(module, "_IMAGES", chunks[0])
    monkeypatch.setattr(module, "_TRAIN", chunks[1])
    real, fake = features(40, 0).double(), features(23, 1).double()
    found, expected = nearest_training_images(real, fake, k=k), brute(real, fake).topk(k, dim=1)
    torch.testing.assert_close(found.cosine, expected.values, atol=1e-12, rtol=0)
    assert torch.equal(found.row, expected.indices)


def test_however_the_rows_arrive():
    real, fake = features(40, 0), features(23, 1)
    fake[4] = 2 * real[11]  # a copy; its length does not matter
    nearest = brute(real, fake).amax(1).sort().values
    half = (nearest[11], nearest[-1])  # of 23 values
    reference = (*half, float((nearest > 0.7).double().mean()), 23)
    assert 0.1 < reference[2] < 0.9
    batches = [(fake[:9], False), (real, True), (fake[9:], False)]

    def make():
        return ReplicationScore(threshold=0.7, quantiles=(0.5, 1.0))

    check_metric(make, batches, reference, atol=1e-6, half_atol=1e-6)


def test_closed_form():
    real = torch.eye(4)
    metric = ReplicationScore(quantiles=(0.0, 0.5, 1.0))
    metric.update(real, real=True)
    metric.update(torch.tensor([[3.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]), real=False)
    found = metric.compute()
    torch.testing.assert_close(found.quantiles, torch.tensor([0.5, 0.5**0.5, 1.0]).double(), atol=1e-7, rtol=0)
    assert (found.share, found.n) == (pytest.approx(2 / 3), 3)  # 0.5 itself is not above the threshold


def test_bad_features_are_named():
    real, fake = features(5, 0), features(4, 1)
    with pytest.raises(ValueError, match="`k` is 6; with 5 real rows"):
        nearest_training_images(real, fake, k=6)
    with pytest.raises(ValueError, match="`quantiles` are"):
        ReplicationScore(quantiles=(2.0,))
    real[3] = 0
    with pytest.raises(ValueError, match="real features are all 0 in row 3"):
        nearest_training_images(real, fake)
    fake[1, 0] = torch.nan
    with pytest.raises(ValueError, match="fake features has NaN or infinity in 1 of 4 rows: 1;"):
        nearest_training_images(features(5, 0), fake)
