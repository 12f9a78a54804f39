"""Distributions of the noise level p(t) at which chains run and the student score learns.

Each is given by noise-to-signal ratios sigma / alpha and turned into the units of the teacher's schedule. The range
matters more than the shape: with low noise alone, losses that seek modes lose modes for ever.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from diffcore.train.timesteps import TimeSampler

LevelName = Literal["lognormal", "karras", "sid", "uniform", "loguniform"]
_EDM = (0.002, 80.0)  # range of EDM's training


def noise_levels(
    schedule: NoiseSchedule,
    name: LevelName = "lognormal",
    *,
    mean: float = -1.2,
    std: float = 1.2,
    low: float | None = None,
    high: float | None = None,
) -> TimeSampler:
    """Returns a distribution of noise levels as a function of uniform numbers in (0, 1).

    Args:
        schedule: Schedule of the teacher.
        name: "lognormal": ln sigma ~ N(mean, std^2) (EDM, Diff-Instruct). "karras": uniform over the middle 96 % of
            1000 levels of EDM's grid (DMD2). "sid": the lower 80 % of that grid (SiD). "uniform": uniform over the
            middle 96 % of the schedule's own times (DMD2 on Stable Diffusion). "loguniform": ln sigma uniform.
        mean: Mean of ln sigma.
        std: Standard deviation of ln sigma.
        low: Smallest sigma / alpha, to which smaller draws are raised; by default the teacher's.
        high: Largest sigma / alpha; by default the teacher's.

    Raises:
        ValueError: The name is unknown, or the range is empty.

    Example:
        >>> draw = noise_levels(EDMSchedule(), "loguniform", low=0.1, high=10.0)
        >>> [round(float(t), 2) for t in draw(torch.tensor([0.0, 0.5, 1.0]))]
        [0.1, 1.0, 10.0]
    """
    if name not in get_args(LevelName):
        raise ValueError(f"`name` is {name!r}; it must be one of {', '.join(get_args(LevelName))}")
    least, most = trained_range(schedule)
    low, high = least if low is None else max(low, least), most if high is None else min(high, most)
    if not 0 < low < high:
        raise ValueError(
            f"`low` is {low:g} and `high` is {high:g}, in a teacher of {least:g} to {most:g}: nothing is left"
        )
    if name == "uniform":
        return _uniform(schedule, low, high)
    root = 7.0
    ends = low ** (1 / root), high ** (1 / root)

    def sampler(u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        u = u.double()
        if name == "lognormal":
            sigma = (mean + std * torch.special.ndtri(u)).exp()
        elif name == "loguniform":
            sigma = (math.log(low) + u * math.log(high / low)).exp()
        else:
            place = 0.02 + 0.96 * u if name == "karras" else 0.8 * u
            sigma = (ends[0] + place * (ends[1] - ends[0])) ** root
        return schedule.timestep_at(-2 * sigma.clamp(low, high).log()).float()

    return sampler


def trained_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Returns the smallest and largest sigma / alpha that a teacher of this schedule was trained on.

    Args:
        schedule: Schedule of the teacher.

    Raises:
        TypeError: The schedule is of a kind that is not known.
    """
    match schedule:
        case EDMSchedule():
            return _EDM
        case FlowSchedule():
            return 1e-3, 1e3
        case DiscreteSchedule():
            ends = torch.tensor([0.0, schedule.num_timesteps - 1.0], dtype=torch.float64)
            low, high = (-schedule.log_snr(ends) / 2).exp().tolist()
            # Without signal there is no sigma / alpha: the last level but one bounds the others.
            if not math.isfinite(high):
                high = float((-schedule.log_snr(ends[1:] - 1) / 2).exp())
            return low, high
    raise TypeError(f"no range of noise levels is known for {type(schedule).__name__}; pass a time sampler")


def _uniform(schedule: NoiseSchedule, low: float, high: float) -> TimeSampler:
    first, last = (float(schedule.timestep_at(torch.tensor([-2 * math.log(s)]).double())) for s in (low, high))
    discrete = isinstance(schedule, DiscreteSchedule)
    start, width = (0, schedule.num_timesteps) if isinstance(schedule, DiscreteSchedule) else (first, last - first)

    def sampler(u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        t = start + width * (0.02 + 0.96 * u)
        return t.floor().clamp(first, last) if discrete else t.clamp(first, last)

    return sampler
