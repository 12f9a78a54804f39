"""EM Distillation on a page: a teacher becomes a one-step generator (paper, algorithm 1; specification, section 10).

    repeat
        c ~ conditions;  t ~ p(t);  z, eps ~ N(0, I)
        student score:   one step down the denoising loss on x_t = alpha g(z) + sigma eps
        E-step:          K Langevin steps move (eps, z) from the generator towards the teacher
        M-step:          one step of g down 1/2 mean |g(z_K) - constant(g(z_K) + omega(t) u)|^2
        average of g's weights

No data are needed, only conditions. All draws are functions of seed, iteration and row.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffcore.denoiser import Condition, Denoiser, NetworkDenoiser
from diffcore.errors import MachineError, UserError
from diffcore.noise import philox_normal, philox_uniform
from diffcore.train.timesteps import TimeSampler
from emd_distill.chain import ChainNoise, Generator
from emd_distill.lora import LoraDenoiser, learnable, lora_of
from emd_distill.losses import EMD, GeneratorLoss, Loss, Situation
from emd_distill.noise_levels import noise_levels

# Streams of the counter-based generator: each kind of draw has its own, so that K changes no other draw.
_TIME, _Z, _EPS, _CHAIN_EPS, _CHAIN_Z, CONDITION = range(6)
_UPDATES = 64  # streams kept apart for each further update of the student score in one iteration
_LEAST_ALPHA = 1e-3
_STUDENT_SEED = 1  # of a student that is a LoRA, apart from the generator's

Conditions = Callable[[int, Int[Tensor, " b"]], Condition]
"""Conditions of an iteration: (iteration, rows) to keyword tensors of the backbone, one row for each row."""


@dataclass(frozen=True)
class Settings:
    """How a generator is trained; the defaults are for networks of Stable Diffusion's kind.

    Attributes:
        loss: Loss of the generator.
        steps: Number of iterations, each with one step of the generator.
        batch_size: Number of rows of an iteration, over all processes.
        learning_rate: Learning rate of the generator.
        student_learning_rate: Learning rate of the student score.
        betas: Decay rates of Adam's two moments, for both networks.
        student_updates: Number of updates of the student score in an iteration, all but the last one on draws of their
            own.
        clip: Largest norm of each network's gradient; None clips nothing.
        ema: Decay of the average of the generator's weights; after iteration s at most (1 + s) / (10 + s).
        seed: Seed of all draws.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> Settings(loss=EMD(num_steps=4, gamma_z=0.0), steps=1000).student_updates
        1
    """

    loss: Loss = field(default_factory=EMD)
    steps: int = 10_000
    batch_size: int = 16
    learning_rate: float = 2e-6
    student_learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.99)
    student_updates: int = 1
    clip: float | None = 1.0
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "student_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1")
        for name in ("learning_rate", "student_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive")
        if not 0 <= self.ema < 1:
            raise ValueError(f"`ema` is {self.ema}; it must lie in [0, 1)")


DEFAULTS = Settings()
"""Settings for networks of Stable Diffusion's kind."""


@dataclass(frozen=True, eq=False)
class Distilled:
    """A distilled generator.

    Attributes:
        generator: Generator with averaged weights, in evaluation mode: (z, condition) to samples.
        student: Student score at the end, from which training can go on.
        drift: Root mean square of the drift d in each iteration: how far student and teacher are apart.
        dropped: Number of rows in each iteration whose chain did not stay finite.
    """

    generator: nn.Module
    student: nn.Module
    drift: Float[Tensor, " steps"]
    dropped: Int[Tensor, " steps"]


def distill(
    teacher: Denoiser,
    generator: nn.Module,
    shape: Sequence[int],
    settings: Settings = DEFAULTS,
    *,
    student: Denoiser | None = None,
    time_sampler: TimeSampler | None = None,
    conditions: Conditions | None = None,
    on_step: Callable[[int, GeneratorLoss, nn.Module], None] | None = None,
) -> Distilled:
    """Trains a one-step generator to draw what a teacher draws in many steps.

    Args:
        teacher: Denoiser of the teacher, with guidance inside where that is wanted; its weights stay as they are.
        generator: Network (z, condition) to samples, trained in place; see `OneStepGenerator` for one from the teacher.
            Of a network of which some weights require gradients, these are trained; else all are, and of a
            `LoraDenoiser` its LoRA.
        shape: Shape of one latent z, which for a generator from the teacher is that of a sample.
        settings: Loss, steps, learning rates and seed.
        student: Denoiser that learns the score of the generator's samples, trained in place, on the teacher's schedule;
            by default a copy of the teacher without its guidance, or a LoRA on it where the generator is one.
        time_sampler: Distribution of noise levels p(t); by default log-normal in the teacher's range.
        conditions: Conditions of each iteration; None for a model without any.
        on_step: Called after each iteration with its number, what the loss tells, and the generator with averaged
            weights.

    Raises:
        UserError: There is no student, and the teacher is no plain network; or the noise levels do not suit the loss.
        MachineError: More than a tenth of the chains of 100 iterations did not stay finite.

    Example:
        >>> from diffcore.denoiser import DiscreteSchedule
        >>> from diffcore.testing import tiny
        >>> from emd_distill.generator import OneStepGenerator
        >>> model = tiny.model("unet2d")
        >>> generator = OneStepGenerator(copy.deepcopy(model.denoiser).requires_grad_(True), 900)
        >>> classes = lambda step, rows: {"class_labels": rows % 10}
        >>> few = Settings(loss=EMD(num_steps=1), steps=2, batch_size=2)
        >>> done = distill(model.denoiser, generator, model.shape, few, conditions=classes)
        >>> done.generator(torch.zeros(1, *model.shape), {"class_labels": torch.tensor([3])}).shape[0]
        1
    """
    student = student or student_of(teacher, generator)
    time_sampler = time_sampler or noise_levels(teacher.schedule)
    check_levels(teacher, time_sampler, settings.loss)
    if not any(part.requires_grad for part in generator.parameters()):
        for part in learnable(generator):
            part.requires_grad_(True)  # loaded models come with weights that do not learn
    teacher.eval()
    generator.eval()  # g must be a function of z: no dropout, no statistics of a batch
    optimizers = [
        torch.optim.Adam([p for p in network.parameters() if p.requires_grad], rate, settings.betas)
        for network, rate in ((student, settings.student_learning_rate), (generator, settings.learning_rate))
    ]
    average = copy.deepcopy(generator).requires_grad_(False).eval()
    own, others = learnable(average), learnable(generator)
    device = next(generator.parameters()).device
    rows = torch.arange(settings.batch_size, device=device)
    draws = Draws(settings.seed, tuple(shape), time_sampler, conditions)
    watch, drifts, dropped = Watch(), [], []
    for step in range(settings.steps):
        for update in range(settings.student_updates - 1, 0, -1):
            more, x0 = sampled(generator, draws, step, rows, update)
            _descend(student, optimizers[0], student_loss(student, x0, more), settings.clip)
        drawn, x0 = sampled(generator, draws, step, rows)
        _descend(student, optimizers[0], student_loss(student, x0, drawn), settings.clip)
        told = settings.loss(situation(generator, teacher, student, x0, drawn, draws, step, rows))
        _descend(generator, optimizers[1], told.loss, settings.clip)
        decay = min(settings.ema, (1 + step + 1) / (10 + step + 1))
        with torch.no_grad():
            torch._foreach_lerp_(own, others, 1 - decay)
        drifts.append(told.drift.square().mean().sqrt())
        dropped.append((~told.finite).sum())
        watch(step, told.finite, drawn.t)
        if on_step is not None:
            on_step(step, told, average)
    return Distilled(average, student, torch.stack(drifts).cpu(), torch.stack(dropped).cpu())


