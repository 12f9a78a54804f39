"""What the recipes share: training against labels, and training a denoiser whose average is kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from diffcore.denoiser import NetworkDenoiser
from diffcore.runtime import Runtime
from diffcore.train import EMA, ConsoleSummary, DenoisingModule, IterationModule, StepData, fit, scheduled

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch, int], Tensor]
"""(network, batch, step) -> loss; whatever is random in it is a function of the step."""


_CHECKPOINT_EVERY = 250
"""Steps between checkpoints: about a minute of the larger trainings on one core."""


class SupervisedModule(IterationModule):
    """Minimises a loss with AdamW, the learning rate rising to its peak and falling back to nothing.

    Args:
        network: What is trained.
        loss: Of one batch.
        steps: Length of the training, over which the learning rate is laid out.
        learning_rate: Its peak.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the learning rate rises.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        steps: int,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.network, self._loss, self._steps = network, loss, steps
        self._learning_rate, self._betas, self._weight_decay, self._warmup = learning_rate, betas, weight_decay, warmup

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of the batch."""
        loss = self._loss(self.network, batch, self.iteration)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Returns AdamW and the cosine from the peak to zero after a linear rise."""
        optimizer = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad],
            self._learning_rate,
            betas=self._betas,
            weight_decay=self._weight_decay,
        )
        factor = rise_and_fall(self._steps, warmup=max(1, round(self._warmup * self._steps)))
        return scheduled(optimizer, factor)


def rise_and_fall(steps: int, *, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """Returns the factor of the learning rate at each step: a linear rise, then half a cosine down to `floor`."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup)
        return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor


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
        module: What is trained.
        data: On what.
        decay: Of the average.
        steps: Optimizer steps in all.
        folder: Of checkpoint and log.
        runtime: Where to compute.
        description: Stands beside the progress.
        shown: Callbacks that look at the average.
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
