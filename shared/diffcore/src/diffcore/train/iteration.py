"""Counting training in iterations: calls of `training_step`, in which any number of optimizers may step."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Descent:
    """One step of an optimizer.

    Attributes:
        loss: Loss whose gradient it followed.
        gradient_norm: Norm of that gradient before it was clipped, over all parameters of the optimizer.
    """

    loss: Tensor
    gradient_norm: Tensor


class IterationModule(L.LightningModule):
    """Counts the iterations of its own training, with any number of optimizers.

    `trainer.global_step` counts the steps of all optimizers together. Everything that depends on how far training has
    come (draws, averages, checkpoints) uses `iteration` instead, which the checkpoint holds.

    A module with several optimizers sets `automatic_optimization = False`, calls `step_optimizer` as often as it likes
    in `training_step`, and returns a loss, or a mapping with a tensor `loss`, as every module does. Learning-rate
    schedules of all its optimizers move once an iteration.

    Attributes:
        iteration: Number of finished iterations, which inside `training_step` is the index of the present one.
        num_iterations: Number of iterations after which `fit` ends.

    Example:
        >>> class Pair(IterationModule):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.automatic_optimization = False
        ...         self.first, self.second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        ...
        ...     def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        ...         return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]
        ...
        ...     def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        ...         x = torch.full((1, 1), float(self.iteration))
        ...         self.step_optimizer(0, self.first(x).square().mean())
        ...         loss = (self.second(x) - self.first(x).detach()).square().mean()
        ...         self.step_optimizer(1, loss)
        ...         return loss
        >>> Pair().iteration
        0
    """

    def __init__(self) -> None:
        super().__init__()
        self.iteration = 0
        self.num_iterations = 0
        self._finite: Tensor | None = None
        self._gradient_norm: Tensor | None = None

    def step_optimizer(self, index: int, loss: Tensor | Iterable[Tensor]) -> Descent:
        """Takes one optimizer step down the gradient of a loss, clipped by the setting of `fit`, in any precision.

        Args:
            index: Position of the optimizer in what `configure_optimizers` returns.
            loss: Scalar whose gradient is taken, or scalars of several batches whose gradients add up, each computed
                when the one before has given its gradient; gradients from before are discarded.

        Returns:
            The loss, and the norm of the gradient before it is clipped; both stay on the device.
        """
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        optimizer.zero_grad()
        total: Tensor | None = None
        for part in [loss] if isinstance(loss, Tensor) else loss:
            self.watch(part)
            self.manual_backward(part)
            total = part.detach() if total is None else total + part.detach()
        if total is None:
            raise ValueError("`loss` yields nothing; give at least one scalar")
        optimizer.step()
        norm = self._gradient_norm
        return Descent(total, torch.full_like(total, torch.nan) if norm is None else norm)

    def watch(self, loss: Tensor) -> None:
        """Notes on the device whether a loss is finite."""
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite

    def all_finite(self) -> bool:
        """Returns whether all losses noted since the last call were finite, on every process."""
        finite, self._finite = self._finite, None
        return self.trainer.strategy.reduce_boolean_decision(finite is None or bool(finite))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Ends the fit once all iterations are done."""
        return -1 if self.iteration >= self.num_iterations else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes the number of finished iterations into the checkpoint."""
        checkpoint["iteration"] = self.iteration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the number of finished iterations from the checkpoint."""
        self.iteration = _iteration_of(checkpoint)


class Iterations(L.Callback):
    """Counts the iterations of a module before any other callback sees them, and clips the gradients of each step.

    Args:
        gradient_clip: Largest norm of one optimizer's gradient; None clips nothing.
    """

    def __init__(self, gradient_clip: float | None = None) -> None:
        self.gradient_clip = gradient_clip or 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Clips gradients; Lightning has divided them by the loss scale of float16 before, whoever steps."""
        if pl_module.automatic_optimization:
            trainer.precision_plugin.clip_gradients(optimizer, self.gradient_clip)
            return
        parameters = [part for group in optimizer.param_groups for part in group["params"] if part.grad is not None]
        norm = get_total_norm([part.grad for part in parameters])
        pl_module._gradient_norm = norm
        if self.gradient_clip:
            clip_grads_with_norm_(parameters, self.gradient_clip, norm)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts, and moves the learning-rate schedules that Lightning leaves alone in manual optimization."""
        pl_module.iteration += 1
        if not pl_module.automatic_optimization:
            for config in trainer.lr_scheduler_configs:
                config.scheduler.step()  # pyright: ignore[reportCallIssue]


def scheduled(optimizer: Optimizer, factor: Callable[[int], float] | None) -> dict[str, Any]:
    """Returns what `configure_optimizers` returns for one optimizer whose learning rate follows the iteration.

    Args:
        optimizer: Optimizer at its full learning rate.
        factor: Factor of the learning rate at each iteration; None keeps it constant.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> scheduled(optimizer, lambda iteration: 0.5)["lr_scheduler"]["scheduler"].get_last_lr()
        [0.05]
    """
    if factor is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def iterations_done(checkpoint: Path) -> int:
    """Returns after how many iterations a checkpoint was written; 0 if there is none.

    Example:
        >>> iterations_done(Path("nowhere.ckpt"))
        0
    """
    if not checkpoint.exists():
        return 0
    return _iteration_of(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))


def _iteration_of(checkpoint: Mapping[str, Any]) -> int:
    # Checkpoints from before iterations were counted have one optimizer, of which Lightning counted the steps.
    return int(checkpoint.get("iteration", checkpoint["global_step"]))
