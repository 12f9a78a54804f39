"""Training a module in one call that resumes from checkpoints and stops cleanly."""

import itertools
import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from diffcore.errors import MachineError
from diffcore.runtime import Runtime
from diffcore.train.iteration import IterationModule, Iterations, iterations_done
from diffcore.train.logger import JSONLLogger
from diffcore.train.order import StepData

_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def fit(
    module: IterationModule,
    data: StepData | None = None,
    *,
    steps: int,
    folder: Path,
    runtime: Runtime,
    callbacks: Sequence[L.Callback] = (),
    checkpoint_every: int = 500,
    log_every: int = 50,
    gradient_clip: float | None = None,
) -> bool:
    """Trains for `steps` iterations, or from where an earlier call on the same folder left off.

    An iteration is one call of `training_step`, in which any number of optimizers may step.

    The folder gets `checkpoints/last.ckpt` (for resuming only) and `log.jsonl`. After an interruption, whatever its
    kind, the same call continues from the last checkpoint and ends with the weights of an uninterrupted run. Ctrl-C and
    SIGTERM let the current iteration finish and write a checkpoint before the signal takes effect.

    Args:
        module: The networks, their losses and their optimizers.
        data: The samples, in an order that can be entered at any iteration; without them each batch is an empty
            mapping, for a module that draws its own.
        steps: Number of iterations in all.
        folder: Folder for checkpoints and the log.
        runtime: Device, precision, number of processes and strategy.
        callbacks: Callbacks that run in this order after each iteration, before the checkpoint is written.
        checkpoint_every: Number of iterations between checkpoints.
        log_every: Number of iterations between log lines.
        gradient_clip: Largest gradient norm at a step of an optimizer; None clips nothing.

    Returns:
        Whether this process is the one that writes results (rank 0).

    Raises:
        UserError: The device asked for is not here, or cannot compute in the precision asked for.
        MachineError: The loss became NaN or infinite; the last good checkpoint is kept.
    """
    _ = runtime.torch_dtype  # refuses what the device cannot do before anything is written
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    module.num_iterations = steps
    keeper = _CheckpointKeeper(checkpoint, checkpoint_every)
    with _quiet_lightning():
        trainer = L.Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu", "mps": "mps"}[runtime.device],
            devices=runtime.devices,
            num_nodes=runtime.num_nodes,
            strategy=_strategy(module, runtime),
            precision=_PRECISION[runtime.dtype],  # pyright: ignore[reportArgumentType]
            max_epochs=1,  # one pass over endless data, which the module ends
            logger=JSONLLogger(folder / "log.jsonl", iterations_done(checkpoint)),
            log_every_n_steps=log_every,
            callbacks=[Iterations(gradient_clip), *callbacks, keeper],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        with _deferred_signals(keeper, enabled=trainer.world_size == 1):
            _run(trainer, module, data, checkpoint if checkpoint.exists() else None)
    return trainer.is_global_zero


def _run(trainer: L.Trainer, module: IterationModule, data: StepData | None, checkpoint: Path | None) -> None:
    """Calls Lightning, and turns its exit after Ctrl-C back into `KeyboardInterrupt`."""
    try:
        trainer.fit(module, data or itertools.repeat({}), ckpt_path=checkpoint, weights_only=True)
    except (_StopRequested, SIGTERMException):
        pass  # the signal is raised again once all is written
    except SystemExit as error:
        if trainer.interrupted:  # Ctrl-C, turned into exit code 1
            raise KeyboardInterrupt from error
        raise


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences Lightning's tips, and its advice on data loaders, which does not apply here."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        # An optimizer need not step in each iteration, but its schedule does.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`")
        try:
            yield
        finally:
            log.setLevel(level)


def _strategy(module: IterationModule, runtime: Runtime) -> str:
    """Tells DDP, where each optimizer has a loss of its own, not to wait for gradients of the other networks."""
    strategy = runtime.strategy.replace("auto", "ddp")
    if module.automatic_optimization or runtime.devices * runtime.num_nodes == 1 or strategy not in ("ddp", "ddp_fork"):
        return runtime.strategy
    return f"{strategy}_find_unused_parameters_true"


class _StopRequested(BaseException):
    """Ends the fit after an iteration whose checkpoint is written."""


class _CheckpointKeeper(L.Callback):
    """Writes the checkpoint to resume from: at a fixed interval, when asked to stop, and never after a bad loss."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.stop_requested = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "loss" not in outputs:
            raise TypeError(f"{type(pl_module).__name__}.training_step must return a loss, or a mapping with 'loss'")
        pl_module.watch(outputs["loss"])
        step = pl_module.iteration
        if not (self.stop_requested or step == pl_module.num_iterations or step % self.every == 0):
            return
        if not pl_module.all_finite():
            raise MachineError(_bad_loss(pl_module, step, self.path))
        trainer.save_checkpoint(self.path)
        if self.stop_requested:
            # Not trainer.should_stop: it would log a line that an uninterrupted run does not have.
            raise _StopRequested


def _bad_loss(module: nn.Module, step: int, checkpoint: Path) -> str:
    norms = {name: float(p.detach().norm()) for name, p in module.named_parameters()}
    name, norm = max(norms.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
    kept = f"{checkpoint.name} holds the last good step" if checkpoint.exists() else "no checkpoint was written yet"
    return (
        f"the loss became NaN or infinite at or shortly before step {step}; "
        f"the largest parameter is {name} with norm {norm:.3g}. "
        f"Lower the learning rate, clip gradients, or use bfloat16 instead of float16 ({kept})"
    )


@contextmanager
def _deferred_signals(keeper: _CheckpointKeeper, enabled: bool) -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the iteration; raises it again at the end.

    With several processes the ranks would see the signal at different iterations, so there it acts at once, and the
    last regular checkpoint counts.
    """
    if not enabled:
        yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number in received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        keeper.stop_requested = True

    # A signal that the parent told us to ignore (a job in the background) stays ignored.
    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
