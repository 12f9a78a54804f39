"""Training a denoiser and keeping the moving average of its weights, as every recipe does."""

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L

from diffcore.denoiser import NetworkDenoiser
from diffcore.runtime import Runtime
from diffcore.train import EMA, ConsoleSummary, DenoisingModule, StepData, fit

_CHECKPOINT_EVERY = 250
"""Iterations between checkpoints: about a minute of the larger trainings on one core."""


def fit_averaged(
    module: DenoisingModule,
    data: StepData,
    *,
    decay: float,
    steps: int,
    folder: Path,
    runtime: Runtime,
    description: str,
    shown: Callable[[EMA], Sequence[L.Callback]] = lambda ema: (),
) -> NetworkDenoiser:
    """Trains a denoiser and returns the moving average of its weights.

    Args:
        module: Denoiser with its loss and its optimizer.
        data: Training samples in a reproducible order.
        decay: Upper bound of the average's decay.
        steps: Number of iterations in all.
        folder: Folder for checkpoints and the log.
        runtime: Device, precision, number of processes and strategy.
        description: Words that stand beside the progress.
        shown: Makes callbacks from the average, such as sample grids.
    """
    ema = EMA(decay)
    fit(
        module,
        data,
        steps=steps,
        folder=folder,
        runtime=runtime,
        callbacks=[ema, *shown(ema), ConsoleSummary(description)],
        checkpoint_every=_CHECKPOINT_EVERY,
        gradient_clip=1.0,
    )
    return ema.average
