"""Exponential moving average of a denoiser's weights."""

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffcore.denoiser import NetworkDenoiser


class EMA(L.Callback):
    """Keeps the moving average that one samples from.

    Unlike Lightning's own averaging it follows the denoiser alone, warms its decay up (a short run would otherwise
    average its random beginnings), and asks the device for nothing: the decay is a function of the step.

    Args:
        decay: Upper bound of the decay; at step s it is `min(decay, (1 + s) / (10 + s))`.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.denoiser: NetworkDenoiser | None = None
        self._restored: dict[str, Tensor] | None = None
        self._parameters: tuple[list[Tensor], list[Tensor]] = [], []
        self._buffers: tuple[list[Tensor], list[Tensor]] = [], []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copies the denoiser, or takes the average that a checkpoint holds."""
        source: NetworkDenoiser = pl_module.denoiser  # pyright: ignore[reportAssignmentType]
        self.denoiser = copy.deepcopy(source).requires_grad_(False).eval()
        if self._restored is not None:
            self.denoiser.load_state_dict(self._restored)
            self._restored = None
        # Collected once: walking a module tree costs more than a small network's average.
        self._parameters = list(self.denoiser.parameters()), list(source.parameters())
        self._buffers = list(self.denoiser.buffers()), list(source.buffers())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the average towards the weights that the step has left."""
        step = trainer.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._parameters, 1 - decay)
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """Returns the averaged weights for the checkpoint."""
        return {} if self.denoiser is None else dict(self.denoiser.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the averaged weights of a checkpoint until the fit starts."""
        self._restored = state_dict or None
