"""The training recipe of the oracles: networks that classify the attributes of labelled images."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diffcore.metrics.attribute_network import AttributeNetwork
from diffcore.noise import philox_normal, philox_uniform
from diffcore.runtime import Runtime
from diffcore.train import StepData, fit_supervised
from diffcore.train.supervised import Batch

_NOISE = 0.03
"""Largest standard deviation of the noise added while training: generated images are noisier than real ones."""


class _Labelled:
    def __init__(self, images: Tensor, labels: Mapping[str, Tensor]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Tensor) -> Batch:
        labels = {name: values[indices] for name, values in self.labels.items()}
        return {"images": self.images[indices].float() / 255, "labels": labels}


def train_attribute_network(
    network: AttributeNetwork,
    images: UInt8[Tensor, "n c h w"],
    labels: Mapping[str, Tensor],
    folder: Path,
    runtime: Runtime,
    *,
    steps: int = 700,
    learning_rate: float = 4e-3,
) -> AttributeNetwork:
    """Trains by the sum of the heads' cross-entropies and returns the network in evaluation mode."""

    def loss(batch: Batch, step: int) -> Tensor:
        noisy = _noisy(batch["images"], step)
        return torch.stack([F.cross_entropy(v, batch["labels"][k]) for k, v in network.logits(noisy).items()]).sum()

    return fit_supervised(
        network,
        loss,
        StepData(_Labelled(images, labels), batch_size=64, seed=runtime.seed),
        steps=steps,
        learning_rate=learning_rate,
        warmup=0.3,
        folder=folder,
        runtime=runtime,
        description="oracle",
    )


def accuracies(
    network: AttributeNetwork, images: Float[Tensor, "n c h w"], labels: Mapping[str, Tensor]
) -> dict[str, float]:
    """Returns the accuracy of each attribute: the share of images that are classified as labelled."""
    read = network.read(images)
    return {name: float((read[name] == labels[name]).float().mean()) for name in read}


def _noisy(images: Tensor, step: int) -> Tensor:
    rows = torch.arange(len(images), device=images.device)
    strength = _NOISE * philox_uniform(0, rows, (1, 1, 1), step=step)
    return images + strength * philox_normal(0, rows, images.shape[1:], step=step, stream=1)
