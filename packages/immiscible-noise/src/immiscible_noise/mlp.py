"""A denoiser for tiny images: a residual multilayer perceptron."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

_FREQUENCIES = 32


class MLPDenoiser(nn.Module):
    """Residual blocks on the flattened image, each shifted by an embedding of time and, if there is one, of the label.

    Its output is zero at first, so training starts from the mean.

    Args:
        shape: Of one image.
        width: Of the hidden layers.
        depth: Number of residual blocks.
        num_classes: Number of labels; None is unconditional.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int = 128, depth: int = 3, num_classes: int | None = None
    ) -> None:
        super().__init__()
        size, embedding = math.prod(shape), 2 * _FREQUENCIES
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = None if num_classes is None else nn.Embedding(num_classes, embedding)
        nn.init.zeros_(self.leave[1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.leave[1].bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        sample: Float[Tensor, "b *data"],
        timestep: Float[Tensor, " b"],
        class_labels: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *data"]:
        """Returns the prediction for noisy images at times of order 1."""
        embedding = self.time(_fourier(timestep).to(sample.dtype))
        if self.label is not None:
            if class_labels is None:
                raise ValueError("this network is class-conditional; pass class_labels")
            embedding = embedding + self.label(class_labels)
        embedding = functional.silu(embedding)
        hidden = self.enter(sample.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.leave(hidden).view_as(sample)


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(width), nn.Linear(embedding, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return hidden + self.second(functional.silu(self.first(self.norm(hidden)) + self.shift(embedding)))


def _fourier(t: Tensor) -> Tensor:
    """Sine and cosine at frequencies from 1000 down to about 1 radian per unit of time."""
    exponents = torch.arange(_FREQUENCIES, device=t.device) / _FREQUENCIES
    phases = t.float()[:, None] * 1000 ** (1 - exponents)
    return torch.cat([phases.sin(), phases.cos()], dim=1)
