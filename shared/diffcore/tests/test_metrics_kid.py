import importlib
import math

import pytest
import torch

from diffcore.metrics import KernelDistance, kernel_distance
from diffcore.testing.metrics import check_metric


def points(n: int, seed: int, dim: int = 6) -> torch.Tensor:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.half().double()  # float16 holds them exactly


def brute(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The definition as loops."""

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    x, y = real.tolist(), fake.tolist()
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def brute_error(real: torch.Tensor, fake: torch.Tensor, blocks: int) -> float:
    """The distance is computed anew without each block."""
    variance = 0.0
    for side in (0, 1):
        values = []
        for gone in torch.arange(len((real, fake)[side])).tensor_split(blocks):
            kept = [real, fake]
            mask = torch.ones(len(kept[side]), dtype=torch.bool)
            mask[gone] = False
            kept[side] = kept[side][mask]
            values.append(brute(*kept))
        mean = sum(values) / blocks
        variance += sum((value - mean) ** 2 for value in values) * (blocks - 1) / blocks
    return math.sqrt(variance)


class Value(KernelDistance):
    """The standard error is made of neighbouring rows, so it alone may depend on their order."""

    def compute(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().compute().value


def test_however_the_rows_arrive():
    real, fake = points(30, 0), 1.25 * points(23, 1) + 0.5
    batches = [(real[:9], True), (fake, False), (real[9:], True)]
    check_metric(Value, batches, brute(real, fake), atol=1e-10, half_atol=1e-2)
    check_metric(Value, [(x.float(), side) for x, side in batches], brute(real, fake), atol=1e-5, half_atol=1e-2)


@pytest.mark.parametrize("blocks", [2, 5, 23])
def test_equals_brute_force_with_its_error(blocks, monkeypatch):
    monkeypatch.setattr(importlib.import_module("diffcore.metrics.kid"), "_ROWS", 4)
    real, fake = points(30, 0), 1.25 * points(23, 1) + 0.5
    found = kernel_distance(real, fake, blocks=blocks)
    assert found.value == pytest.approx(brute(real, fake), rel=1e-12)
    assert found.standard_error == pytest.approx(brute_error(real, fake, blocks), rel=1e-9)
    assert found.n == 23


def test_equals_torchmetrics_with_one_full_subset():
    from torchmetrics.image.kid import poly_mmd

    real, fake = points(200, 0, 32), points(200, 1, 32) + 0.2
    theirs = poly_mmd(real, fake)
    assert kernel_distance(real, fake).value == pytest.approx(float(theirs), rel=1e-9)
    assert kernel_distance(real.float(), fake.float()).value == pytest.approx(float(theirs), rel=1e-4)


def test_closed_form_for_constant_sets():
    # k(a, a) + k(b, b) - 2 k(a, b), whatever the number of rows.
    found = kernel_distance(torch.full((7, 4), 1.0), torch.full((5, 4), 2.0))
    assert found.value == pytest.approx(2**3 + 5**3 - 2 * 3**3)
    assert found.standard_error == pytest.approx(0, abs=1e-6)


def estimates(shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(points(60, 2 * seed, 8), points(60, 2 * seed + 1, 8) + shift) for seed in range(60)]
    found = [kernel_distance(real, fake, blocks=6) for real, fake in pairs]
    return torch.tensor([e.value for e in found]), torch.tensor([e.standard_error for e in found])


def test_is_unbiased_and_its_error_honest():
    values, _ = estimates(0.0)  # with the diagonals of the kernel matrices in it the mean were above 2 * 8 / 60
    assert abs(values.mean()) < 3 * values.std() / 60**0.5 < 0.1
    values, errors = estimates(0.4)
    assert 0.75 < errors.square().mean().sqrt() / values.std() < 1.35


def test_bad_features_are_named():
    x = points(5, 0)
    with pytest.raises(ValueError, match="fake has 1 rows"):
        kernel_distance(x, x[:1])
    with pytest.raises(ValueError, match="`blocks` is 1"):
        kernel_distance(x, x, blocks=1)
    assert math.isnan(kernel_distance(x, x[:2]).standard_error)
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="real features has NaN or infinity in 1 of 5 rows: 3;"):
        kernel_distance(x, points(5, 1))
