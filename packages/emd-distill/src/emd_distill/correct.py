"""Correction of a generator's samples by a long chain: the paper's figure 1 as a function.

A chain of some hundred Langevin steps on (eps, z), at one noise level, carries samples of a generator towards those of
its teacher. The corrected sample is g(z(K)) + u(K): where the latent has moved to, and what the drifts alone have moved
the sample by, without the noise that was injected (`emd_distill.chain`). Nothing learns on the way, but the score of
the generator's own samples must be known: `fit_student` learns it for a generator that came without.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffcore.denoiser import Condition, Denoiser, NetworkDenoiser
from diffcore.train.timesteps import TimeSampler
from emd_distill.chain import ChainNoise, Generator, langevin_eps_z
from emd_distill.distill import sampled, student_loss, student_of
from emd_distill.draws import Conditions, Draws

_SEGMENT = 25  # Langevin steps whose noise is drawn at once


@dataclass(frozen=True, eq=False)
class Corrected:
    """Samples before and after their correction.

    Attributes:
        before: Samples g(z) at the start.
        after: Corrected samples g(z) + u at the end; those of chains that did not stay finite are as before.
        moved: Samples g(z) at the end: what the movement of the latents alone has done.
        z: Latents at the end.
        path: Corrected samples along the way, the start included.
        path_steps: Number of Langevin steps behind each entry of the path.
        drift: Root mean square of the drift at the first step after each entry of the path but the last.
        finite: Rows whose chain stayed finite.
    """

    before: Float[Tensor, "b *data"]
    after: Float[Tensor, "b *data"]
    moved: Float[Tensor, "b *data"]
    z: Float[Tensor, "b *latent"]
    path: Float[Tensor, "looks b *data"]
    path_steps: tuple[int, ...]
    drift: Float[Tensor, " segments"]
    finite: Bool[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Segment:
    """Where a chain stands after some of its steps: all that it goes on from.

    Attributes:
        done: Number of finished Langevin steps.
        z: Latents at this place.
        eps: Noise at this place.
        residual: Part of eps that the drifts so far have left.
        sample: Corrected samples at this place.
        drift: Root mean square of the drift at the first of the segment's steps.
        finite: Rows whose chain has stayed finite so far.
    """

    done: int
    z: Float[Tensor, "b *latent"]
    eps: Float[Tensor, "b *data"]
    residual: Float[Tensor, "b *data"]
    sample: Float[Tensor, "b *data"]
    drift: Float[Tensor, ""]
    finite: Bool[Tensor, " b"]


def correct(
    generator: Generator,
    teacher: Denoiser,
    student: Denoiser,
    z: Float[Tensor, "b *latent"],
    condition: Condition | None = None,
    *,
    t: float,
    steps: int = 300,
    gamma_e: float = 0.04,
    gamma_z: float = 0.01,
    kappa: float = 0.25,
    seed: int = 0,
    begun: Sequence[Segment] = (),
    on_segment: Callable[[Segment], object] | None = None,
) -> Corrected:
    """Runs a long chain from a generator's samples, and returns them before and after.

    Args:
        generator: One-step generator: (z, condition) to samples.
        teacher: Denoiser of the teacher; with guidance inside, where that is wanted.
        student: Denoiser of the score of the generator's samples, on the teacher's schedule.
        z: Latents of the samples, standard normal.
        condition: Keyword tensors of the backbones.
        t: Noise level of the chain, in the units of the schedule.
        steps: Number of Langevin steps (paper, figure 1: 300).
        gamma_e: Step size of eps, in (0, 1).
        gamma_z: Step size of z; 0 leaves the latents where they are.
        kappa: Variance of the generator's samples, for a step of z that depends on the level.
        seed: Seed of all injected noise.
        begun: Segments that an earlier call with the same arguments has finished, in order; the chain goes on from the
            last one, to the same result.
        on_segment: Called with each segment when it is finished.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> from emd_distill.digits import SHAPE, digit_classes, load_teacher
        >>> from emd_distill.generator import OneStepGenerator
        >>> teacher = load_teacher()
        >>> z, given = torch.randn(2, *SHAPE), digit_classes(0, torch.arange(2))
        >>> done = correct(OneStepGenerator(teacher, 2.5), teacher, teacher, z, given, t=0.5, steps=30, gamma_z=0.0)
        >>> done.path_steps, bool((done.after == done.before).all())  # a student that is the teacher has no drift
        ((0, 25, 30), True)
    """
    if steps < 1:
        raise ValueError(f"`steps` is {steps}; give at least 1")
    draws = Draws(seed, tuple(z.shape[1:]), lambda u: u)
    rows = torch.arange(len(z), device=z.device)
    level = torch.full((len(z),), float(t), device=z.device)
    with torch.no_grad():
        before = generator(z, condition)
    if before.shape[1:] != z.shape[1:]:
        draws = Draws(seed, tuple(z.shape[1:]), lambda u: u, data_shape=tuple(before.shape[1:]))
    eps = draws(0, rows).eps.to(before)
    alpha, sigma = (part.view(-1, *[1] * (before.ndim - 1)) for part in teacher.schedule.alpha_sigma(level))
    ones = (-1, *[1] * (before.ndim - 1))
    finite = torch.ones(len(z), dtype=torch.bool, device=z.device)
    residual = torch.zeros_like(before)
    segments = list(begun)
    if segments:
        last = segments[-1]
        z, eps, residual, finite = last.z, last.eps, last.residual, last.finite
    done = segments[-1].done if segments else 0
    while done < steps:
        count = min(_SEGMENT, steps - done)
        noise = draws.chain(1 + done, rows, count, gamma_z > 0)
        noise = ChainNoise(noise.eps.to(before), None if noise.z is None else noise.z.to(z))
        end = langevin_eps_z(
            generator, teacher, student, z, eps, level, condition,
            gamma_e=gamma_e, gamma_z=gamma_z, kappa=kappa, noise=noise, x0=None if gamma_z > 0 else before,
        )  # fmt: skip
        # What the drifts have left is linear in them: that of the segments before decays along this one.
        residual = (1 - gamma_e) ** count * residual + end.residual
        finite = finite & end.finite
        # A lost row goes on from where it was, and is left out at the end.
        kept = end.finite.view(ones)
        z, eps = end.z.detach(), end.eps.where(kept, eps)
        x0 = _samples(generator, z, condition, before, gamma_z > 0)
        done += count
        sample = (x0 + sigma / alpha * residual).where(finite.view(ones), before)
        drift = end.first_drift.where(kept, 0.0).square().mean().sqrt()
        segments.append(Segment(done, z, eps, residual, sample, drift, finite))
        if on_segment is not None:
            on_segment(segments[-1])
    path = torch.stack([before, *(segment.sample for segment in segments)])
    drifts = torch.stack([segment.drift.cpu() for segment in segments])
    counts = (0, *(segment.done for segment in segments))
    moved = _samples(generator, z, condition, before, gamma_z > 0)
    return Corrected(before, path[-1], moved, z, path, counts, drifts, finite)


def _samples(
    generator: Generator, z: Tensor, condition: Condition | None, before: Tensor, moves: bool
) -> Float[Tensor, "b *data"]:
    """Returns g(z), which is what it was before where z does not move."""
    if not moves:
        return before
    with torch.no_grad():
        return generator(z, condition)


def fit_student(
    teacher: Denoiser,
    generator: Generator,
    shape: tuple[int, ...],
    time_sampler: TimeSampler,
    *,
    conditions: Conditions | None = None,
    steps: int = 500,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int], object] | None = None,
) -> NetworkDenoiser:
    """Returns a denoiser of a generator's own samples, learned from the teacher's weights on.

    Args:
        teacher: Denoiser of the teacher, a network.
        generator: One-step generator, whose weights stay as they are.
        shape: Shape of one latent.
        time_sampler: Distribution of noise levels.
        conditions: Conditions of each step; None for a model without any.
        steps: Number of Adam's steps taken.
        batch_size: Number of samples of a step.
        learning_rate: Learning rate of Adam's steps.
        seed: Seed of all random draws.
        on_step: Called with the number of finished steps.

    Raises:
        ValueError: A number is out of its range.
        UserError: The teacher is no plain network.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; give at least 1")
    student = student_of(teacher)
    assert isinstance(student, NetworkDenoiser)
    optimizer = torch.optim.Adam(student.parameters(), learning_rate, (0.0, 0.99))
    average = copy.deepcopy(student)
    draws = Draws(seed, shape, time_sampler, conditions)
    rows: Int[Tensor, " b"] = torch.arange(batch_size, device=next(student.parameters()).device)
    for step in range(steps):
        drawn, x0 = sampled(generator, draws, step, rows)
        loss = student_loss(student, x0, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            own: list[Tensor] = list(average.parameters())
            others: list[Tensor] = list(student.parameters())
            torch._foreach_lerp_(own, others, max(0.01, 1 / (step + 1)))
        if on_step is not None:
            on_step(step + 1)
    return average.requires_grad_(False).eval()
