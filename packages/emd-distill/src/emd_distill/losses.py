"""Losses of the one-step generator behind one call: EM Distillation, and what it competes with.

Each takes the same situation: generator, teacher, student score, latents z with their samples, noise and levels. EM
Distillation regresses g(z) to where a chain has moved it,

    L = 1/2 mean |g(z) - constant(g(z) + omega(t) u)|^2,

whose gradient is -mean J^T omega u. Diff-Instruct and DMD are the same loss
without a chain; SiD is another one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffcore.denoiser import Condition, Denoiser
from emd_distill.chain import ChainNoise, Generator, NoiseCancel, frozen, langevin_eps_z, langevin_x_z, levels

Weighting = Literal["x0", "eps", "likelihood", "dmd", "snr_cap"]
DrawNoise = Callable[[int, bool], ChainNoise]
"""Draws the noise of a chain: (number of steps, whether z moves) to noise."""
OF_SAMPLES: tuple[Weighting, ...] = ("x0", "dmd")
"""Weights in units of clean samples, whose displacements explode where there is hardly a signal."""
_CAP = 5.0  # of the weights that explode at low noise


@dataclass(frozen=True)
class Situation:
    """What a loss of the generator is computed from, in one iteration.

    Attributes:
        generator: Generator whose parameters learn.
        teacher: Denoiser of the teacher, which stays as it is.
        student: Denoiser of the student score, after its update.
        z: Latents of the rows, standard normal.
        x0: Their samples g(z), without gradient.
        eps: Noise of the rows, standard normal.
        t: Noise level of each row.
        condition: Keyword tensors of the backbones.
        draw: Draws the noise of a chain of so many steps.
        iteration: Number of finished iterations, for schedules.
    """

    generator: Generator
    teacher: Denoiser
    student: Denoiser
    z: Float[Tensor, "b *latent"]
    x0: Float[Tensor, "b *data"]
    eps: Float[Tensor, "b *data"]
    t: Float[Tensor, " b"]
    condition: Condition | None
    draw: DrawNoise
    iteration: int = 0


@dataclass(frozen=True)
class GeneratorLoss:
    """A loss of the generator, and what is logged with it.

    Attributes:
        loss: Scalar with a gradient for the generator's parameters.
        finite: Rows that entered it.
        drift: Drift d of each row at its first noisy sample, without gradient.
        moved: Root mean square distance that each row's latent was moved.
    """

    loss: Float[Tensor, ""]
    finite: Bool[Tensor, " b"]
    drift: Float[Tensor, "b *data"]
    moved: Float[Tensor, " b"]


@runtime_checkable
class Loss(Protocol):
    """A loss of the generator that any trainer can call."""

    def __call__(self, s: Situation) -> GeneratorLoss:
        """Returns the loss in a situation."""
        ...


@dataclass(frozen=True)
class EMD:
    """EM Distillation: a chain of K steps, then a regression to where it ended.

    Attributes:
        num_steps: Number K of Langevin steps: 0 is Diff-Instruct, more cover more of the teacher's modes. A mapping
            from iterations to K is a schedule, each K from its iteration on.
        gamma_e: Step size of the noise eps.
        gamma_z: Step size of the latent z; 0 moves eps alone, at half of the cost.
        kappa: Variance of the samples, for a step of z that depends on the noise level; 0 for a constant one (paper).
        noise_cancel: Part of the injected noise that the target is freed of.
        weighting: Weight omega(t): "x0" is 1, "eps" alpha / sigma, "likelihood" its square, at most 5, "snr_cap" the
            smaller of alpha / sigma and 5, "dmd" one over the mean distance of g(z) from the teacher's x0.
        normalize: Whether to divide by 1 - (1 - gamma_e)^K, so that learning rates carry over between K.
        chain: Variables of the chain; "x_z" is there to compare with.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> EMD(num_steps={0: 1, 1000: 16}).steps_at(1500)
        16
    """

    num_steps: int | Mapping[int, int] = 8
    gamma_e: float = 0.16
    gamma_z: float = 1.6e-5
    kappa: float = 0.25
    noise_cancel: NoiseCancel = "complete"
    weighting: Weighting = "x0"
    normalize: bool = False
    chain: Literal["eps_z", "x_z"] = "eps_z"

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, Mapping) and 0 not in self.num_steps:
            raise ValueError("`num_steps` says nothing about iteration 0; begin the schedule there")
        counts = self.num_steps.values() if isinstance(self.num_steps, Mapping) else [self.num_steps]
        if any(count < 0 for count in counts):
            raise ValueError(f"`num_steps` is {self.num_steps}; give numbers of at least 0")
        if not 0 < self.gamma_e < 1:
            raise ValueError(f"`gamma_e` is {self.gamma_e}; it must lie between 0 and 1")
        if not self.gamma_z >= 0 or not self.kappa >= 0:
            raise ValueError(f"`gamma_z` is {self.gamma_z} and `kappa` {self.kappa}; they must be at least 0")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"`weighting` is {self.weighting!r}; it must be one of {', '.join(get_args(Weighting))}")
        if self.noise_cancel not in get_args(NoiseCancel):
            raise ValueError(
                f"`noise_cancel` is {self.noise_cancel!r}; it must be one of {', '.join(get_args(NoiseCancel))}"
            )
        if self.noise_cancel == "last" and 0 in counts:
            raise ValueError("`noise_cancel` is 'last', but the chain has no step; take complete")

    def steps_at(self, iteration: int) -> int:
        """Returns the number of Langevin steps in an iteration.

        Args:
            iteration: Number of finished iterations.
        """
        if not isinstance(self.num_steps, Mapping):
            return self.num_steps
        return self.num_steps[max(start for start in self.num_steps if start <= iteration)]

    @property
    def most_steps(self) -> int:
        """The largest number of Langevin steps in any iteration."""
        return max(self.num_steps.values()) if isinstance(self.num_steps, Mapping) else self.num_steps

    def __call__(self, s: Situation) -> GeneratorLoss:
        """Returns the loss in a situation."""
        num_steps = self.steps_at(s.iteration)
        run = langevin_eps_z if self.chain == "eps_z" else langevin_x_z
        end = run(
            s.generator,
            s.teacher,
            s.student,
            s.z,
            s.eps,
            s.t,
            s.condition,
            gamma_e=self.gamma_e,
            gamma_z=self.gamma_z,
            kappa=self.kappa,
            noise_cancel=self.noise_cancel if num_steps else "complete",
            noise=s.draw(num_steps, self.gamma_z > 0) if num_steps else None,
            x0=s.x0,
        )
        weight = omega(self.weighting, *levels(s.teacher, s.t, s.eps), s.x0, end.teacher_x0)
        if self.normalize and num_steps and self.noise_cancel == "complete":
            weight = weight / (1 - (1 - self.gamma_e) ** num_steps)
        step = weight * end.u
        finite = end.finite & step.isfinite().flatten(1).all(1)
        rows = finite.view(-1, *[1] * (step.ndim - 1))
        y = s.generator(end.z, s.condition)
        target = (y + step.where(rows, 0.0)).detach()
        loss = 0.5 * mean_over(finite, (y - target).square())
        return GeneratorLoss(loss, finite, end.first_drift, (end.z - s.z).flatten(1).square().mean(1).sqrt())


def diff_instruct(weighting: Weighting = "x0") -> EMD:
    """Returns Diff-Instruct, which is EM Distillation without a chain: it seeks modes (reverse KL divergence).

    Args:
        weighting: Weight of the noise levels.

    Example:
        >>> diff_instruct().num_steps
        0
    """
    return EMD(num_steps=0, weighting=weighting)


def dmd() -> EMD:
    """Returns the distribution-matching loss of DMD and DMD2, without their regression and discriminator.

    Example:
        >>> dmd().weighting
        'dmd'
    """
    return EMD(num_steps=0, weighting="dmd")


@dataclass(frozen=True)
class SiD:
    """Score identity distillation, with gradients through teacher and student.

    Attributes:
        a: Weight of the squared difference of the two scores; 1 and 1.2 are in use.

    Example:
        >>> SiD().a
        1.2
    """

    a: float = 1.2

    def __call__(self, s: Situation) -> GeneratorLoss:
        """Returns the loss in a situation; it may be negative."""
        alpha, sigma = levels(s.teacher, s.t, s.eps)
        x = s.generator(s.z, s.condition)
        x.register_hook(_finite_rows)
        noisy = alpha * x + sigma * s.eps
        with frozen(s.teacher) as teacher, frozen(s.student) as student:
            theirs, ours = (network(noisy, s.t, s.condition) for network in (teacher, student))
        apart = (sigma / alpha) * ours.noise_minus(theirs)  # x0 of the teacher - x0 of the student
        scale = (x - theirs.x0).detach().abs().flatten(1).mean(1).clamp(min=1e-6)
        rows = (apart * ((theirs.x0 - x) - self.a * apart)).flatten(1).mean(1) / scale
        finite = rows.detach().isfinite()
        loss = mean_over(finite, rows)
        drift = (alpha / sigma * apart).detach()
        return GeneratorLoss(loss, finite, drift, torch.zeros_like(rows))


LOSSES: Mapping[str, Callable[[], Loss]] = {
    "emd": EMD,
    "diff-instruct": diff_instruct,
    "dmd": dmd,
    "sid": SiD,
}
"""Losses by the names of the command line."""


def _finite_rows(gradient: Tensor) -> Tensor:
    """Returns a gradient in which rows with values that are not finite are zero."""
    finite = gradient.isfinite().flatten(1).all(1)
    return gradient.where(finite.view(-1, *[1] * (gradient.ndim - 1)), 0.0)


def omega(
    weighting: Weighting,
    alpha: Float[Tensor, "b *ones"],
    sigma: Float[Tensor, "b *ones"],
    x0: Float[Tensor, "b *data"],
    teacher_x0: Float[Tensor, "b *data"],
) -> Float[Tensor, "b *ones"]:
    """Returns the weight of each row's displacement u.

    Args:
        weighting: Name of the weight, see `EMD`.
        alpha: Factor of the clean sample at the row's level.
        sigma: Factor of the noise at the row's level.
        x0: Samples of the generator.
        teacher_x0: Clean samples that the teacher predicts from them with noise.

    Raises:
        ValueError: A level holds too little signal for a displacement of clean samples.
    """
    ratio = alpha / sigma
    if weighting == "x0":
        return torch.ones_like(ratio)
    if weighting == "eps":
        return ratio
    if weighting == "likelihood":
        return ratio.square().clamp(max=_CAP)
    if weighting == "snr_cap":
        return ratio.clamp(max=_CAP)
    apart = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp(min=1e-6)
    return 1 / apart.view_as(ratio)


def mean_over(finite: Bool[Tensor, " b"], values: Float[Tensor, "b *data"]) -> Float[Tensor, ""]:
    """Returns the mean over the rows that are finite; 0 where none is.

    Args:
        finite: Rows that enter the mean.
        values: Values of all rows; those of the others may be anything, and get no gradient.
    """
    rows = values.flatten(1).mean(1) if values.ndim > 1 else values
    return rows.where(finite, 0.0).sum() / finite.sum().clamp(min=1)
