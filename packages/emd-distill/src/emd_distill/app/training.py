"""Training a generator into a run folder: what train and compare do with a model and settings."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch

from diffcore.cli import track
from diffcore.denoiser import Condition, Denoiser, GuidedDenoiser
from diffcore.errors import MachineError, UserError, printable
from diffcore.models import DiffusionModel
from diffcore.models.generation import null_condition
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.train import EMA, ConsoleSummary, fit
from diffcore.train.timesteps import TimeSampler
from emd_distill.app.memory import give_back_freed_memory
from emd_distill.app.options_training import TrainingOptions
from emd_distill.conditions import InTurn
from emd_distill.cost import passes, weight_megabytes
from emd_distill.distill import Settings, student_of
from emd_distill.files.generators import NAME, save_generator
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import LoraDenoiser
from emd_distill.losses import EMD
from emd_distill.module import DistillModule
from emd_distill.quality import (
    Features,
    Scores,
    drawn_images,
    features_for,
    image_shape,
    losing_modes,
    measured,
    teacher_images,
)
from emd_distill.warm_start import smaller, warm_start

_LOG = logging.getLogger("diffcore.emd_distill")
SHOWN = 20
"""Number of images of a sample grid."""
_ROWS = 64  # of one call of the network in a look


@dataclass(frozen=True, eq=False)
class Training:
    """A teacher with all that a training of a generator needs besides its loss.

    Attributes:
        model: The teacher, in float32.
        source: Name by which the teacher was loaded.
        table: All conditions that are learned, one row each; empty for a model without any.
        t: Level at which the generator calls its network.
        time_sampler: Distribution of noise levels.
        options: Options of the command line.
        runtime: Device, precision, seed and processes.
        shown: Conditions of the sample grid in place of the table's first ones.
        captions: Words below the grid.
        allow_pickle: Whether features of TorchScript, which is code, may be run.
    """

    model: DiffusionModel
    source: str
    table: Condition
    t: float
    time_sampler: TimeSampler
    options: TrainingOptions
    runtime: Runtime
    shown: Condition = field(default_factory=dict)
    captions: str = ""
    allow_pickle: bool = False

    @cached_property
    def uncond(self) -> Condition | None:
        """The condition that guidance leads away from; None without guidance.

        Raises:
            UserError: The teacher has none.
        """
        if self.options.guidance_scale in (0, 1):
            return None
        try:
            return {name: value.to(self.model.device) for name, value in null_condition(self.model).items()}
        except ValueError as error:
            raise UserError(
                f"{printable(self.model.name)} has no condition that guidance could lead away from; leave out "
                "`guidance_scale`"
            ) from error

    @property
    def teacher(self) -> Denoiser:
        """The teacher as a denoiser, with guidance inside where that is wanted."""
        plain = self.model.denoiser
        return GuidedDenoiser(plain, self.options.guidance_scale, self.uncond) if self.uncond else plain

    def generator(self) -> OneStepGenerator:
        """Returns a generator that learns: the teacher's weights, a LoRA on them, or a smaller network without any.

        Raises:
            UserError: The teacher cannot be called at the level, or its network cannot be made smaller.
        """
        plain, rank, width = self.model.denoiser, self.options.lora_rank, self.options.generator_width
        try:
            if rank:
                return OneStepGenerator(LoraDenoiser(plain, rank, seed=self.runtime.seed), self.t)
            if width < 1:
                small = smaller(plain, width, seed=self.runtime.seed).requires_grad_(True)
                return OneStepGenerator(small, self.t)
            return OneStepGenerator(copy.deepcopy(plain).requires_grad_(True), self.t)
        except (UserError, ValueError) as error:
            told = str(error).replace("`t`", "`timestep`").replace("`width`", "`generator_width`")
            raise UserError(told) from error

    def features(self) -> tuple[str, Features]:
        """Returns the name of the features in which samples are measured, and the function from images to them.

        Raises:
            UserError: There are no such features.
        """
        shape = image_shape(self.model)
        return features_for(shape, self.options.features, self.runtime, allow_pickle=self.allow_pickle)

    def rows(self, count: int, *, seen: bool = False) -> Condition:
        """Returns conditions of images, the table's in turn.

        Args:
            count: Number of images that need one.
            seen: Whether they are those of the sample grid.
        """
        table = self.shown if seen and self.shown else self.table
        if not table:
            return {}
        place = torch.arange(count, device=next(iter(table.values())).device)
        return {name: value[place % len(value)] for name, value in table.items()}

    def _told(self, learning: int) -> str:
        """Returns what the generator is, in words."""
        options = self.options
        if options.lora_rank:
            return f"LoRA of rank {options.lora_rank}, {learning:,} parameters"
        if options.generator_width == 1:
            return "whole network"
        warm = f"{options.warm_up_steps:,} steps of warming up"
        return f"{options.generator_width:g} of the teacher's channels, {learning:,} parameters, {warm}"

    def plan(self, settings: Settings) -> dict[str, Any]:
        """Returns what a training would cost, without running a network.

        Args:
            settings: Settings of the training.
        """
        network = self.model.denoiser
        count = sum(p.numel() for p in network.parameters())
        generator = self.generator()
        learning = sum(p.numel() for p in generator.parameters() if p.requires_grad)
        scored, drawn = (settings.batch_size * count for count in settings.accumulation)
        half, small = self.runtime.dtype == "bfloat16", self.options.generator_width < 1
        guided = self.uncond is not None
        loss = settings.loss
        starts = sorted(loss.num_steps) if isinstance(loss, EMD) and not isinstance(loss.num_steps, int) else [0]
        spent = [
            passes(
                loss, at, student_updates=settings.student_updates, guided=guided,
                student_guided=settings.student_guidance != 1, accumulation=settings.accumulation,
            )
            for at in starts
        ]  # fmt: skip
        return {
            "teacher": f"{type(self.model.backbone).__name__}, {count:,} parameters",
            "generator": self._told(learning),
            "conditions": self.captions,
            "level_of_the_generator": self.t,
            "iterations": settings.steps,
            "learning_rates": f"generator {settings.learning_rate:g}, student score {settings.student_learning_rate:g}",
            "rows_a_step": f"student score {scored:,}, generator {drawn:,}" if scored != drawn else drawn,
            **{
                f"forward_passes_an_iteration{f'_from_{at}' if len(starts) > 1 else ''}": one.total
                for at, one in zip(starts, spent, strict=True)
            },
            "of_these": f"teacher {spent[-1].teacher}, student score {spent[-1].student}, generator "
            f"{spent[-1].generator}, gradients to inputs {spent[-1].input_gradients}, gradients to weights "
            f"{spent[-1].weight_gradients} at two each",
            "megabytes_without_activations": round(
                weight_megabytes(
                    network, generator, student_of(network) if small else generator, teacher_bytes=2 if half else 4
                ),
                1,
            ),
            "megabytes_on_disk": round(learning * 4 * (2 * 3 + 2) / 1e6, 1),
            "looks_after_iterations": self.options.looks,
        }


class Looks(L.Callback):
    """Draws samples at fixed latents along the way, and measures them against the teacher's where there are any.

    Args:
        training: Teacher, conditions and options.
        ema: Average of the generator's weights.
        run: Run folder that keeps what was seen as parts `PREFIXlook-STEP`.
        prefix: Beginning of the names of parts.
    """

    def __init__(self, training: Training, ema: EMA, run: Run, prefix: str = "") -> None:
        self.training, self.ema, self.run, self.prefix = training, ema, run, prefix
        self._steps = frozenset(training.options.looks)
        self._seconds, self._begun = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Looks at the generator as it starts."""
        if pl_module.iteration == 0 and trainer.is_global_zero:
            self._look(0)
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks after the chosen iterations."""
        if pl_module.iteration in self._steps and trainer.is_global_zero:
            _ = float(outputs["loss"])  # waits for the device, whose work is timed
            self._seconds, self._begun = self._spent(), time.perf_counter()
            self._look(pl_module.iteration)
            self._begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds of training so far, for the checkpoint."""
        return {"seconds": self._spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the seconds of a checkpoint."""
        self._seconds = state_dict["seconds"]

    def _spent(self) -> float:
        return self._seconds + time.perf_counter() - self._begun

    @torch.no_grad()
    def _look(self, step: int) -> None:
        training = self.training
        watched = training.options.watch_recall
        shown = training.rows(SHOWN, seen=True)
        made = drawn_images(
            training.model, self.ema.average, shown, SHOWN, seed=training.runtime.seed, batch_size=_ROWS
        )
        scores = None
        if watched:
            images = drawn_images(
                training.model, self.ema.average, training.rows(watched), watched,
                seed=training.runtime.seed + 1, batch_size=_ROWS,
            )  # fmt: skip
            reference = self.run.load("reference").tensors["features"]
            scores = measured(reference, training.features()[1](images)).to_json()
        self.run.save(look_key(step, self.prefix), {"pictures": made}, step=step, scores=scores, seconds=self._seconds)
        if warning := losing_modes(scored(self.run, self.prefix)):
            _LOG.warning("%s", warning)


def look_key(step: int, prefix: str = "") -> str:
    """Returns the name of the part that holds what was seen after some iterations.

    Args:
        step: Number of finished iterations.
        prefix: Beginning of the name.
    """
    return f"{prefix}look-{step:08d}"


def looks_of(run: Run, prefix: str = "") -> list[Any]:
    """Returns what was seen along the way, in order.

    Args:
        run: Run folder of a training.
        prefix: Beginning of the names of parts.
    """
    keys = sorted(path.stem for path in (run.folder / "parts").glob(f"{prefix}look-*.json"))
    return [run.load(key) for key in keys]


def scored(run: Run, prefix: str = "") -> list[tuple[int, Scores]]:
    """Returns the iterations at which samples were measured, with their scores.

    Args:
        run: Run folder of a training.
        prefix: Beginning of the names of parts.
    """
    told = [look.fields for look in looks_of(run, prefix)]
    return [(one["step"], Scores(**one["scores"])) for one in told if one["scores"]]


def keep_reference(training: Training, run: Run) -> None:
    """Draws the teacher's samples that looks are measured against, where the run has none and some are wanted.

    Args:
        training: Teacher, conditions and options.
        run: Run folder that gets the part `reference`.
    """
    options = training.options
    if not options.watch_recall or run.has("reference") or not run.leading:
        return
    images = teacher_images(
        training.model, training.rows(options.watch_recall), options.watch_recall,
        seed=training.runtime.seed + 2, steps=options.teacher_steps, guidance_scale=options.guidance_scale,
        uncond=training.uncond, batch_size=_ROWS,
    )  # fmt: skip
    name, features = training.features()
    run.save("reference", {"features": features(images), "pictures": images[:SHOWN]}, features=name)


def warm_up(training: Training, generator: OneStepGenerator, settings: Settings, run: Run) -> None:
    """Brings a generator with random weights to what the teacher draws in one call, once in a run.

    Args:
        training: Teacher, conditions and options.
        generator: Generator that learns, in place.
        settings: Batch size and seed.
        run: Run folder that keeps the weights as part `warm-up`, which all trainings of a comparison start from.
    """
    backbone: Any = generator.denoiser.backbone
    if not run.has("warm-up"):
        start, steps = OneStepGenerator(training.model.denoiser, training.t), training.options.warm_up_steps
        table, bar = training.table, iter(track(range(steps), "warming up"))
        losses = warm_start(
            generator, start, training.model.shape, steps=steps, batch_size=settings.batch_size,
            learning_rate=training.options.warm_up_learning_rate, seed=settings.seed,
            conditions=InTurn(table, settings.batch_size, settings.seed) if table else None,
            on_step=lambda step: next(bar, None),
        )  # fmt: skip
        next(bar, None)
        if not losses.isfinite().all():
            raise MachineError("warming up did not stay finite; give a smaller `warm_up_learning_rate`")
        if run.leading:
            run.save("warm-up", dict(backbone.state_dict()), losses=losses.tolist())
    else:
        backbone.load_state_dict(run.load("warm-up").tensors)


def train_generator(
    training: Training,
    settings: Settings,
    run: Run,
    *,
    folder: Path | None = None,
    prefix: str = "",
    facts: dict[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> dict[str, Any]:
    """Trains a generator, keeps what is seen along the way, and writes its averaged weights as folder `generator`.

    A training that was interrupted goes on from its last checkpoint.

    Args:
        training: Teacher, conditions and options.
        settings: Loss, steps and learning rates.
        run: Run folder that keeps what is seen along the way.
        folder: Folder of checkpoints, log and generator; by default that of the run.
        prefix: Beginning of the names of parts.
        facts: Plain values that the generator's folder repeats.
        callbacks: Further callbacks of the trainer.

    Returns:
        The number of iterations, and what was measured at the last one.

    Raises:
        MachineError: The training stopped early, or its loss or many of its chains were not finite.
    """
    folder = folder or run.folder
    folder.mkdir(parents=True, exist_ok=True)
    if training.model.device.type == "cpu":
        give_back_freed_memory()
    generator = training.generator()
    if training.options.generator_width < 1:
        warm_up(training, generator, settings, run)
    teacher = training.teacher
    student = student_of(teacher, generator)
    if training.runtime.dtype == "bfloat16":  # in place where LoRA share the weights, of which there is one copy
        teacher = (teacher if training.options.lora_rank else copy.deepcopy(teacher)).to(torch.bfloat16)
    largest = settings.batch_size * max(settings.accumulation)
    conditions = InTurn(training.table, largest, settings.seed) if training.table else None
    module = DistillModule(
        teacher, generator, training.model.shape, settings,
        student=student, time_sampler=training.time_sampler, conditions=conditions,
    )  # fmt: skip
    ema = EMA(settings.ema, network="generator")
    options = training.options
    fit(
        module,
        steps=settings.steps,
        folder=folder,
        runtime=training.runtime,
        callbacks=[
            ema, *callbacks, Looks(training, ema, run, prefix), ConsoleSummary("distilling", ("drift", "finite")),
        ],
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        gradient_clip=settings.clip,
    )  # fmt: skip
    if module.iteration < module.num_iterations:
        raise MachineError("the training stopped before its last iteration; run the same command again to go on")
    if run.leading:
        save_generator(
            folder / NAME / NAME, ema.average, model=training.model, source=training.source, training=asdict(settings),
            iterations=module.iteration, noise_level_edges=module.edges, **(facts or {}),
        )  # fmt: skip
    seen = scored(run, prefix)
    return {"iterations": module.iteration, "edges": module.edges} | ({"scores": seen[-1][1].to_json()} if seen else {})
