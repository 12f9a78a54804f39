"""Random affine warps with an exact map of positions, for pairs of images whose correspondence is known.

Positions are (x, y) in pixels; whole numbers are pixel centres, so an image of width w reaches from -0.5 to w - 0.5. A
warp takes position p of an image of size (w, h) to

    q = scale * rotation (p - c) + c + shift * (w, h),    c = ((w - 1) / 2, (h - 1) / 2),

and the warped image is, at q, what the image is at p.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

Padding = Literal["reflection", "border", "zeros"]


@dataclass(frozen=True)
class AffineRange:
    """Limits between which the parts of a random warp are drawn uniformly.

    Attributes:
        rotation: Largest rotation to either side, in radians.
        scale: Smallest and largest factor of size.
        shift: Largest shift in any direction of both axes, as a share of the side.
    """

    rotation: float
    scale: tuple[float, float]
    shift: float

    def __post_init__(self) -> None:
        """Raises ValueError for limits that no warp can have."""
        if not 0 < self.scale[0] <= self.scale[1] or self.rotation < 0 or self.shift < 0:
            raise ValueError(f"{self} is no range; give scales above 0 in rising order, and the others at least 0")


STRONG = AffineRange(0.6, (0.75, 1.35), 0.175)
"""Range for test pairs of aligned images: after it, answering with the same position is rarely right."""
MILD = AffineRange(math.radians(15), (0.85, 1.15), 0.075)
"""Range for the augmentation under which features should stay the same."""


@dataclass(frozen=True)
class Affine:
    """One warp for each image of a batch; the same warp for images of any size.

    Attributes:
        linear: Matrices of rotation and scale, acting on (x, y) columns.
        shift: Shift along x and y, as shares of width and height.
    """

    linear: Float[Tensor, "n 2 2"]
    shift: Float[Tensor, "n 2"]

    def __len__(self) -> int:
        return len(self.linear)

    def __getitem__(self, rows: slice | Tensor) -> "Affine":
        """Returns the warps of some of the images."""
        return Affine(self.linear[rows], self.shift[rows])

    def matrix(self, size: tuple[int, int]) -> Float[Tensor, "n 2 3"]:
        """Returns the maps from positions to warped positions in pixels, as matrices on (x, y, 1).

        Args:
            size: Height and width of the images in pixels.
        """
        height, width = size
        sides = self.linear.new_tensor([width, height])
        centre = (sides - 1) / 2
        offset = centre + self.shift * sides - self.linear @ centre
        return torch.cat([self.linear, offset[..., None]], 2)


def identity_affine(n: int) -> Affine:
    """Returns warps that move nothing."""
    return Affine(torch.eye(2, dtype=torch.float64).repeat(n, 1, 1), torch.zeros(n, 2, dtype=torch.float64))


def random_affine(n: int, generator: Generator, limits: AffineRange = STRONG) -> Affine:
    """Draws one warp for each of n images.

    The first warps of a generator are the same for any n.

    Args:
        n: Number of images to warp.
        generator: Source of the random numbers; a generator on the CPU.
        limits: Ranges of rotation, scale and shift.

    Example:
        >>> import torch
        >>> warp = random_affine(3, torch.Generator().manual_seed(0))
        >>> images = torch.rand(3, 3, 32, 32)
        >>> tuple(warp_images(images, warp).shape)
        (3, 3, 32, 32)
        >>> tuple(warp_points(torch.tensor([[[4.0, 5.0]]]).expand(3, 1, 2), warp, (32, 32)).shape)
        (3, 1, 2)
    """
    angle, size, right, down = torch.rand(n, 4, dtype=torch.float64, generator=generator).unbind(1)
    angle = (2 * angle - 1) * limits.rotation
    low, high = limits.scale
    size = low + (high - low) * size
    cos, sin = size * angle.cos(), size * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return Affine(linear, (2 * torch.stack([right, down], 1) - 1) * limits.shift)


def warp_images(
    images: Float[Tensor, "b c h w"],
    affine: Affine,
    padding: Padding = "reflection",
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "b c h w"]:
    """Returns the warped images, of the same size.

    Args:
        images: Images, or maps of anything else.
        affine: One warp for each image.
        padding: Content from outside the frame: mirrored at the border, the border repeated, or zeros.
        mode: Interpolation between pixels; "nearest" for labels.

    Raises:
        ValueError: There are not as many warps as images.
    """
    if len(affine) != len(images):
        raise ValueError(f"there are {len(affine)} warps for {len(images)} images; give one for each")
    height, width = images.shape[2:]
    forward = affine.matrix((height, width))
    back = torch.linalg.inv(forward[:, :, :2])
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    places = torch.stack([x, y], -1).flatten(0, 1).to(forward.device)
    source = (places - forward[:, None, :, 2]) @ back.transpose(1, 2)
    sides = torch.tensor([width, height], dtype=torch.float64, device=forward.device)
    grid = ((2 * source + 1) / sides - 1).unflatten(1, (height, width))
    return F.grid_sample(images, grid.to(images), mode=mode, padding_mode=padding, align_corners=False)


def warp_points(
    points: Float[Tensor, "b points 2"], affine: Affine, size: tuple[int, int]
) -> Float[Tensor, "b points 2"]:
    """Returns where the warp takes positions, exactly.

    Args:
        points: Positions (x, y) in pixels of the image.
        affine: One warp for each image.
        size: Height and width of the images in pixels.
    """
    matrix = affine.matrix(size).to(points.device)
    return (points.double() @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]).to(points.dtype)


def unwarp_points(
    points: Float[Tensor, "b points 2"], affine: Affine, size: tuple[int, int]
) -> Float[Tensor, "b points 2"]:
    """Returns the positions that the warp takes to the given ones: the inverse of `warp_points`.

    Args:
        points: Positions (x, y) in pixels of the warped image.
        affine: One warp for each image.
        size: Height and width of the images in pixels.
    """
    matrix = affine.matrix(size).to(points.device)
    back = torch.linalg.inv(matrix[:, :, :2])
    return ((points.double() - matrix[:, None, :, 2]) @ back.transpose(1, 2)).to(points.dtype)


def in_frame(points: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Bool[Tensor, "*batch"]:
    """Returns whether each position (x, y) lies on a pixel of an image of the given height and width.

    Example:
        >>> import torch
        >>> in_frame(torch.tensor([[-0.4, 3.0], [7.6, 3.0]]), (8, 8)).tolist()
        [True, False]
    """
    sides = points.new_tensor([size[1], size[0]])
    return ((points >= -0.5) & (points <= sides - 0.5)).all(-1)


def random_gain(
    images: Float[Tensor, "b c h w"], generator: Generator, spread: float = 0.2
) -> Float[Tensor, "b c h w"]:
    """Returns the images with each channel multiplied by its own random factor, clipped to [0, 1].

    Args:
        images: Images with values in [0, 1].
        generator: Source of the random numbers; a generator on the CPU.
        spread: Largest difference of a factor from 1.
    """
    gain = 1 + spread * (2 * torch.rand(images.shape[:2], generator=generator) - 1)
    return (images * gain[..., None, None].to(images)).clamp(0, 1)
