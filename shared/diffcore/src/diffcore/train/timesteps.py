"""Distributions of timesteps in training, as inverse distribution functions from (0, 1) to timesteps.

A time sampler maps uniform numbers to timesteps, so that the trainer owns the draw (a function of seed, step and row)
and the sampler owns the distribution.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule

TimeSampler = Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]]


def uniform_timesteps(num_timesteps: int) -> TimeSampler:
    """Returns the sampler of indices 0 … `num_timesteps` - 1 with equal weight (DDPM, algorithm 1)."""

    def sampler(u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (u * num_timesteps).floor().clamp(max=num_timesteps - 1)

    return sampler


def log_normal_sigmas(mean: float = -1.2, std: float = 1.2) -> TimeSampler:
    """Returns the sampler of sigmas with `ln sigma ~ N(mean, std²)` (EDM, Table 1)."""

    def sampler(u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (mean + std * torch.special.ndtri(u)).exp()

    return sampler


def logit_normal_times(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """Returns the sampler of flow times with `logit t ~ N(mean, std²)` (Stable Diffusion 3, section 3.1)."""

    def sampler(u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return torch.sigmoid(mean + std * torch.special.ndtri(u))

    return sampler


def default_time_sampler(schedule: NoiseSchedule) -> TimeSampler:
    """Returns the distribution that the schedule's own paper trains with.

    Uniform indices for discrete schedules, uniform times for flow matching, log-normal sigmas for EDM.

    Raises:
        TypeError: The schedule is of another kind; pass a time sampler.
    """
    match schedule:
        case DiscreteSchedule():
            return uniform_timesteps(schedule.num_timesteps)
        case FlowSchedule():
            return lambda u: u
        case EDMSchedule():
            return log_normal_sigmas()
    raise TypeError(f"no default time sampler for {type(schedule).__name__}; pass time_sampler")
