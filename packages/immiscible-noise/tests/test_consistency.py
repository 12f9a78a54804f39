"""Consistency training: the grid, the pairs of levels, the boundary, losses and the sampler, by hand."""

import math

import pytest
import torch
from torch import nn

from diffcore.denoiser import EDMSchedule, FlowSchedule, GaussianMixtureDenoiser, NetworkDenoiser
from immiscible_noise.consistency import (
    IMPROVED,
    ORIGINAL,
    ConsistencySettings,
    consistency_distillation_loss,
    consistency_function,
    consistency_sample,
    consistency_training_loss,
    sampling_levels,
)

SPREAD = 0.7


class Scaled(nn.Module):
    """Returns its input times a number, so that all results are known."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return self.factor * x


def denoiser_of(factor: float) -> NetworkDenoiser:
    return NetworkDenoiser(Scaled(factor), EDMSchedule(), "edm", sigma_data=SPREAD)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return SPREAD * x0, noise


def f(factor: float, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The consistency function of `Scaled`, by hand."""
    scale = math.sqrt(sigma**2 + SPREAD**2)
    skip = SPREAD**2 / ((sigma - 0.002) ** 2 + SPREAD**2)
    return skip * x + SPREAD * (sigma - 0.002) / scale * factor * x / scale


def test_grids_grow_as_the_two_papers_say():
    assert [ORIGINAL.intervals(step, 400_000) for step in (0, 399_999)] == [1, 150]
    assert ORIGINAL.intervals(100_000, 400_000) == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1)
    doubling = [IMPROVED.intervals(step, 8) for step in range(8)]
    assert doubling == [10, 20, 40, 80, 160, 320, 640, 1280]
    grid = ORIGINAL.grid(17)
    assert len(grid) == 18
    assert grid[0] == pytest.approx(0.002)
    assert grid[-1] == pytest.approx(80)
    assert grid[5] == pytest.approx((0.002 ** (1 / 7) + 5 / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7)


@pytest.mark.parametrize("settings", [ORIGINAL, IMPROVED], ids=["original", "improved"])
def test_pairs_are_neighbours_drawn_with_the_stated_frequencies(settings: ConsistencySettings):
    step, steps = 500, 1000
    grid = settings.grid(settings.intervals(step, steps))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    lower, upper = settings.draw(u, step, steps)
    place = torch.searchsorted(grid, lower)
    assert torch.equal(grid[place], lower)
    assert torch.equal(grid[place + 1], upper)
    found = torch.bincount(place, minlength=len(grid) - 1) / len(u)
    if settings.levels == "uniform":
        expected = torch.full_like(found, 1 / len(found))
    else:
        cdf = torch.distributions.Normal(-1.1, 2.0).cdf(grid.log().double())
        expected = (cdf[1:] - cdf[:-1]) / (cdf[-1] - cdf[0])
    assert (found - expected).abs().max() < 2e-5


def test_the_extreme_uniform_numbers_fall_inside_the_grid():
    for settings in (ORIGINAL, IMPROVED):
        lower, upper = settings.draw(torch.tensor([0.0, 1 - 2**-24]), 999, 1000)
        grid = settings.grid(settings.intervals(999, 1000)).float()
        assert lower[0] == grid[0]
        assert upper[1] == grid[-1]


def test_the_function_is_the_identity_at_the_lowest_level_and_known_elsewhere():
    x, denoiser = batch()[0], denoiser_of(0.3)
    lowest = torch.full((len(x),), 0.002, dtype=torch.float64)
    assert (consistency_function(denoiser, x, lowest) - x).abs().max() < 1e-12
    found = consistency_function(denoiser, x, torch.full_like(lowest, 2.5))
    assert (found - f(0.3, x, 2.5)).abs().max() < 1e-12


def test_a_denoiser_of_another_kind_is_refused():
    other = NetworkDenoiser(Scaled(1.0), FlowSchedule(), "flow_prediction")
    with pytest.raises(ValueError, match="type edm, not flow_prediction"):
        consistency_function(other, batch()[0], torch.full((6,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("settings", [ORIGINAL, IMPROVED], ids=["original", "improved"])
def test_the_training_loss_uses_one_noise_at_both_levels_and_no_gradient_through_the_lower(
    settings: ConsistencySettings,
):
    x0, noise = batch()
    denoiser = denoiser_of(0.3)
    lower, upper = torch.full((6,), 1.5, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64)
    loss = consistency_training_loss(denoiser, x0, noise, lower, upper, settings=settings)
    value = float(loss.detach())

    c = 0.00054 * math.sqrt(16)
    goal, weight = f(0.3, x0 + 1.5 * noise, 1.5), 1.0 if settings.weighting == "one" else 1 / 0.5

    def by_hand(factor: float) -> torch.Tensor:
        apart = (f(factor, x0 + 2.0 * noise, 2.0) - goal).square().flatten(1).sum(1)
        return weight * ((apart + c**2).sqrt() - c).mean()

    assert value == pytest.approx(float(by_hand(0.3)), rel=1e-6)
    loss.backward()
    slope = (by_hand(0.3 + 1e-5) - by_hand(0.3 - 1e-5)) / 2e-5  # with the goal held
    assert float(denoiser.backbone.factor.grad) == pytest.approx(float(slope), rel=1e-5)


def test_distillation_follows_the_teachers_trajectory():
    """The teacher is exact for a Gaussian, whose trajectory from upper to lower scales by a known factor."""
    x0, noise = batch()
    spread, weight = torch.tensor([SPREAD], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    teacher = GaussianMixtureDenoiser(torch.zeros(1, 16, dtype=torch.float64), spread, weight, EDMSchedule())
    lower, upper = torch.full((6,), 1.9, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64)
    denoiser = denoiser_of(0.3)
    loss = consistency_distillation_loss(denoiser, teacher, x0, noise, lower, upper)
    x_upper = x0 + 2.0 * noise
    x_lower = x_upper * math.sqrt((1.9**2 + SPREAD**2) / (2.0**2 + SPREAD**2))
    c = 0.00054 * 4
    apart = (f(0.3, x_upper, 2.0) - f(0.3, x_lower, 1.9)).square().flatten(1).sum(1)
    assert float(loss) == pytest.approx(float(((apart + c**2).sqrt() - c).mean()), rel=1e-3)


def test_one_step_is_the_function_at_the_highest_level_and_two_add_fresh_noise():
    _, noise = batch()
    denoiser = denoiser_of(0.3)
    one = consistency_sample(denoiser, noise)
    assert (one - f(0.3, 80 * noise, 80.0)).abs().max() < 1e-9
    denoiser.backbone.seen.clear()
    two = consistency_sample(denoiser, noise, sigmas=sampling_levels(2), seeds=torch.arange(6))
    fresh = denoiser.backbone.seen[1] * math.sqrt(0.821**2 + SPREAD**2) - one
    added = math.sqrt(0.821**2 - 0.002**2)
    assert float(fresh.std()) == pytest.approx(added, rel=0.2)
    assert abs(float((fresh * noise).mean())) < 0.2 * added
    assert (two - f(0.3, one + fresh, 0.821)).abs().max() < 1e-9
    rough = consistency_sample(denoiser, noise, sigmas=(80.0, 0.5), seeds=torch.arange(6), sigma_min=0.5)
    assert (rough - consistency_sample(denoiser, noise, sigma_min=0.5)).abs().max() < 1e-9  # no noise is left to add
    again = consistency_sample(denoiser, noise[3:], sigmas=sampling_levels(2), seeds=torch.arange(3, 6))
    assert (again - two[3:]).abs().max() < 1e-12


def test_levels_of_a_sampling_descend_and_bad_ones_are_refused():
    assert sampling_levels(1) == (80.0,)
    levels = sampling_levels(4)
    assert list(levels) == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (80.0, 0.821)
    _, noise = batch()
    with pytest.raises(ValueError, match="give noise levels in descending order"):
        consistency_sample(denoiser_of(1.0), noise, sigmas=(1.0, 80.0), seeds=torch.arange(6))
    with pytest.raises(ValueError, match="give `seeds`"):
        consistency_sample(denoiser_of(1.0), noise, sigmas=(80.0, 0.821))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_intervals": 0}, "`first_intervals` is 0"),
        ({"last_intervals": 1, "first_intervals": 2}, "1 <= first <= last"),
        ({"sigma_min": 90.0}, "`sigma_min` is 90"),
    ],
)
def test_settings_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ConsistencySettings(**options)
