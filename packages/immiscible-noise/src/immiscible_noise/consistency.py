"""Consistency training: a network that maps every point of a trajectory to its end, in one step.

With x_sigma = x_0 + sigma n and the standard deviation sd of the data, the consistency function of a network F is

    f(x, sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4),    c_in = 1 / sqrt(sigma^2 + sd^2),
    c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2),              c_out = sd (sigma - sigma_min) c_in,

so that f(x, sigma_min) = x. Training draws two neighbouring levels sigma_i < sigma_j of a grid that grows, takes the
same unit noise n at both, and makes f(x_0 + sigma_j n, sigma_j) equal to f(x_0 + sigma_i n, sigma_i), through which no
gradient flows, in the pseudo-Huber distance. Noise is assigned once, before, and serves both levels.

References:
    Song et al. 2023, "Consistency Models", algorithms 1 to 3 (ORIGINAL: uniform levels, weight 1).
    Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models", table 1 (IMPROVED: log-normal levels,
    weight 1 / (sigma_j - sigma_i), no averaged target, pseudo-Huber distance; the last two serve ORIGINAL here too).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from diffcore.denoiser import Condition, Denoiser, NetworkDenoiser
from diffcore.noise import row_noise

_FRESH_STREAM = 106


@dataclass(frozen=True)
class ConsistencySettings:
    """The grid of noise levels, how a pair of neighbours is drawn from it, and what the pair weighs.

    Attributes:
        levels: uniform draws every pair alike; lognormal draws them as ln sigma ~ N(-1.1, 2^2).
        weighting: one, or inverse: 1 / (sigma_j - sigma_i).
        growth: square-root (Song et al. 2023, appendix C) or doubling (Song and Dhariwal 2023, equation 11).
        first_intervals: Number of intervals of the grid when training begins.
        last_intervals: Number of intervals of the grid when training ends.
        sigma_min: Level at which the function is the identity.
        sigma_max: Level that sampling starts from.
        rho: Exponent of the grid (Karras et al. 2022, equation 5).

    Raises:
        ValueError: The numbers of intervals or the levels do not ascend.

    Example:
        >>> [ORIGINAL.intervals(step, 1000) for step in (0, 500, 999)], IMPROVED.intervals(999, 1000)
        ([1, 106, 150], 1280)
    """

    levels: Literal["uniform", "lognormal"] = "uniform"
    weighting: Literal["one", "inverse"] = "one"
    growth: Literal["square-root", "doubling"] = "square-root"
    first_intervals: int = 1
    last_intervals: int = 150
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 1 <= self.first_intervals <= self.last_intervals:
            raise ValueError(
                f"`first_intervals` is {self.first_intervals}, `last_intervals` is {self.last_intervals}; "
                "1 <= first <= last must hold"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"`sigma_min` is {self.sigma_min}, `sigma_max` is {self.sigma_max}; 0 < min < max must hold"
            )

    def intervals(self, step: int, steps: int) -> int:
        """Returns the number of intervals of the grid at a training step.

        Args:
            step: Number of the training step, from 0.
            steps: Number of all training steps.
        """
        if self.growth == "square-root":
            low, high = (self.first_intervals + 1) ** 2, (self.last_intervals + 1) ** 2
            return math.ceil(math.sqrt(step / steps * (high - low) + low) - 1)
        doublings = math.floor(math.log2(self.last_intervals / self.first_intervals)) + 1
        return min(self.first_intervals * 2 ** (step * doublings // steps), self.last_intervals)

    def grid(self, intervals: int) -> Float64[Tensor, " levels"]:
        """Returns the levels from `sigma_min` to `sigma_max`, ascending, one more than there are intervals."""
        ends = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.linspace(*ends, intervals + 1, dtype=torch.float64) ** self.rho

    def draw(self, u: Float[Tensor, " b"], step: int, steps: int) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Returns the lower and the upper level of a pair of neighbours for each uniform number.

        Args:
            u: Uniform numbers in (0, 1).
            step: Number of the training step, from 0.
            steps: Number of all training steps.
        """
        grid = self.grid(self.intervals(step, steps)).to(u.device)
        if self.levels == "uniform":
            place = (u.double() * (len(grid) - 1)).long()
        else:  # improved techniques, equation 10
            below = torch.erf((grid.log() + 1.1) / (math.sqrt(2) * 2.0))
            ends = (below - below[0]) / (below[-1] - below[0])
            place = torch.searchsorted(ends, u.double(), right=True) - 1
        return grid[place].to(u.dtype), grid[place + 1].to(u.dtype)


