"""Moments of the channels of an activation, and how massive its largest channels are (section 2.3)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import Views


@dataclass
class Moments(Sums):
    """Sums of the values of each channel, of their magnitudes and of their squares, over images, draws and places.

    Attributes:
        total: Sum of the values of each channel.
        magnitude: Sum of the absolute values of each channel.
        square: Sum of the squared values of each channel.
        count: Number of values of each channel.
    """

    total: Float[Tensor, " c"]
    magnitude: Float[Tensor, " c"]
    square: Float[Tensor, " c"]
    count: Float[Tensor, ""]

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> "Moments":
        """Returns sums over no image.

        Args:
            channels: Number of channels of the activation.
            device: Device that the sums are kept on.
        """
        total, magnitude, square = (zeros(channels, device=device) for _ in range(3))
        return cls(total, magnitude, square, zeros(device=device))

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation.
        """
        maps = views.draws.flatten(0, 1)
        places = (0, 2, 3)
        magnitudes = maps.abs()
        self.total += maps.sum(places)
        self.magnitude += magnitudes.sum(places)
        self.square += magnitudes.square_().sum(places)
        self.count += maps[:, 0].numel()

    @property
    def mean(self) -> Float[Tensor, " c"]:
        """Mean of each channel."""
        return self.total / self.count

    @property
    def std(self) -> Float[Tensor, " c"]:
        """Standard deviation of each channel."""
        return (self.square / self.count - self.mean.square()).clamp(min=0).sqrt()

    @property
    def rms(self) -> float:
        """Root of the mean squared value over all channels."""
        return float((self.square / self.count).mean().sqrt())

    @property
    def massive(self) -> float:
        """Largest mean magnitude of a channel, divided by the median one; above 20 a few channels rule the cosine."""
        magnitudes = self.magnitude / self.count
        return float(magnitudes.max() / magnitudes.median().clamp(min=torch.finfo(magnitudes.dtype).tiny))

    @property
    def finite(self) -> bool:
        """Whether all values were numbers: neither NaN nor infinite."""
        return bool(torch.isfinite(self.square).all())