@dataclass(frozen=True)
class Drawn:
    """The draws of one iteration.

    Attributes:
        z: Latents of the rows, standard normal.
        eps: Noise in the shape of samples, standard normal.
        t: Noise level of each row.
        condition: Keyword tensors of the backbones.
    """

    z: Float[Tensor, "b *latent"]
    eps: Float[Tensor, "b *data"]
    t: Float[Tensor, " b"]
    condition: Condition | None


@dataclass(frozen=True)
class Draws:
    """All random numbers, as functions of seed, iteration and row: nothing else need be stored to go on.

    Attributes:
        seed: Seed that the user chose.
        shape: Shape of one latent.
        time_sampler: Distribution of noise levels.
        conditions: Conditions of each iteration; None for a model without any.
        data_shape: Shape of one sample, where it differs from that of a latent.
    """

    seed: int
    shape: tuple[int, ...]
    time_sampler: TimeSampler
    conditions: Conditions | None = None
    data_shape: tuple[int, ...] | None = None

    def __call__(self, step: int, rows: Int[Tensor, " b"], update: int = 0) -> Drawn:
        """Returns the draws of an iteration.

        Args:
            step: Number of finished iterations.
            rows: Places of the rows in the whole batch.
            update: Number of student updates that follow in the iteration; 0 for the last, which the chain shares.
        """

        def normal(stream: int, shape: tuple[int, ...]) -> Tensor:
            return philox_normal(self.seed, rows, shape, step=step, stream=stream + _UPDATES * update)

        u = philox_uniform(self.seed, rows, (), step=step, stream=_TIME + _UPDATES * update)
        condition = None if self.conditions is None else self.conditions(step + update * 2**20, rows)
        return Drawn(
            normal(_Z, self.shape), normal(_EPS, self.data_shape or self.shape), self.time_sampler(u), condition
        )

    def chain(self, step: int, rows: Int[Tensor, " b"], count: int, moves: bool) -> ChainNoise:
        """Returns the noise of a chain; more steps change none of the first ones' noise.

        Args:
            step: Number of finished iterations.
            rows: Places of the rows in the whole batch.
            count: Number of Langevin steps.
            moves: Whether z moves along the chain.
        """
        data = self.data_shape or self.shape
        eps = philox_normal(self.seed, rows, (count, *data), step=step, stream=_CHAIN_EPS)
        z = philox_normal(self.seed, rows, (count, *self.shape), step=step, stream=_CHAIN_Z) if moves else None
        return ChainNoise(eps, z)


def sampled(
    generator: Generator, draws: Draws, step: int, rows: Int[Tensor, " b"], update: int = 0
) -> tuple[Drawn, Float[Tensor, "b *data"]]:
    """Returns the draws of an iteration and the generator's samples for them, without gradient.

    Args:
        generator: Generator with its present weights.
        draws: Random numbers of the whole training.
        step: Number of finished iterations.
        rows: Places of the rows in the whole batch.
        update: Number of student updates that follow in the iteration.
    """
    drawn = draws(step, rows, update)
    with torch.no_grad():
        return drawn, generator(drawn.z, drawn.condition)


def student_loss(student: Denoiser, x0: Float[Tensor, "b *data"], drawn: Drawn) -> Float[Tensor, ""]:
    """Returns the denoising loss of the student score on the generator's samples, in its own parameterisation.

    For EDM networks the mean square in the space of the output is EDM's own weighting (specification, section 6).

    Args:
        student: Denoiser that learns the score.
        x0: Samples of the generator, without gradient.
        drawn: Noise, levels and conditions of the iteration.
    """
    student.train()  # for this loss alone: chains need the same network at each step
    prediction = student(student.schedule.add_noise(x0, drawn.eps, drawn.t), drawn.t, drawn.condition)
    student.eval()
    squares = (prediction.output.float() - prediction.target(x0, drawn.eps)).square().flatten(1).mean(1)
    finite = squares.detach().isfinite()
    return squares.where(finite, 0.0).sum() / finite.sum().clamp(min=1)


