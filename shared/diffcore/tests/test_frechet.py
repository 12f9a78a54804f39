import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from diffcore.metrics import (
    FrechetDistance,
    extrapolate,
    frechet_distance,
    frechet_distance_from_features,
    real_floor,
)
from diffcore.stats import Covariance, covariance
from diffcore.testing.distributed import run_forked
from diffcore.testing.metrics import check_metric


def features(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / d**0.5
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix


def textbook(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The formula with SciPy's general matrix square root."""
    first, second = (np.cov(x.double().numpy(), rowvar=False) for x in (real, fake))
    shift = (real.double().mean(0) - fake.double().mean(0)).square().sum()
    return float(shift) + float(np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real))


def gaussian(mean, cov) -> Covariance:
    return Covariance(torch.tensor(100.0).double(), torch.as_tensor(mean).double(), torch.as_tensor(cov).double())


def test_equals_the_textbook_formula():
    real, fake = features(300, 24, 1), features(200, 24, 2, shift=0.2, scale=1.3)
    expected = pytest.approx(textbook(real, fake), rel=1e-8)
    assert float(frechet_distance(covariance(real), covariance(fake))) == expected
    assert float(frechet_distance_from_features(real, fake)) == expected


def test_equals_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    first, second = covariance(features(300, 24, 1)), covariance(features(200, 24, 2, scale=0.7))
    theirs = _compute_fid(first.mean, first.cov, second.mean, second.cov)
    assert float(frechet_distance(first, second)) == pytest.approx(float(theirs), rel=1e-7)


def test_closed_forms():
    mean, first, second = torch.arange(4.0), torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 0.0, 0.0])
    expected = float(mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    actual = frechet_distance(gaussian(mean, first.diag()), gaussian(torch.zeros(4), second.diag()))
    assert float(actual) == pytest.approx(expected, rel=1e-12)
    assert float(frechet_distance(gaussian([1.0], [[4.0]]), gaussian([0.0], [[1.0]]))) == pytest.approx(2.0)
    # S2 = c² S1 for any S1: Tr S1 (c - 1)².
    cov = covariance(features(100, 6, 0)).cov
    scaled = frechet_distance(gaussian(torch.zeros(6), cov), gaussian(torch.zeros(6), 9 * cov))
    assert float(scaled) == pytest.approx(4 * float(cov.trace()), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(40, 50), (40, 300), (300, 40)])
def test_fewer_rows_than_columns(n, m):
    real, fake = features(n, 96, 1), features(m, 96, 2, shift=0.1)
    nuclear = float(frechet_distance_from_features(real, fake))
    assert nuclear == pytest.approx(float(frechet_distance(covariance(real), covariance(fake))), rel=1e-6)
    assert nuclear == pytest.approx(textbook(real, fake), rel=1e-4)


def test_equal_and_constant_sets_are_at_distance_zero():
    x = features(50, 8, 0)
    assert float(frechet_distance(covariance(x), covariance(x))) == pytest.approx(0, abs=1e-9)
    constant = torch.ones(5, 8)
    assert float(frechet_distance_from_features(constant, constant)) == 0
    assert float(frechet_distance(covariance(constant), covariance(constant + 1))) == pytest.approx(8)


def test_streams_in_any_split_and_precision():
    real, fake = features(90, 8, 1).float(), features(70, 8, 2, shift=0.3).float()
    metric = FrechetDistance(8).half()
    for part in real.split([1, 0, 40, 49]):
        metric.update(part, real=True)
    for part in fake.split(13):
        metric.update(part, real=False)
    expected = textbook(real, fake)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-8)
    metric.reset()
    metric.update(fake, real=True)
    metric.update(real, real=False)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-8)


def test_however_the_rows_arrive():
    real, fake = features(90, 8, 1).half().float(), features(70, 8, 2, shift=0.3).half().float()  # exact in float16
    batches = [(real[:40], True), (fake, False), (real[40:], True)]
    check_metric(lambda: FrechetDistance(8), batches, textbook(real, fake), atol=1e-8, half_atol=1e-8)


def test_two_processes_with_unequal_shares():
    real, fake = features(90, 8, 1), features(70, 8, 2, shift=0.3)

    def work(rank):
        metric = FrechetDistance(8)
        metric.update(real[:17] if rank else real[17:], real=True)
        metric.update(fake[:0] if rank else fake, real=False)
        return float(metric.compute())

    assert run_forked(work) == [pytest.approx(textbook(real, fake), rel=1e-8)] * 2


def test_bad_features_are_named():
    metric = FrechetDistance(4)
    metric.update(torch.ones(3, 4), real=False)
    bad = torch.ones(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="fake features has NaN or infinity in 1 of 3 rows: 4;"):
        metric.update(bad, real=False)
    with pytest.raises(ValueError, match="real has 0 rows"):
        metric.compute()
    with pytest.raises(ValueError, match="fake has 1 rows"):
        frechet_distance_from_features(torch.ones(3, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="eigenvalue -"):
        frechet_distance(gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), gaussian([0.0, 0.0], torch.eye(2)))
    with pytest.raises(ValueError, match="moments of fake"):
        frechet_distance(gaussian([0.0], [[1.0]]), gaussian([torch.nan], [[1.0]]))


def test_few_rows_warn():
    metric = FrechetDistance(8)
    metric.update(features(8, 8, 0), real=True)
    metric.update(features(30, 8, 1), real=False)
    with pytest.warns(UserWarning, match="8 rows of 8 features is mostly bias"):
        metric.compute()
    metric.update(features(1, 8, 2), real=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()


def test_the_floor_is_the_bias_at_equal_n():
    real = torch.randn(6000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    floor = real_floor(real, 500)
    # Two samples of one Gaussian: bias (d (d + 1) / 2 + 2 d) / n for equal n, half of it from each side.
    bias = (32 * 33 / 2 + 64) / 2 * (1 / 500 + 1 / 5500)
    assert floor.value == pytest.approx(bias, rel=0.1)
    assert floor.n == 500
    assert 0 < floor.standard_error < 0.1 * bias
    assert real_floor(real[:100], 500).n == 50
    assert real_floor(real, 500) == floor
    assert real_floor(real, 500, seed=1) != floor
    with pytest.raises(ValueError, match="needs at least 4"):
        real_floor(real[:3], 10)


def test_extrapolation_removes_most_of_the_bias():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (20_000, 800))
    fake[:, 0] += 0.5
    plain = float(frechet_distance_from_features(real, fake))
    estimate = extrapolate(real, fake)
    assert plain - 0.25 > 0.1
    assert abs(estimate.value - 0.25) < (plain - 0.25) / 2
    assert 0 < estimate.standard_error < 0.1
    with pytest.raises(ValueError, match="at least 10"):
        extrapolate(real, fake[:9])
