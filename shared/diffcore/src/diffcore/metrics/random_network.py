"""A convolutional network with fixed random weights: features that need no file, only a seed.

Random features see colour, texture and coarse layout, and nothing that must be learnt. Distances in them compare runs
with one another, on any kind of image; they are not comparable with published numbers.

References:
    Naeem et al. 2020, section 4: random embeddings for data far from ImageNet.
"""

import hashlib
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.metrics.preprocess import Preprocessing

PREPROCESSING = Preprocessing((64, 64), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CHANNELS = (3, 32, 64, 128)


class RandomNetwork(nn.Module):
    """Strided convolutions with weights drawn from a seed; features are the mean response of every channel.

    Args:
        seed: Seed that the weights are drawn from.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        for inputs, outputs in pairwise(_CHANNELS):
            layer = nn.Conv2d(
                inputs, outputs, 3, stride=2, padding=1, device="meta"
            )  # drawn below, not from torch's own stream
            scale = (2 / (9 * inputs)) ** 0.5  # He et al. 2015: responses keep their size from layer to layer
            layer.weight = nn.Parameter(scale * torch.randn(layer.weight.shape, generator=generator))
            layer.bias = nn.Parameter(0.1 * torch.randn(outputs, generator=generator))
            self.layers.append(layer)

    def forward(self, x: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 224"]:
        """Returns the mean over positions of each channel of each layer."""
        means = []
        for layer in self.layers:
            x = layer(x).relu()
            means.append(x.mean((2, 3)))
        return torch.cat(means, dim=1)

    def sha256(self) -> str:
        """Returns the digest of the weights: the same seed gives the same on every machine."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()
