"""EM Distillation on a page: a teacher becomes a one-step generator (paper, algorithm 1).

    repeat
        c ~ conditions;  t ~ p(t);  z, eps ~ N(0, I)
        student score:   one step down the denoising loss on x_t = alpha g(z) + sigma eps
        E-step:          K Langevin steps move (eps, z) from the generator towards the teacher
        M-step:          one step of g down 1/2 mean |g(z_K) - constant(g(z_K) + omega(t) u)|^2
        average of g's weights

No data are needed, only conditions. All draws are functions of seed, iteration and row.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffcore.denoiser import Condition, Denoiser, GuidedDenoiser, NetworkDenoiser
from diffcore.errors import MachineError, UserError
from diffcore.train.timesteps import TimeSampler
from emd_distill.chain import Generator
from emd_distill.draws import Conditions, Drawn, Draws
from emd_distill.lora import LoraDenoiser, learnable, lora_of
from emd_distill.losses import EMD, OF_SAMPLES, GeneratorLoss, Loss, Situation
from emd_distill.noise_levels import noise_levels

_LEAST_ALPHA = 1e-3
_STUDENT_SEED = 1  # of a student that is a LoRA, apart from the generator's


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
        gradient_accumulation_steps: Number of batches whose gradients add up to one step of the generator.
        student_accumulation_steps: The same for the student score; None takes the generator's. All of its batches come
            before the first of the generator's.
        student_guidance: Guidance scale of the student score inside chains; 1 is off (DMD2). Others need a guided
            teacher, whose unconditional input is taken (SiD-LSG guides both).
        null_share: Share of rows on which a guided student score learns without their condition.
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
    gradient_accumulation_steps: int = 1
    student_accumulation_steps: int | None = None
    student_guidance: float = 1.0
    null_share: float = 0.1
    clip: float | None = 1.0
    ema: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "student_updates", "gradient_accumulation_steps", "student_accumulation_steps")
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1")
        if not math.isfinite(self.student_guidance):
            raise ValueError(f"`student_guidance` is {self.student_guidance}; give a finite number")
        if not 0 <= self.null_share < 1:
            raise ValueError(f"`null_share` is {self.null_share}; it must lie in [0, 1)")
        for name in ("learning_rate", "student_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive")
        if not 0 <= self.ema < 1:
            raise ValueError(f"`ema` is {self.ema}; it must lie in [0, 1)")

    @property
    def accumulation(self) -> tuple[int, int]:
        """Numbers of batches in one step of the student score and of the generator."""
        own = self.gradient_accumulation_steps
        return self.student_accumulation_steps or own, own


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
    data_shape: Sequence[int] | None = None,
    student: Denoiser | None = None,
    time_sampler: TimeSampler | None = None,
    conditions: Conditions | None = None,
    on_step: Callable[[int, GeneratorLoss, nn.Module], None] | None = None,
) -> Distilled:
    """Trains a one-step generator to draw what a teacher draws in many steps.

    Args:
        teacher: Denoiser of the teacher, with guidance inside where that is wanted; its weights stay as they are.
        generator: Network (z, condition) to samples, trained in place; see `OneStepGenerator` for one from the teacher,
            `warm_start` for any other.
            Of a network of which some weights require gradients, these are trained; else all are, and of a
            `LoraDenoiser` its LoRA.
        shape: Shape of one latent z, which for a generator from the teacher is that of a sample.
        settings: Loss, steps, learning rates and seed.
        data_shape: Shape of one sample, where it differs from that of a latent.
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
    scored, uncond = guided_student(student, teacher, settings.student_guidance)
    draws = Draws(
        settings.seed, tuple(shape), time_sampler, conditions, tuple(data_shape) if data_shape else None, uncond,
        settings.null_share,
    )  # fmt: skip
    watch, drifts, dropped = Watch(), [], []
    for step in range(settings.steps):
        iteration = Iteration(generator, teacher, student, scored, draws, settings, step, rows)
        for update in reversed(range(settings.student_updates)):
            _descend(student, optimizers[0], iteration.student_losses(update), settings.clip)
        _descend(generator, optimizers[1], iteration.generator_losses(), settings.clip)
        told = iteration.told
        decay = min(settings.ema, (1 + step + 1) / (10 + step + 1))
        with torch.no_grad():
            torch._foreach_lerp_(own, others, 1 - decay)
        drifts.append(told.drift.square().mean().sqrt())
        dropped.append((~told.finite).sum())
        watch(step, told.finite, iteration.t)
        if on_step is not None:
            on_step(step, told, average)
    return Distilled(average, student, torch.stack(drifts).cpu(), torch.stack(dropped).cpu())