ORIGINAL = ConsistencySettings()
"""Consistency training as first published, whose models Immiscible Diffusion accelerated."""

IMPROVED = ConsistencySettings("lognormal", "inverse", "doubling", first_intervals=10, last_intervals=1280)
"""Consistency training as improved by Song and Dhariwal 2023."""


def consistency_function(
    denoiser: NetworkDenoiser,
    x: Float[Tensor, "b *data"],
    sigma: Float[Tensor, " b"],
    cond: Condition | None = None,
    *,
    sigma_min: float = 0.002,
) -> Float[Tensor, "b *data"]:
    """Returns f(x, sigma), the end of the trajectory through a noisy sample.

    Args:
        denoiser: Network of prediction type "edm", whose input scaling is kept.
        x: Noisy samples x_0 + sigma n.
        sigma: Noise level of each sample.
        cond: Keyword tensors of the network.
        sigma_min: Level at which f is the identity.

    Raises:
        ValueError: The denoiser predicts something else.
    """
    if denoiser.prediction_type != "edm":
        raise ValueError(f"a consistency function needs a denoiser of type edm, not {denoiser.prediction_type}")
    output = denoiser(x, sigma, cond).output
    sigma, sd = sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype), denoiser.sigma_data
    c_skip = sd**2 / ((sigma - sigma_min).square() + sd**2)
    c_out = sd * (sigma - sigma_min) / (sigma.square() + sd**2).sqrt()
    return c_skip * x + c_out * output


def consistency_training_loss(
    denoiser: NetworkDenoiser,
    x0: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    lower: Float[Tensor, " b"],
    upper: Float[Tensor, " b"],
    cond: Condition | None = None,
    *,
    settings: ConsistencySettings = ORIGINAL,
) -> Float[Tensor, ""]:
    """Returns the loss of consistency training on one batch; the same noise serves both levels.

    Args:
        denoiser: Network of prediction type "edm" that is trained.
        x0: Clean samples in model space.
        noise: Unit noise of each sample, assigned if it is to be.
        lower: Lower noise level of each pair.
        upper: Upper noise level of each pair.
        cond: Keyword tensors of the network.
        settings: Weighting and lowest level.

    Example:
        >>> from diffcore.denoiser import EDMSchedule
        >>> net = torch.nn.Conv2d(1, 1, 3, padding=1)
        >>> denoiser = NetworkDenoiser(net, EDMSchedule(), "edm", call=lambda network, x, t, cond: network(x))
        >>> x0, noise = torch.zeros(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
        >>> lower, upper = ORIGINAL.draw(torch.rand(4), step=0, steps=10)
        >>> consistency_training_loss(denoiser, x0, noise, lower, upper).shape
        torch.Size([])
    """
    with torch.no_grad():
        goal = consistency_function(denoiser, _at(x0, noise, lower), lower, cond, sigma_min=settings.sigma_min)
    return _distance(denoiser, _at(x0, noise, upper), goal, lower, upper, cond, settings)


def consistency_distillation_loss(
    denoiser: NetworkDenoiser,
    teacher: Denoiser,
    x0: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    lower: Float[Tensor, " b"],
    upper: Float[Tensor, " b"],
    cond: Condition | None = None,
    *,
    settings: ConsistencySettings = ORIGINAL,
) -> Float[Tensor, ""]:
    """Returns the loss of consistency distillation, whose lower point is a Heun step of the teacher's trajectory.

    A teacher that was trained on assigned noise gives exact trajectories all the same.

    Args:
        denoiser: Network of prediction type "edm" that is trained.
        teacher: Trained denoiser on a schedule with alpha = 1, whose t is sigma.
        x0: Clean samples in model space.
        noise: Unit noise of each sample.
        lower: Lower noise level of each pair.
        upper: Upper noise level of each pair.
        cond: Keyword tensors of both networks.
        settings: Weighting and lowest level.

    References:
        Song et al. 2023, algorithm 2.
    """
    x_upper = _at(x0, noise, upper)
    with torch.no_grad():
        span = (lower - upper).view(-1, *[1] * (x0.ndim - 1))
        slope = teacher(x_upper, upper, cond).noise
        slope_below = teacher(x_upper + span * slope, lower, cond).noise
        x_lower = x_upper + span * (slope + slope_below) / 2
        goal = consistency_function(denoiser, x_lower, lower, cond, sigma_min=settings.sigma_min)
    return _distance(denoiser, x_upper, goal, lower, upper, cond, settings)


