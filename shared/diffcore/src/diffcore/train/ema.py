"""Exponential moving average of a network's weights."""

import copy
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor


class EMA(L.Callback):
    """Keeps the exponential moving average of one sub-module of the trained module.

    Unlike Lightning's own averaging it follows one sub-module alone, warms up its decay (a short run would otherwise
    average its random initial weights), and never waits for the device, as the decay depends on the iteration alone.

    Args:
        decay: Upper bound of the decay; after iteration s it is `min(decay, (1 + s) / (10 + s))`.
        network: Name of the sub-module whose weights are averaged.

    Attributes:
        average: The sub-module with averaged weights; it exists once the fit has started.

    Example:
        >>> EMA(0.999, network="generator").network
        'generator'
    """

    average: Any

    def __init__(self, decay: float = 0.9999, network: str = "denoiser") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.network = decay, network
        self._restored: dict[str, Tensor] = {}
        self._parameters: tuple[list[Tensor], list[Tensor]] = [], []
        self._buffers: tuple[list[Tensor], list[Tensor]] = [], []

    @property
    def state_key(self) -> str:
        """The key of the average in a checkpoint, distinct for each averaged network."""
        return "EMA" if self.network == "denoiser" else f"EMA of {self.network}"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copies the network, or takes the average that a checkpoint holds."""
        source = pl_module.get_submodule(self.network)
        self.average = copy.deepcopy(source).requires_grad_(False).eval()
        if self._restored:
            self.average.load_state_dict(self._restored)
            self._restored = {}
        # Collected once: walking a module tree costs more than a small network's average. Tensors that the copy shares
        # with the network (the weights under a LoRA) are their own average.
        self._parameters = _apart(self.average.parameters(), source.parameters())
        self._buffers = _apart(self.average.buffers(), source.buffers())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the average towards the weights that the iteration has left."""
        step = pl_module.iteration
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._parameters, 1 - decay)
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """Returns the averaged weights for the checkpoint."""
        return dict(self.average.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the averaged weights of a checkpoint until the fit starts."""
        self._restored = state_dict


def _apart(averages: Iterable[Tensor], sources: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns pairs of tensors as two lists, without those that are one tensor."""
    pairs = [pair for pair in zip(averages, sources, strict=True) if pair[0] is not pair[1]]
    return [average for average, _ in pairs], [source for _, source in pairs]