class Iteration:
    """The losses of one iteration, batch by batch, in the order in which they are to be descended.

    Args:
        generator: Generator whose parameters learn.
        teacher: Denoiser of the teacher.
        student: Denoiser that learns the score of the generator's samples.
        scored: The student score as chains see it, with guidance inside where that is wanted.
        draws: Random numbers of the whole training.
        settings: Loss of the generator, batch size and numbers of batches.
        step: Number of finished iterations.
        rows: Places of the first batch's rows that this process holds.
    """

    def __init__(
        self,
        generator: nn.Module,
        teacher: Denoiser,
        student: Denoiser,
        scored: Denoiser,
        draws: Draws,
        settings: Settings,
        step: int,
        rows: Int[Tensor, " b"],
    ) -> None:
        self.generator, self.teacher, self.student, self.scored = generator, teacher, student, scored
        self.draws, self.settings, self.step, self.rows = draws, settings, step, rows
        self._shared: list[tuple[Drawn, Tensor]] = []
        self._told: list[GeneratorLoss] = []

    def student_losses(self, update: int = 0) -> Iterator[Float[Tensor, ""]]:
        """Yields the losses of an update of the student score, whose gradients add up.

        Args:
            update: Number of student updates that follow in the iteration; the last one's samples are the chains'.
        """
        count, _ = self.settings.accumulation
        for place in range(count):
            drawn, x0 = self._sampled(place, update)
            if update == 0:
                self._shared.append((drawn, x0))
            yield student_loss(self.student, x0, drawn) / count

    def generator_losses(self) -> Iterator[Float[Tensor, ""]]:
        """Yields the losses of the generator, whose gradients add up."""
        _, count = self.settings.accumulation
        for place in range(count):
            if place == len(self._shared):
                self._shared.append(self._sampled(place))
            drawn, x0 = self._shared[place]
            rows = self._rows(place)
            told = self.settings.loss(
                situation(self.generator, self.teacher, self.scored, x0, drawn, self.draws, self.step, rows)
            )
            self._told.append(told)
            yield told.loss / count

    @property
    def told(self) -> GeneratorLoss:
        """What the generator's losses have told, over all of its batches."""
        if len(self._told) == 1:
            return self._told[0]
        loss = torch.stack([told.loss.detach() for told in self._told]).mean()
        rows = (torch.cat([getattr(told, name) for told in self._told]) for name in ("finite", "drift", "moved"))
        return GeneratorLoss(loss, *rows)

    @property
    def t(self) -> Float[Tensor, " b"]:
        """Noise levels of the rows in `told`."""
        return torch.cat([drawn.t for drawn, _ in self._shared[: len(self._told)]])

    def _rows(self, place: int) -> Tensor:
        return self.rows + place * self.settings.batch_size

    def _sampled(self, place: int, update: int = 0) -> tuple[Drawn, Tensor]:
        return sampled(self.generator, self.draws, self.step, self._rows(place), update)


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
        x0 = generator(drawn.z, drawn.condition)
    return drawn, x0.float() if x0.dtype.itemsize < 4 else x0  # networks may compute in bfloat16, chains do not


def student_loss(student: Denoiser, x0: Float[Tensor, "b *data"], drawn: Drawn) -> Float[Tensor, ""]:
    """Returns the denoising loss of the student score on the generator's samples, in its own parameterisation.

    For EDM networks the mean square in the space of the output is EDM's own weighting.

    Args:
        student: Denoiser that learns the score.
        x0: Samples of the generator, without gradient.
        drawn: Noise, levels and conditions of the iteration.
    """
    student.train()  # for this loss alone: chains need the same network at each step
    prediction = student(student.schedule.add_noise(x0, drawn.eps, drawn.t), drawn.t, drawn.student_condition)
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
    if lora is not None and lora.base is plain:
        return LoraDenoiser(plain, lora.rank, alpha=lora.alpha, targets=lora.targets, seed=_STUDENT_SEED)
    return copy.deepcopy(plain).requires_grad_(True)


def guided_student(student: Denoiser, teacher: Denoiser, scale: float) -> tuple[Denoiser, Condition | None]:
    """Returns the student score as chains see it, and the unconditional input of its guidance.

    Args:
        student: Denoiser that learns the score of the generator's samples.
        teacher: Denoiser of the teacher.
        scale: Guidance scale of the student score; 1 is off.

    Raises:
        UserError: The student should be guided and the teacher is not, so that nothing is known to lead away from.
    """
    if scale == 1:
        return student, None
    if not isinstance(teacher, GuidedDenoiser) or not teacher.uncond:
        raise UserError(
            f"`student_guidance` is {scale:g}, and the teacher has no guidance whose unconditional input could be "
            "taken; guide the teacher too, or leave it out"
        )
    return GuidedDenoiser(student, scale, teacher.uncond), teacher.uncond


def check_levels(teacher: Denoiser, time_sampler: TimeSampler, loss: Loss) -> None:
    """Checks that all noise levels hold enough signal for a displacement of clean samples.

    Args:
        teacher: Denoiser of the teacher.
        time_sampler: Distribution of noise levels.
        loss: Loss of the generator.

    Raises:
        UserError: At some levels x0 cannot be told, and the loss weighs all alike.
    """
    if not isinstance(loss, EMD) or loss.weighting not in OF_SAMPLES:
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


def _descend(
    network: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], clip: float | None
) -> None:
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
