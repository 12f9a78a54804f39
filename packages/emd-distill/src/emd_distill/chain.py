"""The E-step: Langevin chains that carry pairs of noise and latent from the generator towards the teacher.

The generator's sample diffused to a noise level is x = alpha g(z) + sigma eps. A chain starts at (eps, z) from N(0, I)
and moves towards rho(x, z) = q(x) p(z | x), with q the teacher's diffused marginal. In the variables (eps, z)

    d       = sigma (score of the teacher - score of the student) at x = noise predicted by the student - by the teacher
    eps'    = (1 - gamma_e) eps + gamma_e d                        + sqrt(2 gamma_e) n_e
    z'      = (1 - gamma_z) z   + gamma_z (alpha / sigma) J(z)^T d + sqrt(2 gamma_z) n_z

where J is the Jacobian of g. Both lines use the old pair. The noise that enters eps, N, follows the same recursion:
N(0) = eps(0), N' = (1 - gamma_e) N + sqrt(2 gamma_e) n_e. Without it, what the drifts alone have left is

    r(0) = 0,    r' = (1 - gamma_e) r + gamma_e d,    r(K) = eps(K) - N(K),    u = (sigma / alpha) r(K),

computed as such, since a difference of eps and N would lose its digits. The M-step learns from u: it is where the
teacher would move the sample minus where the student's own score would, averaged along the chain.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffcore.denoiser import Condition, Denoiser, Prediction
from emd_distill.lean import lean

NoiseCancel = Literal["none", "last", "complete", "stein"]
Generator = Callable[[Tensor, Condition | None], Tensor]
"""A one-step generator: (z, condition) to clean samples x0; z is standard normal."""


@dataclass(frozen=True)
class ChainNoise:
    """The noise that a chain injects, drawn beforehand.

    Attributes:
        eps: Standard normal noise of each step for eps (or x).
        z: Standard normal noise of each step for z; None where z does not move.
    """

    eps: Float[Tensor, "b steps *data"]
    z: Float[Tensor, "b steps *latent"] | None = None


@dataclass(frozen=True)
class Trace:
    """What a chain went through, for diagnosis and tests.

    Attributes:
        eps: Noise before the first step and after each.
        z: Latents before the first step and after each.
        drift: Drift d at each step.
    """

    eps: tuple[Float[Tensor, "b *data"], ...]
    z: tuple[Float[Tensor, "b *latent"], ...]
    drift: tuple[Float[Tensor, "b *data"], ...]


@dataclass(frozen=True)
class ChainResult:
    """Where a chain has ended.

    Attributes:
        z: Latents after the last step; those before the first step in rows that are not finite.
        eps: Noise after the last step.
        residual: Noise whose cancelled part was subtracted, in units of eps; 0 in rows that are not finite.
        u: Displacement of clean samples, (sigma / alpha) residual.
        finite: Rows whose chain stayed finite; the others must not enter a loss.
        teacher_x0: Clean samples that the teacher predicts from the chain's first x.
        first_drift: Drift d at the chain's first x, whose size tells how far student and teacher are apart.
        trace: All states, where they were asked for.
    """

    z: Float[Tensor, "b *latent"]
    eps: Float[Tensor, "b *data"]
    residual: Float[Tensor, "b *data"]
    u: Float[Tensor, "b *data"]
    finite: Bool[Tensor, " b"]
    teacher_x0: Float[Tensor, "b *data"]
    first_drift: Float[Tensor, "b *data"]
    trace: Trace | None = None


def langevin_eps_z(
    generator: Generator,
    teacher: Denoiser,
    student: Denoiser,
    z: Float[Tensor, "b *latent"],
    eps: Float[Tensor, "b *data"],
    t: Float[Tensor, " b"],
    condition: Condition | None = None,
    *,
    gamma_e: float,
    gamma_z: float,
    kappa: float = 0.0,
    noise_cancel: NoiseCancel = "complete",
    noise: ChainNoise | None = None,
    x0: Float[Tensor, "b *data"] | None = None,
    trace: bool = False,
) -> ChainResult:
    """Runs the reparametrised chain, the method's own.

    Without noise there are no steps: the drift at the start is the residual, which is Diff-Instruct. With one step and
    gamma_z = 0 it is gamma_e times that. The generator is called with constant parameters; its Jacobian enters by one
    vector-Jacobian product a step, and not at all with gamma_z = 0, where z and g(z) stay as they are.

    Args:
        generator: One-step generator, in evaluation mode where that matters.
        teacher: Denoiser of the teacher; with guidance inside, where that is wanted.
        student: Denoiser of the student score, on the teacher's schedule.
        z: Latents of the rows, standard normal.
        eps: Noise of the rows, standard normal.
        t: Noise level of each row, in the units of the schedule.
        condition: Keyword tensors of the backbones.
        gamma_e: Step size of eps, in (0, 1); 0 with noise_cancel "stein" moves z alone.
        gamma_z: Step size of z, at least 0; 0 moves eps alone.
        kappa: Variance of the generator's samples; the step of z is gamma_z sigma^2 / (sigma^2 + kappa alpha^2), which
            keeps it stable at low noise. 0 takes gamma_z at all levels (paper).
        noise_cancel: Part of the injected noise that the residual is freed of: "none", the "last" step's, the
            "complete" noise (paper), or "stein", the drift at the last state.
        noise: Noise of the steps; their number K is its second dimension.
        x0: Samples g(z), where they are known.
        trace: Whether to keep all states.

    Raises:
        ValueError: A step size is out of its range, or the noise lacks what the chain needs.
    """
    num_steps = 0 if noise is None else noise.eps.shape[1]
    _check(gamma_e, gamma_z, noise_cancel, num_steps, noise)
    alpha, sigma = levels(teacher, t, eps)
    moves = gamma_z > 0 and num_steps > 0
    step_z = gamma_z * sigma.square() / (sigma.square() + kappa * alpha.square())
    step_z = step_z.view(-1, *[1] * (z.ndim - 1))
    start, collected, last = z, torch.zeros_like(eps), torch.zeros_like(eps)
    states, drifts = [(eps, z)], []
    teacher_x0 = first = None
    with frozen(generator) as call, lean(generator):
        y = x0
        for step in range(num_steps):
            if y is None or moves:
                z, y = _sampled(call, z, condition, moves=moves)
            drift, prediction = drift_at(teacher, student, alpha * y.detach() + sigma * eps, t, condition)
            if step == 0:
                teacher_x0, first = prediction.x0, drift
            assert noise is not None
            n_e = noise.eps[:, step]
            last = math.sqrt(2 * gamma_e) * n_e
            if moves:
                assert noise.z is not None
                (pull,) = torch.autograd.grad(y, z, (alpha / sigma * drift).to(y.dtype))
                z = (1 - step_z) * z.detach() + step_z * pull + (2 * step_z).sqrt() * noise.z[:, step]
            eps = (1 - gamma_e) * eps + gamma_e * drift + last
            collected = (1 - gamma_e) * collected + gamma_e * drift
            if trace:
                states.append((eps, z))
                drifts.append(drift)
        if noise_cancel == "stein" or num_steps == 0:
            if y is None or moves:
                y = _sampled(call, z, condition, moves=False)[1]
            drift, prediction = drift_at(teacher, student, alpha * y.detach() + sigma * eps, t, condition)
            residual = drift
            if num_steps == 0:
                teacher_x0, first = prediction.x0, drift
        else:
            residual = {"none": eps, "last": eps - last, "complete": collected}[noise_cancel]
    assert teacher_x0 is not None
    assert first is not None
    kept = Trace(*(tuple(part) for part in (*zip(*states, strict=True), drifts))) if trace else None
    return _ended(z, eps, residual, start, sigma / alpha, teacher_x0, first, kept)


def langevin_x_z(
    generator: Generator,
    teacher: Denoiser,
    student: Denoiser,
    z: Float[Tensor, "b *latent"],
    eps: Float[Tensor, "b *data"],
    t: Float[Tensor, " b"],
    condition: Condition | None = None,
    *,
    gamma_e: float,
    gamma_z: float,
    kappa: float = 0.0,
    noise_cancel: NoiseCancel = "complete",
    noise: ChainNoise | None = None,
    x0: Float[Tensor, "b *data"] | None = None,
    trace: bool = False,
) -> ChainResult:
    """Runs the chain in (x, z), which the paper compares with.

    The step of x is gamma_e sigma^2. It mixes more slowly than `langevin_eps_z` at equal cost, since x is tied to g(z)
    by a spring. Arguments and result are as there; eps in the result is (x - alpha g(z)) / sigma.

    Args:
        generator: One-step generator, in evaluation mode where that matters.
        teacher: Denoiser of the teacher; with guidance inside, where that is wanted.
        student: Denoiser of the student score, on the teacher's schedule.
        z: Latents of the rows, standard normal.
        eps: Noise, standard normal; the chain starts at alpha g(z) + sigma eps.
        t: Noise level of each row, in the units of the schedule.
        condition: Keyword tensors of the backbones.
        gamma_e: Step size of x in units of sigma^2, in (0, 1).
        gamma_z: Step size of z, at least 0; 0 moves x alone.
        kappa: Variance of the generator's samples, for a step of z that depends on the level; 0 for a constant one.
        noise_cancel: Part of the injected noise that the residual is freed of.
        noise: Noise of the steps; their number K is its second dimension.
        x0: Samples g(z), where they are known.
        trace: Whether to keep all states.

    Raises:
        ValueError: A step size is out of its range, or the noise lacks what the chain needs.
    """
    if noise is None or noise.eps.shape[1] == 0:
        return langevin_eps_z(
            generator, teacher, student, z, eps, t, condition, gamma_e=gamma_e, gamma_z=gamma_z, x0=x0
        )
    num_steps = noise.eps.shape[1]
    _check(gamma_e, gamma_z, noise_cancel, num_steps, noise)
    alpha, sigma = levels(teacher, t, eps)
    moves = gamma_z > 0
    step_z = gamma_z * sigma.square() / (sigma.square() + kappa * alpha.square())
    step_z = step_z.view(-1, *[1] * (z.ndim - 1))
    start, last = z, torch.zeros_like(eps)
    states, drifts = [(eps, z)], []
    teacher_x0 = first = None
    with frozen(generator) as call, lean(generator):
        z, y = _sampled(call, z, condition, moves=moves) if moves or x0 is None else (z, x0)
        x = alpha * y.detach() + sigma * eps
        collected = alpha * y.detach()  # x without the noise that was put into it
        for step in range(num_steps):
            drift, prediction = drift_at(teacher, student, x, t, condition)
            if step == 0:
                teacher_x0, first = prediction.x0, drift
            spring = (x - alpha * y.detach()) / sigma  # the noise that x stands for
            if moves:
                assert noise.z is not None
                (pull,) = torch.autograd.grad(y, z, (alpha / sigma * spring).to(y.dtype))
                z = (1 - step_z) * z.detach() + step_z * pull + (2 * step_z).sqrt() * noise.z[:, step]
            last = math.sqrt(2 * gamma_e) * sigma * noise.eps[:, step]
            x = x + gamma_e * sigma * (drift - spring) + last
            collected = (1 - gamma_e) * collected + gamma_e * (alpha * y.detach() + sigma * drift)
            if moves:
                z, y = _sampled(call, z, condition, moves=step + 1 < num_steps)
            if trace:
                states.append(((x - alpha * y.detach()) / sigma, z.detach()))
                drifts.append(drift)
        y = y.detach()
        eps = (x - alpha * y) / sigma
        if noise_cancel == "stein":
            residual = drift_at(teacher, student, x, t, condition)[0]
        else:
            freed = {"none": x, "last": x - last, "complete": collected}[noise_cancel]
            residual = (freed - alpha * y) / sigma
    assert teacher_x0 is not None
    assert first is not None
    kept = Trace(*(tuple(part) for part in (*zip(*states, strict=True), drifts))) if trace else None
    return _ended(z.detach(), eps, residual, start, sigma / alpha, teacher_x0, first, kept)


@torch.no_grad()
def drift_at(
    teacher: Denoiser,
    student: Denoiser,
    x_t: Float[Tensor, "b *data"],
    t: Float[Tensor, " b"],
    condition: Condition | None,
) -> tuple[Float[Tensor, "b *data"], Prediction]:
    """Returns d = sigma (score of the teacher - score of the student), and the teacher's prediction.

    It is the difference of two outputs that come to be nearly equal: it is taken between the networks' own outputs,
    where x_t cancels, and in float32.

    Args:
        teacher: Denoiser of the teacher.
        student: Denoiser of the student score, on the same schedule.
        x_t: Noisy samples at the level of each row.
        t: Noise level of each row.
        condition: Keyword tensors of the backbones.
    """
    theirs = teacher(x_t, t, condition)
    return student(x_t, t, condition).noise_minus(theirs), theirs


def levels(
    denoiser: Denoiser, t: Float[Tensor, " b"], like: Float[Tensor, "b *data"]
) -> tuple[Float[Tensor, "b *ones"], Float[Tensor, "b *ones"]]:
    """Returns alpha and sigma of each row, in the shape and precision of samples.

    Args:
        denoiser: Denoiser whose schedule is meant.
        t: Noise level of each row.
        like: Samples or noise, one row for each level.
    """
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    ones = (-1, *[1] * (like.ndim - 1))
    return alpha.view(ones).to(like), sigma.view(ones).to(like)


@contextmanager
def frozen(network: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Gives a network whose parameters are constants inside: gradients reach its inputs alone, and no hook fires.

    Args:
        network: Any callable; the parameters of a module cease to require gradients until the end.
    """
    learning = [p for p in network.parameters() if p.requires_grad] if isinstance(network, nn.Module) else []
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _sampled(call: Generator, z: Tensor, condition: Condition | None, *, moves: bool) -> tuple[Tensor, Tensor]:
    """Returns z, and g(z) in the graph of z where z moves."""
    if not moves:
        with torch.no_grad():
            return z, call(z, condition)
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        return z, call(z, condition)


