"""The options of train and compare."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

import diffcore.cli
from diffcore.cli import Flag, LoadingAny
from diffcore.errors import UserError, printable

if TYPE_CHECKING:
    from diffcore.denoiser import NoiseSchedule
    from diffcore.train.timesteps import TimeSampler
    from emd_distill.losses import EMD, Loss

ModelName = Annotated[str, Parameter(help="Teacher: pipeline folder, backbone folder, safetensors file, or zoo:NAME.")]
LossName = Literal["emd", "diff-instruct", "dmd", "sid"]
LOSS_NAMES: tuple[LossName, ...] = ("emd", "diff-instruct", "dmd", "sid")
_DEFAULT_SIGMA = 2.5  # sigma / alpha at which a teacher is called once; SiD's
_PRESETS: Mapping[str, Mapping[str, float]] = {
    "safe": {"gamma_z": 1.6e-5, "kappa": 0.25, "learning_rate": 2e-6, "student_learning_rate": 1e-5, "ema": 0.999},
    "paper": {"gamma_z": 1.6e-5, "kappa": 0.0, "learning_rate": 2e-6, "student_learning_rate": 1e-5, "ema": 0.999},
    "toy": {"gamma_z": 0.05, "kappa": 0.25, "learning_rate": 3e-4, "student_learning_rate": 1e-3, "ema": 0.998},
}
_LORA_RATES = {"learning_rate": 1e-4, "student_learning_rate": 5e-4}  # 1e-4 as in diffusers' scripts, student as above
PresetName = Literal["safe", "paper", "toy"]


@Parameter(name="*")
@dataclass(frozen=True)
class Work(diffcore.cli.Work):
    """The options of every command that computes with a model.

    Attributes:
        loading: Options that say how the model is read.
    """

    script = "emd-distill"
    loading: LoadingAny = field(default_factory=LoadingAny)


@Parameter(name="*", group="Chain", negative="")
@dataclass(frozen=True)
class ChainOptions:
    """The chains of EM Distillation, and how their displacements are weighted.

    Attributes:
        preset: Defaults of step sizes, learning rates and average. safe: steps of z that shrink at low noise; paper: of
            one size at all levels; toy: large ones, for small networks.
        num_langevin_steps: Number K of steps, or a schedule such as 0:1,1000:8, each K from its iteration on; by
            default 8. 0 is Diff-Instruct.
        gamma_e: Step size of the noise.
        gamma_z: Step size of the latent; 0 moves the noise alone, at half of the cost.
        kappa: Variance of the samples, for steps of z that shrink at low noise; 0 for one size.
        noise_cancel: Part of the injected noise that targets are freed of.
        weighting: Weight of the noise levels.
        normalize_drift: Divide by 1 - (1 - gamma_e)^K, so that learning rates carry over between K.
    """

    preset: PresetName = "safe"
    num_langevin_steps: str | None = None
    gamma_e: float = 0.16
    gamma_z: float | None = None
    kappa: float | None = None
    noise_cancel: Literal["none", "last", "complete", "stein"] = "complete"
    weighting: Literal["x0", "eps", "likelihood", "dmd", "snr_cap"] = "x0"
    normalize_drift: Flag = False

    def loss(self, name: LossName) -> "Loss":
        """Returns the loss of a name.

        Args:
            name: Name of the loss on the command line.

        Raises:
            UserError: An option is out of its range, or says nothing to the loss.
        """
        from emd_distill.losses import LOSSES, diff_instruct

        if name != "emd" and self.num_langevin_steps is not None:
            raise UserError(f"`num_langevin_steps` says nothing to the loss {name}, which has no chain; leave it out")
        if name == "diff-instruct":
            return diff_instruct(self.weighting)
        return self.emd() if name == "emd" else LOSSES[name]()

    def emd(self) -> "EMD":
        """Returns EM Distillation with these chains.

        Raises:
            UserError: An option is out of its range.
        """
        from emd_distill.losses import EMD

        preset = _PRESETS[self.preset]
        try:
            return EMD(
                num_steps=steps_of(self.num_langevin_steps or "8"),
                gamma_e=self.gamma_e,
                gamma_z=preset["gamma_z"] if self.gamma_z is None else self.gamma_z,
                kappa=preset["kappa"] if self.kappa is None else self.kappa,
                noise_cancel=self.noise_cancel,
                weighting=self.weighting,
                normalize=self.normalize_drift,
            )
        except ValueError as error:
            raise UserError(str(error).replace("`num_steps`", "`num_langevin_steps`")) from error


@Parameter(name="*", group="Noise levels", negative="")
@dataclass(frozen=True)
class LevelOptions:
    """The noise levels of chains and student score, and the one at which the generator calls its network.

    Attributes:
        levels: Distribution of sigma / alpha; "uniform" is uniform over the schedule's own times.
        mean: Mean of ln sigma, for lognormal.
        std: Standard deviation of ln sigma, for lognormal.
        low: Smallest sigma / alpha; by default the teacher's.
        high: Largest sigma / alpha; by default the teacher's.
        timestep: Level of the generator in the units of the teacher: a timestep, or EDM's sigma; by default that where
            sigma / alpha is 2.5.
        log_snr: Level of the generator as log(alpha^2 / sigma^2), in place of a timestep; -6 is the paper's example.
    """

    levels: Literal["lognormal", "karras", "sid", "uniform", "loguniform"] = "lognormal"
    mean: float = -1.2
    std: float = 1.2
    low: float | None = None
    high: float | None = None
    timestep: float | None = None
    log_snr: float | None = None

    def sampler(self, schedule: "NoiseSchedule") -> "TimeSampler":
        """Returns the distribution of noise levels.

        Args:
            schedule: Schedule of the teacher.

        Raises:
            UserError: The range is empty.
        """
        from emd_distill.noise_levels import noise_levels

        if not self.std > 0:
            raise UserError(f"`std` is {self.std}; it must be positive")
        try:
            return noise_levels(schedule, self.levels, mean=self.mean, std=self.std, low=self.low, high=self.high)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def level(self, schedule: "NoiseSchedule") -> float:
        """Returns the level of the generator in the units of a schedule.

        Args:
            schedule: Schedule of the teacher.

        Raises:
            UserError: Both forms of the level are given.
        """
        from emd_distill.generator import level_of

        if self.timestep is not None and self.log_snr is not None:
            raise UserError("`timestep` and `log_snr` both say at which level the generator works; give one of them")
        if self.timestep is not None:
            return self.timestep
        return level_of(schedule, -2 * math.log(_DEFAULT_SIGMA) if self.log_snr is None else self.log_snr)


@Parameter(name="*", group="Training", negative="")
@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast the generator learns, and how it is watched.

    Attributes:
        steps: Number of iterations, each with one update of the generator.
        batch_size: Number of rows of an iteration, over all processes.
        learning_rate: Learning rate of the generator; by default the preset's, or 1e-4 for a LoRA under the presets
            safe and paper.
        student_learning_rate: Learning rate of the student score; by default the preset's, or 5e-4 for a LoRA.
        student_updates: Number of updates of the student score in an iteration; DMD2 takes 5 to 10.
        gradient_accumulation_steps: Number of batches whose gradients add up to one step of the generator.
        student_accumulation_steps: The same for the student score; by default the generator's.
        student_guidance: Guidance scale of the student score inside chains; 1 is off (DMD2), others need a guided
            teacher.
        gradient_clip: Largest norm of each network's gradient, a LoRA's too; 0 clips nothing.
        ema: Decay of the average of the generator's weights, of both factors of a LoRA; by default the preset's.
        lora_rank: Rank of generator and student score as LoRA on one copy of the teacher's weights; 0 trains whole
            networks.
        generator_width: Share of the teacher's channels that the generator has; 1 starts from the teacher's weights,
            less is a smaller U-Net with random weights, which is warmed up first.
        warm_up_steps: Number of steps in which a smaller generator is regressed to the teacher in one call.
        warm_up_learning_rate: Learning rate of these steps.
        guidance_scale: Strength of the teacher's classifier-free guidance, which the generator learns; 1 is off.
        checkpoint_every: Number of iterations between checkpoints.
        log_every: Number of iterations between log lines.
        num_looks: Number of sample grids, at fixed latents, of which the last is the finished generator's.
        watch_recall: Number of samples of the teacher against which each look measures precision, recall and coverage,
            for a warning while modes are lost; 0 measures nothing.
        teacher_steps: Number of solver steps of these samples; by default 18 for EDM networks and 50 for others.
        features: Features of these measures: pixels, or an extractor such as random:0 or dino:FOLDER; by default
            pixels for images up to 32 x 32 and random:0 for larger ones.
    """

    steps: int = 10_000
    batch_size: int = 16
    learning_rate: float | None = None
    student_learning_rate: float | None = None
    student_updates: int = 1
    gradient_accumulation_steps: int = 1
    student_accumulation_steps: int | None = None
    student_guidance: float = 1.0
    gradient_clip: float = 1.0
    ema: float | None = None
    lora_rank: int = 0
    generator_width: float = 1.0
    warm_up_steps: int = 1000
    warm_up_learning_rate: float = 3e-4
    guidance_scale: float = 1.0
    checkpoint_every: int = 500
    log_every: int = 50
    num_looks: int = 6
    watch_recall: int = 0
    teacher_steps: int | None = None
    features: str | None = None

    def settings(self, loss: "Loss", preset: PresetName, seed: int) -> Any:
        """Returns the settings that the library takes.

        Args:
            loss: Loss of the generator.
            preset: Preset that numbers come from where they are not given.
            seed: Seed of the command line.

        Raises:
            UserError: A number is out of its range.
        """
        from emd_distill.distill import Settings
        from emd_distill.quality import LEAST

        if self.watch_recall and self.watch_recall < LEAST:
            raise UserError(f"`watch_recall` is {self.watch_recall}; five neighbours need at least {LEAST} samples")
        for name in ("checkpoint_every", "log_every", "num_looks"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; give at least 1")
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise UserError(f"`teacher_steps` is {self.teacher_steps}; give at least 1")
        if self.lora_rank < 0:
            raise UserError(f"`lora_rank` is {self.lora_rank}; give 0 or more")
        if not 0 < self.generator_width <= 1:
            raise UserError(f"`generator_width` is {self.generator_width}; give a share above 0, up to 1")
        if self.generator_width < 1 and self.lora_rank:
            raise UserError("`generator_width` and `lora_rank` are two ways to a small training; give one of them")
        if self.warm_up_steps < 1:
            raise UserError(f"`warm_up_steps` is {self.warm_up_steps}; give at least 1")
        if not self.warm_up_learning_rate > 0:
            raise UserError(f"`warm_up_learning_rate` is {self.warm_up_learning_rate}; it must be positive")
        if not self.gradient_clip >= 0:
            raise UserError(f"`gradient_clip` is {self.gradient_clip}; give 0 or more")
        defaults = {**_PRESETS[preset], **(_LORA_RATES if self.lora_rank and preset != "toy" else {})}

        def number(name: str) -> float:
            return defaults[name] if getattr(self, name) is None else getattr(self, name)

        try:
            return Settings(
                loss=loss,
                steps=self.steps,
                batch_size=self.batch_size,
                student_updates=self.student_updates,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
                student_accumulation_steps=self.student_accumulation_steps,
                student_guidance=self.student_guidance,
                clip=self.gradient_clip or None,
                seed=seed,
                learning_rate=number("learning_rate"),
                student_learning_rate=number("student_learning_rate"),
                ema=number("ema"),
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def looks(self) -> list[int]:
        """Numbers of finished iterations after which samples are drawn, rising."""
        count = min(self.num_looks, self.steps)
        return sorted({round(self.steps * (place + 1) / count) for place in range(count)})


def steps_of(text: str) -> int | dict[int, int]:
    """Returns the number of Langevin steps, or its schedule, that a text stands for.

    Args:
        text: A number, or pairs ITERATION:K with commas between them.

    Raises:
        UserError: The text is neither.

    Example:
        >>> steps_of("8"), steps_of("0:1,1000:8")
        (8, {0: 1, 1000: 8})
    """
    try:
        if ":" not in text:
            return int(text)
        pairs = [part.split(":") for part in text.split(",")]
        schedule = {int(start): int(count) for start, count in pairs}
        if len(schedule) < len(pairs):
            raise ValueError("an iteration is given twice")
        return schedule
    except ValueError as error:
        raise UserError(
            f"`num_langevin_steps` is {printable(text)!r}; give a number, or a schedule such as 0:1,1000:8"
        ) from error
