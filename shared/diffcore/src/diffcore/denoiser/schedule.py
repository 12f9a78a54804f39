"""Noise schedules: `x_t = alpha x0 + sigma noise`, and how alpha and sigma depend on `t`.

`t` is what a schedule is parameterised in and what a backbone is fed: an index for discrete schedules, the flow time in
[0, 1] for flow matching, the noise level itself for EDM. Schedules are values: frozen, comparable, and free of
parameters, so that casting a model to half precision leaves them alone.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from diffcore.denoiser.grid import Grid

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["leading", "trailing", "linspace"]


class NoiseSchedule(ABC):
    """The factors alpha and sigma of signal and noise in `x_t`, as functions of `t`.

    Results have the precision of `t`: float64 for a float64 `t`, else float32.

    Attributes:
        clip_x0: Bound to which a solver clamps predicted x0, [-clip_x0, clip_x0]; None leaves it alone.
    """

    clip_x0: float | None = None

    @abstractmethod
    def alpha_sigma(self, t: Num[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Returns the factors of `x0` and of the noise."""

    @abstractmethod
    def log_snr(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns log(alpha² / sigma²), which falls with `t`; infinite where sigma or alpha is 0."""

    @abstractmethod
    def timestep_at(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the `t` of a log signal-to-noise ratio; of a discrete schedule the nearest index."""

    @abstractmethod
    def timesteps(self, steps: int) -> Float64[Tensor, "steps"]:
        """Returns the times a solver of `steps` steps evaluates, noisiest first; the last step ends in clean data."""

    def clean_alpha_sigma(self) -> tuple[float, float]:
        """Returns the level at which a solver ends, after the last of `timesteps`."""
        return 1.0, 0.0

    def initial_scale(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the factor that takes unit normal noise to a solver's first state."""
        return self.alpha_sigma(t)[1]

    def add_noise(
        self, x0: Float[Tensor, "b *data"], noise: Float[Tensor, "b *data"], t: Num[Tensor, " b"]
    ) -> Float[Tensor, "b *data"]:
        """Returns `x_t = alpha x0 + sigma noise`, each row at its own `t`."""
        alpha, sigma = (level.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype) for level in self.alpha_sigma(t))
        return alpha * x0 + sigma * noise


@dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """The variance-preserving schedule of DDPM and its relatives: `t` is an index from 0 to `num_timesteps` - 1.

    Some solvers stop between two indices, where sigma / alpha is interpolated linearly, as in diffusers. Everything is
    computed in float64 and cast last.

    Args:
        num_timesteps: T, the number of trained noise levels.
        betas: A named schedule, or T trained betas.
        beta_start: First beta of the linear schedules.
        beta_end: Last beta of the linear schedules.
        rescale_betas_zero_snr: Whether sqrt(alpha bar) is shifted and scaled so that the last level is pure noise.
        spacing: Rule by which a solver visits some of the T levels. With zero terminal SNR only "trailing" and
            "linspace" start at the last one.
        steps_offset: Number added to the indices of "leading" spacing.
        set_alpha_to_one: Whether the last solver step ends at clean data, or at the level of index 0.
        clip_x0: Bound on predicted x0, as in the base class; 1 for most pixel models (`clip_sample`).
        grid: The diffusers scheduler whose times a solver visits in place of `spacing` and `steps_offset`.

    References:
        Ho et al. 2020, section 2; Nichol and Dhariwal 2021, equation 17; Lin et al. 2024, algorithm 1.
    """

    num_timesteps: int = 1000
    betas: BetaSchedule | tuple[float, ...] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    rescale_betas_zero_snr: bool = False
    spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_x0: float | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ValueError(f"`num_timesteps` is {self.num_timesteps}; it must be at least 1")
        if isinstance(self.betas, tuple) and len(self.betas) != self.num_timesteps:
            raise ValueError(f"`betas` has {len(self.betas)} entries; `num_timesteps` is {self.num_timesteps}")
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"`spacing` is {self.spacing!r}; it must be leading, trailing or linspace")
        if self.clip_x0 is not None and not self.clip_x0 > 0:
            raise ValueError(f"`clip_x0` is {self.clip_x0}; it must be positive")
        betas = self._betas()
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("betas must lie in (0, 1]")

    def alpha_sigma(self, t: Num[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Returns sqrt(alpha bar) and sqrt(1 - alpha bar) at index `t`."""
        alpha, sigma, _ = self._look_up(t).unbind(-1)
        return alpha, sigma

    def log_snr(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns log(alpha² / sigma²) at index `t`; -inf at the last index under zero terminal SNR."""
        return self._look_up(t)[..., 2]

    def timestep_at(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns the index nearest in log-SNR, the lower one of two equally near.

        Under zero terminal SNR the last index, which lies at -inf, answers -inf alone.
        """
        table = self._on(log_snr.device)[:, 2]
        midpoints = ((table[:-1] + table[1:]) / 2).clamp(min=torch.finfo(table.dtype).min)
        index = torch.searchsorted(-midpoints, -log_snr.to(table.dtype).contiguous())
        return index.to(_real(log_snr).dtype)

    def timesteps(self, steps: int) -> Float64[Tensor, "steps"]:
        """Returns the indices that a solver of `steps` steps visits, as diffusers spaces them.

        One step of "linspace" is the noisiest index here, and index 0, where nothing is to be denoised, in diffusers:
        schedules with a `grid`, such as those of its schedulers, follow it.
        """
        _check_steps(steps)
        last = self.num_timesteps - 1
        count = torch.arange(steps, dtype=torch.float64)
        if steps > self.num_timesteps:  # classes repeat times then, or give the first one alone
            raise ValueError(f"`steps` is {steps}; there are {last + 1} timesteps")
        if self.grid is not None:
            times = self.grid.times(steps)
        elif self.spacing == "leading":
            times = (count * (self.num_timesteps // steps)).flip(0) + self.steps_offset
        elif self.spacing == "trailing":
            times = (self.num_timesteps - count * (self.num_timesteps / steps)).round() - 1
        else:
            times = torch.linspace(last, 0, steps, dtype=torch.float64).round()
        if times[0] > last:
            raise ValueError(f"`steps` is {steps}, `steps_offset` {self.steps_offset}; there are {last + 1} timesteps")
        return times

    def clean_alpha_sigma(self) -> tuple[float, float]:
        """Returns (1, 0), or the level of index 0 where `set_alpha_to_one` is off."""
        if self.set_alpha_to_one:
            return 1.0, 0.0
        alpha, sigma, _ = self._table[0].tolist()
        return alpha, sigma

    def initial_scale(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns 1: the marginal of unit-variance data has unit variance at every `t`."""
        return torch.ones_like(t, dtype=_real(t).dtype)

    def _betas(self) -> Float64[Tensor, " T"]:
        start, end, count = self.beta_start, self.beta_end, self.num_timesteps
        if isinstance(self.betas, tuple):
            return torch.tensor(self.betas, dtype=torch.float64)
        if self.betas == "linear":
            return torch.linspace(start, end, count, dtype=torch.float64)
        if self.betas == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
        if self.betas == "squaredcos_cap_v2":
            u = torch.arange(count + 1, dtype=torch.float64) / count
            bar = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
            return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        raise ValueError(f"`betas` is {self.betas!r}; it must be linear, scaled_linear, squaredcos_cap_v2 or a tuple")

    @cached_property
    def _table(self) -> Float64[Tensor, "T 3"]:
        """Alpha, sigma and log-SNR of every index, on the host."""
        alpha = (1 - self._betas()).cumprod(0).sqrt()
        if self.rescale_betas_zero_snr:
            first, last = alpha[0].clone(), alpha[-1].clone()
            alpha = (alpha - last) * first / (first - last)
        bar = alpha.square()
        return torch.stack([alpha, (1 - bar).sqrt(), (bar / (1 - bar)).log()], dim=1)

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        """One copy of the table per device, made at first use: later look-ups neither copy nor wait."""
        return {}

    def _on(self, device: torch.device) -> Float[Tensor, "T 3"]:
        if device not in self._copies:
            self._copies[device] = self._table.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self._copies[device]

    def _look_up(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b 3"]:
        index = t.floor().long() if t.is_floating_point() else t.long()
        # On a device a look would stall the stream; there PyTorch's own index check answers.
        if index.device.type == "cpu" and bool(((index < 0) | (index >= self.num_timesteps)).any()):
            raise ValueError(f"t runs from {index.min()} to {index.max()}; there are {self.num_timesteps} timesteps")
        table = self._on(t.device)
        found = table[index]
        if t.is_floating_point():
            share = t.to(table.dtype) - index
            following = table[(index + 1).clamp(max=self.num_timesteps - 1)]
            found = torch.where(share[..., None] > 0, _between(found, following, share), found)
        return found.to(_real(t).dtype)


def _between(low: Float[Tensor, "*b 3"], high: Float[Tensor, "*b 3"], share: Float[Tensor, "*b"]) -> Tensor:
    """Returns alpha, sigma and log-SNR where sigma / alpha lies a share of the way from one level to the next."""
    ratio = (1 - share) * low[..., 1] / low[..., 0] + share * high[..., 1] / high[..., 0]
    return torch.stack([1 / (1 + ratio**2).sqrt(), 1 / (1 + ratio**-2).sqrt(), -2 * ratio.log()], dim=-1)


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow: alpha = 1 - t, sigma = t, with `t` from 0 (data) to 1 (noise).

    Args:
        shift: Moves solver times towards noise: t' = shift t / (1 + (shift - 1) t); 1 leaves them uniform.
        last_time: The last time a solver evaluates, before the shift; None spaces all steps evenly, 1/steps.

    References:
        Lipman et al. 2023; Liu et al. 2023; the shift: Esser et al. 2024, equation 23.
    """

    shift: float = 1.0
    last_time: float | None = None

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"`shift` is {self.shift}; it must be positive")
        if self.last_time is not None and not 0 < self.last_time < 1:
            raise ValueError(f"`last_time` is {self.last_time}; it must lie between 0 and 1")

    def alpha_sigma(self, t: Num[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Returns 1 - t and t."""
        t = _real(t)
        return 1 - t, t

    def log_snr(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns 2 log((1 - t) / t)."""
        t = _real(t)
        return 2 * (torch.log1p(-t) - t.log())

    def timestep_at(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns 1 / (1 + exp(log_snr / 2))."""
        return torch.sigmoid(-_real(log_snr) / 2)

    def shifted(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns uniform times moved by `shift`; 0 and 1 stay."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timesteps(self, steps: int) -> Float64[Tensor, "steps"]:
        """Returns times from 1 downwards, shifted; the last step ends at 0."""
        _check_steps(steps)
        last = 1 / steps if self.last_time is None else self.last_time
        return self.shifted(torch.linspace(1, last, steps, dtype=torch.float64))


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """The variance-exploding schedule of EDM: alpha = 1, and `t` is sigma itself.

    Args:
        sigma_min: The smallest noise level a solver evaluates.
        sigma_max: The level a solver starts from.
        rho: Exponent of the solver grid; larger values place more steps at small noise levels.
        sigma_data: Standard deviation of the data, for the preconditioning.

    References:
        Karras et al. 2022, equation 5 and table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"`sigma_min` is {self.sigma_min}, `sigma_max` is {self.sigma_max}; 0 < min < max must hold"
            )
        if not (self.rho > 0 and self.sigma_data > 0):
            raise ValueError(f"`rho` is {self.rho}, `sigma_data` is {self.sigma_data}; both must be positive")

    def alpha_sigma(self, t: Num[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Returns 1 and t."""
        t = _real(t)
        return torch.ones_like(t), t

    def log_snr(self, t: Num[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns -2 log(t)."""
        return -2 * _real(t).log()

    def timestep_at(self, log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Returns exp(-log_snr / 2)."""
        return torch.exp(-_real(log_snr) / 2)

    def timesteps(self, steps: int) -> Float64[Tensor, "steps"]:
        """Returns the Karras grid from `sigma_max` to `sigma_min`; the last step ends at 0."""
        _check_steps(steps)
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.linspace(*ends, steps, dtype=torch.float64) ** self.rho


def bridge(
    x_t: Float[Tensor, "b *data"], t: Num[Tensor, " b"], source: NoiseSchedule, target: NoiseSchedule
) -> tuple[Float[Tensor, "b *data"], Float[Tensor, " b"]]:
    """Carries a noisy sample to another schedule: the same x0 and noise at the same signal-to-noise ratio.

    The result is exact for continuous targets. A discrete target rounds to its nearest index and noise level.

    Returns:
        `x_t` and `t` of the target schedule.
    """
    other = target.timestep_at(source.log_snr(t))
    # alpha + sigma vanishes nowhere, so this scale is also defined at pure noise, where the ratio of alphas is 0 / 0.
    scale = torch.add(*target.alpha_sigma(other)) / torch.add(*source.alpha_sigma(t))
    return x_t * scale.view(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype), other


def _real(t: Tensor) -> Tensor:
    """Returns `t` in float64 if it has that type, else in float32: half precision cannot tell timesteps apart."""
    return t if t.dtype == torch.float64 else t.float()


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"`steps` is {steps}; it must be at least 1")
