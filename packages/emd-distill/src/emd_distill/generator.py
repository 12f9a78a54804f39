"""The one-step generator that a teacher becomes: its prediction of x0 at one fixed noise level, from pure noise."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.denoiser import Condition, Denoiser, DiscreteSchedule, NoiseSchedule


class OneStepGenerator(nn.Module):
    """Calls a denoiser once, at one noise level, with a latent for the noisy sample: g(z) = D(kappa z, t).

    kappa is what the teacher's solver multiplies noise by at that level: 1 for variance-preserving schedules, sigma for
    EDM's. The latent keeps unit variance, which the chain's prior needs.

    Args:
        denoiser: Denoiser with trainable weights, usually a copy of the teacher.
        t: Noise level at which it is called, in the units of its schedule.

    Raises:
        ValueError: The level holds no noise, or lies outside a discrete schedule.

    Example:
        >>> from diffcore.denoiser import EDMSchedule, NetworkDenoiser
        >>> class Zero(nn.Module):
        ...     def forward(self, x: Tensor, t: Tensor) -> Tensor:
        ...         return torch.zeros_like(x)
        >>> generator = OneStepGenerator(NetworkDenoiser(Zero(), EDMSchedule(), "edm"), 2.0)
        >>> round(float(generator(torch.ones(1, 3))[0, 0]), 4)  # c_skip kappa z = .25 / 4.25 * 2
        0.1176
    """

    def __init__(self, denoiser: Denoiser, t: float | int) -> None:
        super().__init__()
        schedule = denoiser.schedule
        if isinstance(schedule, DiscreteSchedule) and not 0 <= t <= schedule.num_timesteps - 1:
            raise ValueError(f"`t` is {t}; the schedule has timesteps 0 to {schedule.num_timesteps - 1}")
        level = torch.tensor([t], dtype=torch.float64)
        if not float(schedule.alpha_sigma(level)[1]) > 0:
            raise ValueError(f"`t` is {t}, where the schedule has no noise; take a level with noise")
        self.denoiser = denoiser
        self.t = float(t)
        self.scale = float(schedule.initial_scale(level))

    def forward(self, z: Float[Tensor, "b *data"], condition: Condition | None = None) -> Float[Tensor, "b *data"]:
        """Returns clean samples from standard normal latents.

        Args:
            z: Latents in the shape of the samples.
            condition: Keyword tensors of the backbone.
        """
        t = torch.full((len(z),), self.t, dtype=torch.float32, device=z.device)
        return self.denoiser(self.scale * z, t, condition).x0


def level_of(schedule: NoiseSchedule, log_snr: float) -> float:
    """Returns the noise level with a log signal-to-noise ratio, such as the paper's lambda* = -6.

    Args:
        schedule: Schedule of the teacher; a discrete one answers with the nearest timestep.
        log_snr: Log signal-to-noise ratio, log(alpha^2 / sigma^2).

    Example:
        >>> from diffcore.denoiser import EDMSchedule
        >>> round(level_of(EDMSchedule(), -6.0), 2)
        20.09
    """
    return float(schedule.timestep_at(torch.tensor([log_snr], dtype=torch.float64))[0])
