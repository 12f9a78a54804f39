"""What the label-free measurements see of one activation on one batch of images: maps of two noise draws, and more."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffcore.noise import splitmix64

DIMENSIONS = 64
"""Number of channels after the random projection (section 3.2: C' = 64)."""
GROUP = 8
"""Number of consecutive images that are compared with one another; an even number."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one forward pass, without activations.

    Attributes:
        groups: Ranges of indices in the data set; the images of a group are compared with one another.
        x0: Encoded images without noise.
        noise: Noise of both draws.
        points: Points in each image, (x, y) as shares of width and height, for the self-correspondence.
        moved: The same points in the moved image; NaN where they leave it.
        anchors: Random numbers in [0, 1) that choose cells of each image: an anchor, and a place far from it.
    """

    groups: tuple[range, ...]
    x0: Float[Tensor, "n channels height width"]
    noise: Float[Tensor, "2 n channels height width"]
    points: Float[Tensor, "n k 2"]
    moved: Float[Tensor, "n k 2"]
    anchors: Float[Tensor, "n q 2"]
    _pooled: dict[tuple[str, tuple[int, int]], Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def first(self) -> int:
        """Index of the first image in the data set."""
        return self.groups[0].start

    def noise_at(self, grid: tuple[int, int]) -> Float[Tensor, "2 n channels height width"]:
        """Returns the noise, averaged to a grid.

        Args:
            grid: Rows and columns of the result.
        """
        if ("noise", grid) not in self._pooled:
            self._pooled["noise", grid] = F.adaptive_avg_pool2d(self.noise.flatten(0, 1), grid).unflatten(
                0, self.noise.shape[:2]
            )
        return self._pooled["noise", grid]

    def x0_at(self, grid: tuple[int, int]) -> Float[Tensor, "n channels height width"]:
        """Returns the encoded images, averaged to a grid.

        Args:
            grid: Rows and columns of the result.
        """
        if ("x0", grid) not in self._pooled:
            self._pooled["x0", grid] = F.adaptive_avg_pool2d(self.x0, grid)
        return self._pooled["x0", grid]


@dataclass(frozen=True, eq=False)
class Views:
    """Maps of one activation on a batch of images.

    Attributes:
        batch: The images of one pass.
        draws: Maps under two independent noise draws of each image.
        moved: Maps of the images after a random affine movement, with noise of their own; None where it is not needed.
        projection: Matrix (C', C) to at most 64 channels; None for an activation that has no more.
    """

    batch: Batch
    draws: Float[Tensor, "2 n c h w"]
    moved: Float[Tensor, "n c h w"] | None
    projection: Float[Tensor, "d c"] | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the maps."""
        return self.draws.shape[3], self.draws.shape[4]

    @cached_property
    def projected(self) -> Float[Tensor, "2 n d places"]:
        """Maps of both draws on at most 64 channels."""
        maps = self.draws.flatten(3)
        return maps if self.projection is None else self.projection @ maps

    @cached_property
    def shift(self) -> Float[Tensor, " d"]:
        """Mean of each projected channel over the batch.

        Products of values near their mean keep their digits in float32; those of values far from zero would lose them.
        """
        return self.projected.mean((0, 1, 3))

    @cached_property
    def centered(self) -> Float[Tensor, "2 n d places"]:
        """Projected maps of both draws, less `shift`."""
        return self.projected - self.shift[:, None]


def grouped(count: int) -> list[range]:
    """Returns the groups of images that are compared with one another; a last single image joins the group before it.

    Args:
        count: Number of images in all.

    Example:
        >>> grouped(17)
        [range(0, 8), range(8, 17)]
    """
    starts = list(range(0, count, GROUP))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def directions(maps: Float[Tensor, "n c places"]) -> Float[Tensor, "n c places"]:
    """Returns columns of length 1; a column of zeros stays one.

    Args:
        maps: Maps with their places in one dimension.
    """
    # Several times as fast on the CPU as `torch.nn.functional.normalize`, whose norm goes along the strided dimension.
    return maps * maps.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


def projection_of(name: str, channels: int, device: torch.device) -> Tensor | None:
    """Returns a matrix with orthogonal rows to `DIMENSIONS` channels, seeded by a name; None where it would not shrink.

    Rows are scaled such that squared lengths are kept on average.

    Args:
        name: Name of the activation.
        channels: Number of its channels.
        device: Device of the result.
    """
    if channels <= DIMENSIONS:
        return None
    seed = 0
    for byte in name.encode():
        seed = splitmix64(seed ^ byte)
    gaussian = torch.randn(channels, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.linalg.qr(gaussian).Q.T * (channels / DIMENSIONS) ** 0.5
    return rows.float().contiguous().to(device)
