"""Checks before training: does the teacher start a sane generator, and do settings fit its schedule and the machine?

Each check is a function of its own that returns a frozen result; `doctor` commands and tests call them one by one.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffcore.denoiser import Condition, DiscreteSchedule, NetworkDenoiser, NoiseSchedule, PredictionType
from diffcore.noise import philox_normal
from emd_distill.chain import Generator, frozen
from emd_distill.generator import OneStepGenerator, level_of
from emd_distill.lora import LoraDenoiser, learnable
from emd_distill.losses import OF_SAMPLES, Weighting
from emd_distill.noise_levels import trained_range

LAMBDAS = (0.0, -2.0, -4.0, -6.0, -8.0, -10.0)
"""Log signal-to-noise ratios at which the start is looked at; the paper shows 0, -6 and -10."""
_SEED = 17
_LEAST_ALPHA = 1e-3
_GIBI = 2**30


@dataclass(frozen=True, eq=False)
class Start:
    """What the teacher draws in one step at one level, before any training.

    Attributes:
        log_snr: Log signal-to-noise ratio lambda* of the level that was taken.
        t: That level in the units of the schedule.
        samples: Samples of the generator at iteration 0.
        spread: Standard deviation of the samples over rows, mean over numbers.
    """

    log_snr: float
    t: float
    samples: Float[Tensor, "n *data"]
    spread: float


@torch.no_grad()
def starts(
    teacher: NetworkDenoiser,
    shape: tuple[int, ...],
    condition: Condition | None = None,
    *,
    lambdas: Sequence[float] = LAMBDAS,
    count: int = 8,
) -> tuple[Start, ...]:
    """Returns the samples of iteration 0 at a sweep of levels.

    At a high lambda* they keep much of the latent's noise, at a low one all come near to the mean of the data. Levels
    beyond the schedule are brought to its ends, and those that fall together are looked at once.

    Args:
        teacher: Denoiser that generators start from.
        shape: Shape of one sample.
        condition: Keyword tensors of the backbone, one row for each sample.
        lambdas: Log signal-to-noise ratios to look at.
        count: Number of samples; all levels see the same latents.

    Example:
        >>> from emd_distill.digits import SHAPE, load_teacher
        >>> given = {"class_labels": torch.full((8,), 3)}
        >>> found = starts(load_teacher(), SHAPE, given, lambdas=(0.0, -6.0))
        >>> found[0].spread > found[1].spread
        True
    """
    z, seen, found = philox_normal(_SEED, torch.arange(count), shape), set[float](), list[Start]()
    z = z.to(next(teacher.parameters()).device)
    low, high = trained_range(teacher.schedule)
    for wanted in lambdas:
        ratio = min(max(float(torch.tensor(-wanted / 2).exp()), low), high)
        t = level_of(teacher.schedule, float(-2 * torch.tensor(ratio).log()))
        if t in seen:
            continue
        seen.add(t)
        x = OneStepGenerator(teacher, t)(z, condition)
        log_snr = float(teacher.schedule.log_snr(torch.tensor([t], dtype=torch.float64))[0])
        found.append(Start(log_snr + 0.0, t, x, float(x.std(0).mean())))
    return tuple(found)


@dataclass(frozen=True)
class PredictionCheck:
    """Which prediction type a network's outputs agree with.

    Attributes:
        stated: Type that the teacher's files state.
        errors: Mean squared error of denoised samples under each type, in units of their variance; geometric mean over
            noise levels.
        best: Type with the smallest error.
        matches: Whether the stated type is the best, or at most 1.01 times as bad.
    """

    stated: str
    errors: dict[str, float]
    best: str
    matches: bool


@torch.no_grad()
def check_prediction_type(
    teacher: NetworkDenoiser,
    x0: Float[Tensor, "n *data"],
    condition: Condition | None = None,
    *,
    ratios: Sequence[float] = (0.2, 1.0, 4.0),
) -> PredictionCheck:
    """Finds a wrong prediction type by denoising samples under each type (a v teacher taken for epsilon collapses).

    Args:
        teacher: Denoiser of the teacher, with the type that its files state.
        x0: Clean data, or samples that are known to be good; the teacher's own samples under a wrong type are not.
        condition: Keyword tensors of the backbone, one row for each sample.
        ratios: Noise over signal of the noise that is added; at low noise alone, types are hard to tell apart.

    Example:
        >>> from diffcore.zoo.digits.data import load_digits
        >>> from emd_distill.digits import load_teacher
        >>> images, labels = load_digits()
        >>> check_prediction_type(load_teacher(), 2 * images[:64] - 1, {"class_labels": labels[:64]}).matches
        True
    """
    schedule = teacher.schedule
    noise = philox_normal(_SEED, torch.arange(len(x0), device=x0.device), tuple(x0.shape[1:]))
    noisy = []
    for ratio in ratios:
        t = schedule.timestep_at(-2 * torch.tensor([ratio]).log()).float().expand(len(x0)).to(x0.device)
        noisy.append((schedule.add_noise(x0, noise, t), t))
    kinds: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")
    if teacher.prediction_type not in kinds:
        kinds = (*kinds, teacher.prediction_type)
    variance = float(x0.var()) or 1.0
    errors = {}
    for kind in kinds:
        other = NetworkDenoiser(teacher.backbone, schedule, kind, sigma_data=teacher.sigma_data, call=teacher.call)
        squares = [(other(x, t, condition).x0 - x0).square().mean() / variance for x, t in noisy]
        errors[kind] = float(torch.stack(squares).log().mean().exp())
    best = min(errors, key=lambda kind: errors[kind])
    return PredictionCheck(
        teacher.prediction_type, errors, best, errors[teacher.prediction_type] <= 1.01 * errors[best]
    )


def schedule_problems(
    schedule: NoiseSchedule,
    prediction_type: str,
    *,
    t: float | int,
    high: float | None = None,
    weighting: Weighting = "x0",
) -> tuple[str, ...]:
    """Returns what is wrong with a schedule for distillation, in words; nothing where all is well.

    Args:
        schedule: Schedule of the teacher.
        prediction_type: Quantity that the teacher predicts.
        t: Level at which the generator will be called.
        high: Largest sigma / alpha of the noise levels that are trained on; by default the teacher's.
        weighting: Weight of the noise levels in the loss, see `EMD`.

    Example:
        >>> schedule_problems(DiscreteSchedule(), "epsilon", t=999)
        ()
    """
    found = list[str]()
    ends = trained_range(schedule)
    alpha, sigma = (float(level[0]) for level in schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64)))
    zero = isinstance(schedule, DiscreteSchedule) and schedule.rescale_betas_zero_snr
    if zero and prediction_type == "epsilon":
        found.append(
            "the schedule ends at pure noise, where a network that predicts epsilon says nothing about x0: the "
            "teacher's scheduler or prediction type is stated wrongly"
        )
    if alpha < _LEAST_ALPHA and prediction_type == "epsilon":
        found.append(
            f"the generator's level t = {t:g} has alpha = {alpha:.2g}, where x0 = (x - sigma eps) / alpha is lost"
        )
    top = ends[1] if high is None else min(high, ends[1])
    if weighting in OF_SAMPLES and 1 / (1 + top**2) ** 0.5 < _LEAST_ALPHA:
        found.append(
            f"noise levels reach sigma / alpha = {top:.3g}, where displacements of clean samples explode; train up to "
            "100 or less, or with the weighting eps"
        )
    if sigma < alpha:
        found.append(
            f"the generator's level t = {t:g} has more signal than noise (sigma / alpha = {sigma / alpha:.2g}): pure "
            "noise is no plausible input there"
        )
    return tuple(found)


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes, counted and measured.

    Attributes:
        weights: Bytes of the teacher's weights.
        trained: Bytes of generator and student score in float32, or of their LoRA, with gradients and both moments of
            Adam.
        average: Bytes of the averaged generator.
        activations_per_row: Bytes that one row keeps between the forward and the backward pass, in the M-step.
        chain_per_row: Bytes that one row's noise and states take in a chain of K steps.
        total: Bytes of all that at the batch size.
    """

    weights: int
    trained: int
    average: int
    activations_per_row: int
    chain_per_row: int
    total: int

    @property
    def gibibytes(self) -> float:
        """The total in GiB."""
        return self.total / _GIBI