def situation(
    generator: Generator,
    teacher: Denoiser,
    student: Denoiser,
    x0: Float[Tensor, "b *data"],
    drawn: Drawn,
    draws: Draws,
    step: int,
    rows: Int[Tensor, " b"],
) -> Situation:
    """Returns what a loss of the generator is computed from.

    Args:
        generator: Generator whose parameters learn.
        teacher: Denoiser of the teacher.
        student: Student score after its update.
        x0: Samples of the latents, which the student has just learned from.
        drawn: Draws that they came from.
        draws: Random numbers of the whole training.
        step: Number of finished iterations.
        rows: Places of the rows in the whole batch.
    """
    return Situation(
        generator,
        teacher,
        student,
        drawn.z,
        x0,
        drawn.eps,
        drawn.t,
        drawn.condition,
        lambda count, moves: draws.chain(step, rows, count, moves),
        step,
    )


def student_of(teacher: Denoiser, generator: nn.Module | None = None) -> Denoiser:
    """Returns a student score that starts as the teacher, where that is a plain network.

    It is a copy that can learn, or a LoRA on the teacher's own weights where the generator is one on them.

    Args:
        teacher: Denoiser of the teacher.
        generator: Generator that it will be trained with.

    Raises:
        UserError: The teacher is no plain network, so that it is not known what the student should be.
    """
    plain = getattr(teacher, "denoiser", teacher)  # guidance is not the student's
    if not isinstance(plain, NetworkDenoiser):
        raise UserError(f"a {type(plain).__name__} has no weights for a student to start from; give `student`")
    lora = None if generator is None else lora_of(generator)
    if lora is not None and lora.teacher is plain:
        return LoraDenoiser(plain, lora.rank, alpha=lora.alpha, targets=lora.targets, seed=_STUDENT_SEED)
    return copy.deepcopy(plain).requires_grad_(True)


def check_levels(teacher: Denoiser, time_sampler: TimeSampler, loss: Loss) -> None:
    """Checks that all noise levels hold enough signal for a displacement of clean samples.

    Args:
        teacher: Denoiser of the teacher.
        time_sampler: Distribution of noise levels.
        loss: Loss of the generator.

    Raises:
        UserError: At some levels x0 cannot be told, and the loss weighs all alike.
    """
    if not isinstance(loss, EMD) or loss.weighting not in ("x0", "dmd"):
        return
    ends = torch.tensor([1e-4, 0.5, 1 - 1e-4])
    alpha, sigma = teacher.schedule.alpha_sigma(time_sampler(ends))
    if float(alpha.min()) < _LEAST_ALPHA:
        raise UserError(
            f"noise levels reach sigma / alpha = {float((sigma / alpha).max()):.3g}, where displacements of clean "
            "samples explode; give a smaller `high`, or take the weighting 'eps'"
        )


class Watch:
    """Ends a training in which many chains do not stay finite; looks at the device once in 100 iterations.

    Args:
        gather: Collects a tensor from all processes along a new first dimension, so that all end together.
    """

    EVERY, SHARE = 100, 0.1

    def __init__(self, gather: Callable[[Tensor], Tensor] = lambda own: own[None]) -> None:
        self._bad: list[Tensor] = []
        self._gather = gather

    def __call__(self, step: int, finite: Tensor, t: Tensor) -> None:
        """Notes the rows of an iteration.

        Args:
            step: Number of finished iterations.
            finite: Rows whose chain stayed finite.
            t: Noise level of each row.

        Raises:
            MachineError: More than a tenth of the rows since the last look were lost.
        """
        self._bad.append(torch.stack([(~finite).float().mean(), t.where(~finite, torch.nan).nanmean()]))
        if (step + 1) % self.EVERY:
            return
        share, level = self._gather(torch.stack(self._bad).nanmean(0)).nanmean(0).tolist()
        self._bad = []
        if share > self.SHARE:
            raise MachineError(
                f"{share:.0%} of the chains of the last {self.EVERY} iterations did not stay finite, at levels around "
                f"t = {level:.3g}; take a smaller `gamma_z`, or `kappa` about the variance of the samples"
            )


def _descend(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float | None) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