def _ended(
    z: Tensor,
    eps: Tensor,
    residual: Tensor,
    start: Tensor,
    ratio: Tensor,
    teacher_x0: Tensor,
    first: Tensor,
    trace: Trace | None,
) -> ChainResult:
    """Returns the result, in which rows that are not finite stand where they started, with nothing to learn."""
    finite = z.isfinite().flatten(1).all(1) & residual.isfinite().flatten(1).all(1) & eps.isfinite().flatten(1).all(1)
    kept, latent = (finite.view(-1, *[1] * (part.ndim - 1)) for part in (residual, z))
    residual = residual.where(kept, 0.0)
    return ChainResult(z.where(latent, start), eps, residual, ratio * residual, finite, teacher_x0, first, trace)


def _check(gamma_e: float, gamma_z: float, noise_cancel: str, num_steps: int, noise: ChainNoise | None) -> None:
    if noise_cancel not in get_args(NoiseCancel):
        raise ValueError(f"`noise_cancel` is {noise_cancel!r}; it must be one of {', '.join(get_args(NoiseCancel))}")
    if num_steps == 0:
        if noise_cancel == "last":
            raise ValueError("`noise_cancel` is 'last', but the chain has no step; take complete")
        return
    if not 0 <= gamma_e < 1 or (gamma_e == 0 and noise_cancel != "stein"):
        raise ValueError(f"`gamma_e` is {gamma_e}; it must lie between 0 and 1: at 0 the residual has nothing to learn")
    if not gamma_z >= 0:
        raise ValueError(f"`gamma_z` is {gamma_z}; it must be at least 0")
    if gamma_z > 0 and (noise is None or noise.z is None):
        raise ValueError("`noise` has no part for z, which moves with `gamma_z` above 0; draw it too")
