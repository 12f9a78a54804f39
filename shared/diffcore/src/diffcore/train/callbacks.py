"""What one watches and keeps while training: progress, sample grids, snapshots."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffcore.denoiser import sample
from diffcore.run import Run
from diffcore.train.ema import EMA

logger = logging.getLogger(__name__)


class Snapshots(L.Callback):
    """Keeps the averaged weights at chosen steps as parts `snapshot-STEP` of the run.

    Args:
        run: The run folder.
        ema: Whose weights are kept.
        steps: When.
        batch_size: Samples per step over all ranks; written beside the weights as `samples_seen`.
    """

    def __init__(self, run: Run, ema: EMA, steps: Collection[int], batch_size: int) -> None:
        self.run, self.ema, self.steps, self.batch_size = run, ema, frozenset(steps), batch_size

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves the weights if the step is one of the chosen."""
        step = trainer.global_step
        if step in self.steps and trainer.is_global_zero and self.ema.denoiser is not None:
            weights = self.ema.denoiser.backbone.state_dict()
            self.run.save(snapshot_key(step), weights, step=step, samples_seen=step * self.batch_size)


def snapshot_key(step: int) -> str:
    """Returns the name of the part that holds the weights after `step` steps."""
    return f"snapshot-{step:08d}"


def _from_symmetric(x0: Tensor) -> Tensor:
    return ((x0 + 1) / 2).clamp(0, 1)


class SampleGrid(L.Callback):
    """Draws a grid from the averaged weights every so many steps, always from the same noise.

    Args:
        run: The run folder; the grid becomes its figure `samples`.
        ema: Whose weights are sampled.
        noise: Unit normal noise, one row a picture (b *data).
        condition: Keyword tensors of the backbone, first dimension b.
        decode: From x0 to images in [0, 1]; by default pixels in [-1, 1] are expected.
        clip_x0: As in `denoiser.sample`.
        every: Steps between grids.
        sampling_steps: Solver steps.
    """

    def __init__(
        self,
        run: Run,
        ema: EMA,
        noise: Tensor,
        condition: Mapping[str, Tensor] | None = None,
        *,
        decode: Callable[[Tensor], Tensor] = _from_symmetric,
        clip_x0: float | None = None,
        every: int = 1000,
        sampling_steps: int = 20,
    ) -> None:
        self.run, self.ema, self.noise, self.every, self.sampling_steps = run, ema, noise, every, sampling_steps
        self.condition, self.decode, self.clip_x0 = dict(condition or {}), decode, clip_x0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes the figure on rank 0."""
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        if not trainer.is_global_zero or self.ema.denoiser is None:
            return
        from diffcore.report import image_grid

        device = pl_module.device
        condition = {name: value.to(device) for name, value in self.condition.items()}
        noise = self.noise.to(device)
        x0 = sample(self.ema.denoiser, noise, condition, steps=self.sampling_steps, clip_x0=self.clip_x0)
        images = self.decode(x0).cpu()
        self.run.figure("samples", image_grid(images))


class ConsoleSummary(L.Callback):
    """Shows step, loss, speed and remaining time: a bar on a terminal, elsewhere a line every 30 seconds.

    Args:
        description: Stands before the bar.
    """

    def __init__(self, description: str = "training") -> None:
        self.description = description
        self._progress: Progress | None = None
        self._start, self._first_step, self._last_line = 0.0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Opens the bar at the step where the run stands."""
        self._start = self._last_line = time.monotonic()
        self._first_step = trainer.global_step
        console = Console(stderr=True)
        if trainer.is_global_zero and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._progress.add_task(self.description, total=trainer.max_steps, completed=trainer.global_step, note="")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the bar; asks the device for the loss only when a line is due."""
        now, step = time.monotonic(), trainer.global_step
        due = now - self._last_line > (0.5 if self._progress else 30)
        if not trainer.is_global_zero or not due:
            return
        self._last_line = now
        speed = (step - self._first_step) / (now - self._start)
        note = f"loss {float(outputs['loss']):.4f}, {speed:.1f} steps/s"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, note=note)
        else:
            logger.info("%s: step %d of %d, %s", self.description, step, trainer.max_steps, note)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Fills and closes the bar."""
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=trainer.global_step)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the terminal in order."""
        self._close()

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
