"""Training with Lightning: `distill`'s iteration with two optimizers, on any number of processes, that can be resumed.

An iteration is the one of `distill`, from the same functions and draws: on one process both leave the same weights, bit
for bit on a CPU. Rows are those of the whole batch, so that processes share the work of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffcore.denoiser import Denoiser
from diffcore.errors import UserError
from diffcore.train.iteration import Descent, IterationModule
from diffcore.train.timesteps import TimeSampler
from emd_distill.distill import (
    DEFAULTS,
    Conditions,
    Draws,
    Iteration,
    Settings,
    Watch,
    check_levels,
    guided_student,
    student_of,
)
from emd_distill.losses import GeneratorLoss
from emd_distill.noise_levels import noise_levels

BINS = 5
"""Number of bins of noise levels in which the drift is logged, each with an equal share of the draws."""
_SUMS = ("loss_g", "loss_phi", "z_move", "finite", "grad_norm_g", "grad_norm_phi", "iterations")
_STUDENT, _GENERATOR = 0, 1  # places of the optimizers


class DistillModule(IterationModule):
    """Trains a one-step generator and its student score, for `diffcore.train.fit`.

    It draws its own batches, so `fit` needs no data; clip gradients by the `gradient_clip` of `fit`, and average the
    generator by `EMA(settings.ema, network="generator")`. Logged are means over the iterations between two log lines:
    `loss_g`, `loss_phi`, `grad_norm_g` and `grad_norm_phi` (norms of the gradients before they are clipped, of the
    student score's last update), `z_move` (root mean square distance that latents moved), `finite` (share of rows whose
    chain stayed finite) and `drift_1` to `drift_5`, the root mean square of the drift in bins of rising noise levels:
    how far the generator's samples are from the teacher's, which the losses do not tell.

    Args:
        teacher: Denoiser of the teacher, with guidance inside where that is wanted. It is no part of checkpoints.
        generator: Network (z, condition) to samples, trained in place.
        shape: Shape of one latent z.
        settings: Loss, batch size over all processes, learning rates and seed; `steps`, `clip` and `ema` are for the
            caller of `fit`.
        data_shape: Shape of one sample, where it differs from that of a latent.
        student: Denoiser that learns the score of the generator's samples; by default a copy of the teacher,
            or a LoRA on it where the generator is one.
        time_sampler: Distribution of noise levels p(t), rising; by default log-normal in the teacher's range.
        conditions: Conditions of each iteration; None for a model without any.

    Raises:
        UserError: There is no student, and the teacher is no plain network; or the noise levels do not suit the loss.

    Example:
        >>> import copy, tempfile
        >>> from pathlib import Path
        >>> from diffcore.runtime import Runtime
        >>> from diffcore.testing import tiny
        >>> from diffcore.train import EMA, fit
        >>> from emd_distill.generator import OneStepGenerator
        >>> from emd_distill.losses import EMD
        >>> model = tiny.model("unet2d")
        >>> generator = OneStepGenerator(copy.deepcopy(model.denoiser).requires_grad_(True), 2.5)
        >>> few = Settings(loss=EMD(num_steps=1), steps=2, batch_size=2)
        >>> classes = lambda step, rows: {"class_labels": rows % 10}
        >>> module = DistillModule(model.denoiser, generator, model.shape, few, conditions=classes)
        >>> ema = EMA(few.ema, network="generator")
        >>> folder, cpu = Path(tempfile.mkdtemp()), Runtime(device="cpu")
        >>> fit(module, steps=few.steps, folder=folder, runtime=cpu, callbacks=[ema], gradient_clip=few.clip)
        True
        >>> module.iteration, type(ema.average).__name__
        (2, 'OneStepGenerator')
    """

    def __init__(
        self,
        teacher: Denoiser,
        generator: nn.Module,
        shape: Sequence[int],
        settings: Settings = DEFAULTS,
        *,
        data_shape: Sequence[int] | None = None,
        student: Denoiser | None = None,
        time_sampler: TimeSampler | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        time_sampler = time_sampler or noise_levels(teacher.schedule)
        check_levels(teacher, time_sampler, settings.loss)
        self.student, self.generator = student or student_of(teacher, generator), generator
        self._teacher: tuple[Denoiser] = (teacher.eval(),)  # in a tuple, it enters neither checkpoints nor DDP
        self.settings = settings
        scored, uncond = guided_student(self.student, teacher, settings.student_guidance)
        self._scored: tuple[Denoiser] = (scored,)  # the student under guidance has no weights of its own
        self.draws = Draws(
            settings.seed, tuple(shape), time_sampler, conditions, tuple(data_shape) if data_shape else None, uncond,
            settings.null_share,
        )  # fmt: skip
        self._edges = time_sampler(torch.arange(1, BINS) / BINS).sort().values
        self._window = _empty()
        self._watch = Watch(self._gathered)

    @property
    def teacher(self) -> Denoiser:
        """The teacher, on the device of the training."""
        return self._teacher[0]

    @property
    def edges(self) -> list[float]:
        """Noise levels between the bins of the drift, rising."""
        return self._edges.tolist()

    def configure_optimizers(self) -> Any:
        """Returns the optimizers of student score and generator."""
        rates = (self.student, self.settings.student_learning_rate), (self.generator, self.settings.learning_rate)
        return [
            torch.optim.Adam([p for p in network.parameters() if p.requires_grad], rate, self.settings.betas)
            for network, rate in rates
        ]

    def setup(self, stage: str) -> None:
        """Refuses what cannot be trained.

        Args:
            stage: Name of what the trainer is about to do.

        Raises:
            UserError: The precision is float16, or the batch does not divide over the processes.
        """
        if str(self.trainer.precision).startswith("16"):
            raise UserError(
                "float16 makes the difference of two scores overflow or vanish, and the training diverge; take "
                "`dtype` bfloat16 or float32"
            )
        if self.settings.batch_size % self.trainer.world_size:
            raise UserError(
                f"`batch_size` is {self.settings.batch_size}, which does not divide over {self.trainer.world_size} "
                "processes"
            )

    def on_train_start(self) -> None:
        """Moves what is no part of the module to its device, and makes the generator a function of its latent."""
        self.teacher.to(self.device)
        self._edges, self._window = self._edges.to(self.device), self._window.to(self.device)
        self.generator.eval()  # no dropout, no statistics of a batch; the student is so outside of its own loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Updates the student score, then the generator, and returns the generator's loss.

        Args:
            batch: Nothing: all draws are functions of seed, iteration and row.
            batch_idx: Number of the batch, which is not used.
        """
        iteration = Iteration(
            self.generator, self.teacher, self.student, self._scored[0], self.draws, self.settings, self.iteration,
            self._rows(),
        )  # fmt: skip
        steps = [
            self.step_optimizer(_STUDENT, iteration.student_losses(update))
            for update in reversed(range(self.settings.student_updates))
        ]
        steps.append(self.step_optimizer(_GENERATOR, iteration.generator_losses()))
        told = iteration.told
        self._watch(self.iteration, told.finite, iteration.t)
        drift, finite = self._note(told, steps[-2:], iteration.t)
        return {"loss": told.loss.detach(), "drift": drift, "finite": finite}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the sums since the last log line beside the number of iterations.

        Args:
            checkpoint: Content of the file, which is added to.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["window"] = self._window.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the number of iterations, and the sums since the last log line.

        Args:
            checkpoint: Content of the file.
        """
        super().on_load_checkpoint(checkpoint)
        # With several processes each goes on with the sums of the first: their mean is taken in the end.
        self._window = checkpoint["window"]

    def _gathered(self, own: Tensor) -> Tensor:
        """Returns a tensor of each process along a new first dimension."""
        found: Any = self.all_gather(own)
        return found.view(-1, *own.shape)

    def _rows(self) -> Tensor:
        """Returns the rows of the whole batch that this process holds: equal shares, in order of rank."""
        share = self.settings.batch_size // self.trainer.world_size
        return self.global_rank * share + torch.arange(share, device=self.device)

    def _note(self, told: GeneratorLoss, steps: Sequence[Descent], t: Tensor) -> tuple[Tensor, Tensor]:
        """Adds an iteration to the sums, logs them where a line is due, and returns drift and share of finite rows."""
        squares = told.drift.float().flatten(1).square().mean(1)
        known = told.finite & squares.isfinite()
        squares, moved = squares.where(known, 0.0), told.moved.float().where(known, 0.0)
        finite, count = told.finite.float().mean(), known.sum().clamp(min=1)
        sums = [
            *(one.loss.float() for one in reversed(steps)), moved.sum() / count, finite,
            *(one.gradient_norm.float() for one in reversed(steps)), torch.ones_like(finite),
        ]  # fmt: skip
        self._window = self._window + torch.cat([torch.stack(sums), *self._binned(squares, known, t)]).double()
        if (self.iteration + 1) % self.trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            self.log_dict(means(self._gathered(self._window).sum(0)))
            self._window = torch.zeros_like(self._window)
        return (squares.sum() / count).sqrt(), finite

    def _binned(
        self, squares: Float[Tensor, " b"], known: Bool[Tensor, " b"], t: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"]]:
        place = torch.bucketize(t.to(self._edges), self._edges, right=True)
        among = (place[:, None] == torch.arange(BINS, device=t.device)) & known[:, None]
        return (squares[:, None] * among).sum(0), among.sum(0).float()


def means(sums: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """Returns what is logged, from sums over iterations and rows.

    Args:
        sums: Sums of the logged values, then squares and counts of the bins.
    """
    values, squares, counts = sums.split([len(_SUMS), BINS, BINS])
    told = {name: value / values[-1] for name, value in zip(_SUMS[:-1], values[:-1], strict=True)}
    drift = {f"drift_{place + 1}": part for place, part in enumerate((squares / counts).sqrt())}
    return {**told, **drift, "drift": (squares.sum() / counts.sum()).sqrt()}


def _empty() -> Tensor:
    return torch.zeros(len(_SUMS) + 2 * BINS, dtype=torch.float64)