@torch.no_grad()
def consistency_sample(
    denoiser: NetworkDenoiser,
    noise: Float[Tensor, "b *data"],
    cond: Condition | None = None,
    *,
    sigmas: Sequence[float] = (80.0,),
    seeds: Int[Tensor, " b"] | None = None,
    sigma_min: float = 0.002,
) -> Float[Tensor, "b *data"]:
    """Turns noise into clean samples, in as many steps as there are levels.

    Every step after the first adds fresh noise: it is a stochastic sampler, and wrong for a model that was trained on
    assigned noise.

    Args:
        denoiser: Trained network of prediction type "edm".
        noise: Unit noise that sampling starts from.
        cond: Keyword tensors of the network.
        sigmas: Noise levels, descending; the first is the one that training ended at. Two steps usually take
            (80, 0.821).
        seeds: One seed per row for the fresh noise; needed for more than one level.
        sigma_min: Level at which f is the identity.

    Raises:
        ValueError: There are no levels, they do not descend, or several come without seeds.

    References:
        Song et al. 2023, algorithm 1.
    """
    if not sigmas or list(sigmas) != sorted(set(sigmas), reverse=True):
        raise ValueError(f"`sigmas` is {tuple(sigmas)}; give noise levels in descending order")
    if len(sigmas) > 1 and seeds is None:
        raise ValueError("every step after the first adds fresh noise: give `seeds`, one for each row")
    x0 = torch.zeros_like(noise)
    for step, sigma in enumerate(sigmas):
        if step > 0:
            assert seeds is not None
            fresh = row_noise(step, seeds, noise.shape[1:], stream=_FRESH_STREAM, device=noise.device)
            noise, scale = fresh.to(noise), math.sqrt(max(sigma**2 - sigma_min**2, 0.0))
        else:
            scale = sigma
        level = torch.full((len(noise),), sigma, dtype=noise.dtype, device=noise.device)
        x0 = consistency_function(denoiser, x0 + scale * noise, level, cond, sigma_min=sigma_min)
    return x0


def sampling_levels(steps: int, settings: ConsistencySettings = ORIGINAL) -> tuple[float, ...]:
    """Returns the levels of a sampling in a number of steps, evenly spaced in sigma^(1 / rho) from `sigma_max` to .821.

    Args:
        steps: Number of steps, at least 1; 2 are the (80, 0.821) of Song and Dhariwal 2023.
        settings: Highest level and exponent.

    Example:
        >>> sampling_levels(1), sampling_levels(2)
        ((80.0,), (80.0, 0.821))
    """
    if steps == 1:
        return (settings.sigma_max,)
    ends = settings.sigma_max ** (1 / settings.rho), 0.821 ** (1 / settings.rho)
    inner = torch.linspace(*ends, steps, dtype=torch.float64)[1:-1] ** settings.rho
    return (settings.sigma_max, *inner.tolist(), 0.821)


def _at(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return x0 + sigma.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype) * noise


def _distance(
    denoiser: NetworkDenoiser,
    x_upper: Tensor,
    goal: Tensor,
    lower: Tensor,
    upper: Tensor,
    cond: Condition | None,
    settings: ConsistencySettings,
) -> Tensor:
    """Returns the weighted mean pseudo-Huber distance sqrt(|f - goal|^2 + c^2) - c, c = .00054 sqrt(numbers)."""
    found = consistency_function(denoiser, x_upper, upper, cond, sigma_min=settings.sigma_min)
    c = 0.00054 * math.sqrt(x_upper[0].numel())
    distance = ((found - goal).float().square().flatten(1).sum(1) + c**2).sqrt() - c
    return (distance if settings.weighting == "one" else distance / (upper - lower)).mean()
