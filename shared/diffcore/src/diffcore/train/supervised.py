"""Training one network by one loss with AdamW, the learning rate rising to its peak and falling back to zero."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffcore.runtime import Runtime
from diffcore.train.callbacks import ConsoleSummary
from diffcore.train.fit import fit
from diffcore.train.iteration import IterationModule, scheduled
from diffcore.train.order import StepData

Batch = Mapping[str, Any]
Loss = Callable[[Batch, int], Tensor]
"""(batch, iteration) -> loss; whatever is random in it is a function of the iteration."""
Network = TypeVar("Network", bound=nn.Module)


def fit_supervised(
    network: Network,
    loss: Loss,
    data: StepData,
    *,
    steps: int,
    learning_rate: float,
    folder: Path,
    runtime: Runtime,
    description: str,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    gradient_clip: float | None = None,
) -> Network:
    """Trains a network in place, resuming as `fit` does, and returns it frozen and in evaluation mode.

    Args:
        network: Network whose parameters that require gradients are trained.
        loss: Computes the loss of (batch, iteration) with the network.
        data: Labelled samples in a reproducible order.
        steps: Number of iterations, over which the learning rate is laid out.
        learning_rate: Peak of the learning rate.
        folder: Folder for checkpoints and the log.
        runtime: Device, precision, number of processes and strategy.
        description: Words that stand beside the progress.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Share of the iterations in which the learning rate rises.
        gradient_clip: Largest gradient norm; None clips nothing.

    Example:
        >>> import tempfile
        >>> class Line:
        ...     def __len__(self) -> int:
        ...         return 100
        ...
        ...     def __getitems__(self, indices: Tensor) -> Batch:
        ...         x = indices[:, None] / 50 - 1
        ...         return {"x": x, "y": 2 * x + 1}
        >>> network = nn.Linear(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     line = fit_supervised(
        ...         network,
        ...         lambda batch, iteration: (network(batch["x"]) - batch["y"]).square().mean(),
        ...         StepData(Line(), batch_size=50, seed=0),
        ...         steps=200,
        ...         learning_rate=0.1,
        ...         folder=Path(folder),
        ...         runtime=Runtime(device="cpu"),
        ...         description="line",
        ...     )
        >>> abs(line.weight.item() - 2) < 0.1
        True
    """
    factor = rise_and_fall(steps, warmup=max(1, round(warmup * steps)))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    fit(
        _Supervised(
            network,
            loss,
            lambda: torch.optim.AdamW(parameters, learning_rate, betas=betas, weight_decay=weight_decay),
            factor,
        ),
        data,
        steps=steps,
        folder=folder,
        runtime=runtime,
        callbacks=[ConsoleSummary(description)],
        gradient_clip=gradient_clip,
    )
    return network.eval().requires_grad_(False)


class _Supervised(IterationModule):
    def __init__(
        self, network: nn.Module, loss: Loss, optimizer: Callable[[], Any], factor: Callable[[int], float]
    ) -> None:
        super().__init__()
        self.network, self._loss, self._optimizer, self._factor = network, loss, optimizer, factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch, self.iteration)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return scheduled(self._optimizer(), self._factor)


def rise_and_fall(steps: int, *, warmup: int, floor: float = 0.0) -> Callable[[int], float]:
    """Returns the factor of the learning rate at each iteration: a linear rise, then half a cosine down to `floor`.

    Args:
        steps: Number of iterations after which the factor is at its floor.
        warmup: Number of iterations in which the factor rises.
        floor: Smallest factor of the fall.

    Example:
        >>> factor = rise_and_fall(100, warmup=10)
        >>> [round(factor(iteration), 2) for iteration in (0, 9, 50, 100)]
        [0.1, 0.98, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup)
        return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor
