"""torchcfm's plan sampler by an exact assignment: images and labels stay, each noise comes once, inside its label."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from immiscible_noise import ExactAssignmentPlanSampler

SIZE = 12


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns noise, images, a number for each noise, and a label for each image."""
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(SIZE, 2, 3, generator=g), torch.randn(SIZE, 2, 3, generator=g)
    return x0, x1, torch.arange(SIZE) + 100, torch.tensor([2, 0, 1] * 4)


def least_cost(x0: Tensor, x1: Tensor) -> float:
    costs = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square()
    return float(costs[linear_sum_assignment(costs)].sum())


def cost(x0: Tensor, x1: Tensor) -> float:
    return float((x1.double() - x0.double()).square().sum())


@pytest.mark.parametrize("method", ["sample_plan", "sample_plan_with_scipy"])
def test_images_stay_and_the_cost_is_the_least(method: str):
    x0, x1, _, _ = batch()
    noise, images = getattr(ExactAssignmentPlanSampler(), method)(x0, x1)
    assert images is x1
    assert sorted(noise.flatten(1).tolist()) == sorted(x0.flatten(1).tolist())
    assert cost(noise, images) == pytest.approx(least_cost(x0, x1), rel=1e-6)
    assert cost(noise, images) < 0.9 * cost(x0, x1)


def test_labels_exchange_noise_among_themselves_alone():
    x0, x1, y0, y1 = batch()
    noise, images, numbers, labels = ExactAssignmentPlanSampler().sample_plan_with_labels(x0, x1, y0, y1)
    assert images is x1
    assert labels is y1
    assert torch.equal(noise, x0[numbers - 100])  # y0 goes with its noise
    assert torch.equal(y1[numbers - 100], y1)
    for label in range(3):
        rows = y1 == label
        assert cost(noise[rows], x1[rows]) == pytest.approx(least_cost(x0[rows], x1[rows]), rel=1e-6)


def test_labels_can_be_left_out_of_account():
    x0, x1, y0, y1 = batch()
    sampler = ExactAssignmentPlanSampler(respect_labels=False)
    noise, _, numbers, labels = sampler.sample_plan_with_labels(x0, x1, y0, y1)
    assert labels is y1
    assert torch.equal(noise, x0[numbers - 100])
    assert torch.equal(noise, sampler.sample_plan(x0, x1)[0])
    assert not torch.equal(y1[numbers - 100], y1)


def test_either_label_may_be_missing():
    x0, x1, y0, y1 = batch()
    sampler = ExactAssignmentPlanSampler()
    noise, _, none, labels = sampler.sample_plan_with_labels(x0, x1, y1=y1)
    assert none is None
    assert labels is y1
    free, _, numbers, none = sampler.sample_plan_with_labels(x0, x1, y0=y0)
    assert none is None
    assert torch.equal(free, x0[numbers - 100])
    assert not torch.equal(free, noise)


@pytest.mark.parametrize("method", ["sample_plan", "sample_plan_with_labels"])
def test_replacement_is_refused(method: str):
    x0, x1, _, _ = batch()
    with pytest.raises(ValueError, match="leave `replace` at False"):
        getattr(ExactAssignmentPlanSampler(), method)(x0, x1, replace=True)