def memory_estimate(
    teacher: NetworkDenoiser,
    shape: tuple[int, ...],
    condition: Condition | None = None,
    *,
    num_steps: int,
    batch_size: int,
    gamma_z: bool = True,
    lora_rank: int = 0,
) -> Memory:
    """Returns the memory that training takes: parameters are counted, activations of one forward pass are measured.

    With P parameters of w bytes in the teacher, L that learn in the generator (P, or those of its LoRA), A bytes of
    activations for a row, D numbers in a sample:

        total = P w + 2 * 16 L + 4 L + batch (A + K (1 or 2) 4 D + 8 * 4 D)

    16 bytes are weight, gradient and Adam's two moments in float32, for generator and student score; 4 L is for the
    average. A is what autograd saves in one pass with gradients, of which there is one at a time: the student's loss,
    the vector-Jacobian product of a chain step, or the M-step. The chain keeps noise for K steps, for eps and for z
    where it moves; its calls of teacher and student keep nothing. What the allocator wastes comes on top: a few percent
    where glibc gives freed blocks back, as it does under `emd-distill train`, and up to 40 % where it is left alone
    (the environment variable MALLOC_MMAP_THRESHOLD_=1048576 has the same effect).

    Args:
        teacher: Denoiser of the teacher.
        shape: Shape of one sample.
        condition: Keyword tensors of the backbone, at least one row.
        num_steps: Number K of Langevin steps.
        batch_size: Number of rows in a batch.
        gamma_z: Whether the latents move.
        lora_rank: Rank of generator and student score as LoRA on the teacher's weights; 0 for whole networks.

    Raises:
        ValueError: A number is out of its range.
    """
    if num_steps < 0 or batch_size < 1:
        raise ValueError(f"`num_steps` is {num_steps}, `batch_size` {batch_size}; give at least 0 and 1")
    parameters = list(teacher.parameters())
    network = LoraDenoiser(teacher, lora_rank) if lora_rank else copy.deepcopy(teacher).requires_grad_(True)
    count = sum(part.numel() for part in learnable(network))
    held = {part.untyped_storage().data_ptr() for part in network.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    z = philox_normal(_SEED, torch.arange(1), shape).to(parameters[0].device)
    given = None if condition is None else {key: value[:1] for key, value in condition.items()}
    _, high = trained_range(teacher.schedule)
    t = level_of(teacher.schedule, -2 * float(torch.tensor(min(high, 2.5)).log()))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = OneStepGenerator(network, t)(z, given)  # alive until its tensors are counted, or addresses come again
    activations = sum(saved.values()) + out.untyped_storage().nbytes()
    numbers = z[0].numel()
    chain = num_steps * (2 if gamma_z else 1) * 4 * numbers + 8 * 4 * numbers
    weights = sum(part.numel() * part.element_size() for part in parameters)
    total = weights + 2 * 16 * count + 4 * count + batch_size * (activations + chain)
    return Memory(weights, 2 * 16 * count, 4 * count, activations, chain, total)


@dataclass(frozen=True)
class StepLimit:
    """How large a step of the latents may be at one noise level.

    Attributes:
        ratio: Noise over signal sigma / alpha of the level.
        jacobian: Largest singular value of the generator's Jacobian, the largest over the latents.
        constant: Largest stable gamma_z where it is the same at all levels (kappa = 0).
        levelled: Largest stable gamma_z with the step gamma_z sigma^2 / (sigma^2 + kappa alpha^2).
    """

    ratio: float
    jacobian: float
    constant: float
    levelled: float


def largest_steps(
    generator: Generator,
    schedule: NoiseSchedule,
    z: Float[Tensor, "n *latent"],
    condition: Condition | None = None,
    *,
    ratios: Sequence[float],
    kappa: float = 0.25,
    iterations: int = 20,
) -> tuple[StepLimit, ...]:
    """Returns the largest stable gamma_z at each noise level, by power iteration on J^T J.

    Where teacher and student differ much, the drift of z is -z - (alpha / sigma)^2 J^T J z and less, so that its
    Lipschitz constant is at most 1 + (alpha / sigma)^2 |J|^2, and a step must
    be below 2 over that. Products with J are taken as the derivative of v -> J^T v, so that any network will do.

    Args:
        generator: One-step generator to look at.
        schedule: Schedule of the teacher.
        z: Latents at which the Jacobian is looked at; the worst one counts.
        condition: Keyword tensors of the backbones.
        ratios: Noise over signal of the levels.
        kappa: Variance of the samples in the level-dependent step.
        iterations: Number of power iterations.

    Raises:
        ValueError: A ratio is not positive.

    Example:
        >>> found = largest_steps(lambda z, c: 3 * z, DiscreteSchedule(), torch.randn(4, 2), ratios=[1.0])
        >>> round(found[0].jacobian, 3), round(found[0].constant, 3)
        (3.0, 0.2)
    """
    if any(not ratio > 0 for ratio in ratios):
        raise ValueError(f"`ratios` are {list(ratios)}; they must be positive")
    norm = jacobian_norm(generator, z, condition, iterations=iterations)
    found = []
    for ratio in ratios:
        constant = 2 / (1 + norm**2 / ratio**2)
        found.append(StepLimit(ratio, norm, constant, constant * (ratio**2 + kappa) / ratio**2))
    return tuple(found)


def jacobian_norm(
    generator: Generator, z: Float[Tensor, "n *latent"], condition: Condition | None = None, *, iterations: int = 20
) -> float:
    """Returns the largest singular value of a generator's Jacobian over latents, each by its own power iteration.

    Args:
        generator: One-step generator to look at.
        z: Latents at which it is looked at.
        condition: Keyword tensors of the backbones.
        iterations: Number of power iterations.
    """
    ones = (-1, *[1] * (z.ndim - 1))

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.flatten(1).norm(dim=1)
        return x / size.clamp(min=1e-30).view(ones), size

    # Fused attention has no second derivative.
    with frozen(generator) as call, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        z = z.detach().requires_grad_()
        y = call(z, condition)
        probe = torch.zeros_like(y, requires_grad=True)
        (back,) = torch.autograd.grad(y, z, probe, create_graph=True)  # J^T probe, linear in probe
        direction, size = unit(philox_normal(_SEED, torch.arange(len(z), device=z.device), tuple(z.shape[1:])).to(z))
        for _ in range(iterations):
            (forward,) = torch.autograd.grad(back, probe, direction, retain_graph=True)  # J direction
            (again,) = torch.autograd.grad(y, z, forward, retain_graph=True)  # J^T J direction
            direction, size = unit(again)
    return float(size.sqrt().max())
