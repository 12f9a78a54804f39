"""Callbacks for progress, sample grids and snapshots of a training."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffcore.run import Run
from diffcore.train.ema import EMA

logger = logging.getLogger(__name__)


class Snapshots(L.Callback):
    """Keeps the averaged weights after chosen iterations as parts `snapshot-STEP` of the run.

    Args:
        run: Run folder that receives the parts.
        ema: Average whose weights are kept.
        steps: Numbers of finished iterations at which to keep them.
        batch_size: Samples per iteration over all ranks; written beside the weights as `samples_seen`.
        part: Name of the sub-module of the average to keep; the whole of it if empty.
    """

    def __init__(self, run: Run, ema: EMA, steps: Collection[int], batch_size: int, *, part: str = "") -> None:
        self.run, self.ema, self.steps, self.batch_size, self.part = run, ema, frozenset(steps), batch_size, part

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves the weights if the iteration is one of the chosen."""
        step = pl_module.iteration
        if step in self.steps and trainer.is_global_zero:
            weights = self.ema.average.get_submodule(self.part).state_dict()
            self.run.save(snapshot_key(step), weights, step=step, samples_seen=step * self.batch_size)


def snapshot_key(step: int) -> str:
    """Returns the name of the part that holds the weights after `step` iterations."""
    return f"snapshot-{step:08d}"


class SampleGrid(L.Callback):
    """Generates images with the averaged network every so many iterations, and after the last one.

    Args:
        run: Run folder in which the grid becomes the figure `samples`.
        ema: Average that generates the images.
        generate: Turns the averaged network and its device into images in [0, 1] (b c h w), from the same noise each
            time, so that grids can be compared.
        every: Number of iterations between grids.
    """

    def __init__(
        self, run: Run, ema: EMA, generate: Callable[[Any, torch.device], Tensor], *, every: int = 1000
    ) -> None:
        self.run, self.ema, self.generate, self.every = run, ema, generate, every

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes the figure on rank 0."""
        step = pl_module.iteration
        if not trainer.is_global_zero or (step % self.every and step != pl_module.num_iterations):
            return
        from diffcore.report import image_grid

        images = self.generate(self.ema.average, pl_module.device)
        self.run.figure("samples", image_grid(images.cpu()))


class ConsoleSummary(L.Callback):
    """Shows iteration, loss, speed and remaining time: a bar on a terminal, elsewhere a line every 30 seconds.

    Args:
        description: Words that stand before the bar.
        shown: Names of the values that are shown, of those that `training_step` returns.
    """

    def __init__(self, description: str = "training", shown: Sequence[str] = ("loss",)) -> None:
        self.description, self.shown = description, shown
        self._progress: Progress | None = None
        self._start, self._first_step, self._last_line = 0.0, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Opens the bar at the iteration where the run stands."""
        self._start = self._last_line = time.monotonic()
        self._first_step = pl_module.iteration
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
            done, total = pl_module.iteration, pl_module.num_iterations
            self._progress.add_task(self.description, total=total, completed=done, note="")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the bar; asks the device for the loss only when a line is due."""
        now, step = time.monotonic(), pl_module.iteration
        due = now - self._last_line > (0.5 if self._progress else 30)
        if not trainer.is_global_zero or not due:
            return
        self._last_line = now
        speed = (step - self._first_step) / (now - self._start)
        values = ", ".join(f"{name} {float(outputs[name]):.4f}" for name in self.shown)
        note = f"{values}, {speed:.1f} steps/s"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, note=note)
        else:
            logger.info("%s: step %d of %d, %s", self.description, step, pl_module.num_iterations, note)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Fills and closes the bar."""
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=pl_module.iteration)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Closes the progress bar."""
        self._close()

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
