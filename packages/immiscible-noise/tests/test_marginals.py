"""The noise stays Gaussian where it is said to, and the same tests see where it does not."""

from functools import cache

import pytest
import torch
from scipy import stats

from immiscible_noise import assign_noise, select_noise

BATCHES, SIZE, DIM = 2000, 8, 3
REJECT = 1e-4


@cache
def make_batches():
    """Returns shuffled images of two far classes, their classes, the batch of every row, and Gaussian noise."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(2, (BATCHES * SIZE,), generator=generator)
    images = torch.randn(BATCHES * SIZE, DIM, generator=generator) + 3.0 * (2 * classes - 1)[:, None]
    noise = torch.randn(BATCHES * SIZE, DIM, generator=generator)
    return images, classes, torch.arange(BATCHES).repeat_interleave(SIZE), noise


@cache
def assign_batches(within_classes: bool, cost: str = "sq"):
    """Assigns each batch of eight; a block of equal labels is a problem of its own, so a call holds many batches."""
    images, classes, batch, noise = make_batches()
    labels = torch.stack([batch, classes], 1) if within_classes else batch
    parts = [
        assign_noise(x, n, labels=label, cost=cost, solver="scipy")
        for x, n, label in zip(images.split(800), noise.split(800), labels.split(800), strict=True)
    ]
    return torch.cat(parts)


def looks_gaussian(samples: torch.Tensor) -> bool:
    """Tells whether every coordinate passes a Kolmogorov-Smirnov test and the covariance is near the identity."""
    p_values = [stats.kstest(column.double().numpy(), "norm").pvalue for column in samples.T]
    covariance = samples.T.double() @ samples.double() / len(samples)
    sigma = (torch.ones(DIM, DIM) + torch.eye(DIM)).sqrt() / len(samples) ** 0.5
    return min(p_values) > REJECT and bool(((covariance - torch.eye(DIM)).abs() < 4 * sigma).all())


@pytest.mark.parametrize("cost", ["sq", "l2"])
def test_noise_of_every_fixed_row_is_gaussian(cost):
    assigned = assign_batches(False, cost).reshape(BATCHES, SIZE, DIM)
    assert all(looks_gaussian(assigned[:, row]) for row in range(SIZE))
    images = make_batches()[0].reshape(BATCHES, SIZE, DIM)
    assert (assigned * images).sum(2).mean() > 2  # while it does depend on the image


def test_noise_of_every_class_is_gaussian_within_blocks():
    classes, assigned = make_batches()[1], assign_batches(True)
    assert all(looks_gaussian(assigned[classes == label]) for label in (0, 1))
    assert not torch.equal(assigned, make_batches()[3])


def test_noise_of_a_class_is_not_gaussian_when_labels_are_ignored():
    classes, assigned = make_batches()[1], assign_batches(False)
    assert not any(looks_gaussian(assigned[classes == label]) for label in (0, 1))


def norm_p_value(noise: torch.Tensor) -> float:
    return stats.kstest(noise.double().square().sum(1).numpy(), stats.chi2(DIM).cdf).pvalue


def test_norms_are_chi_squared_after_assignment_but_not_after_selection():
    images = make_batches()[0]
    selected = select_noise(images, 4, generator=torch.Generator().manual_seed(1))
    assert norm_p_value(assign_batches(False)) > REJECT
    assert norm_p_value(selected) < REJECT
