"""Predictions of key points without any features: what a matcher must beat.

On aligned images, answering with the same position is already right for half of the points; chance is the disc's share
of the image. Both stand beside every PCK.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from diffusion_featsel.keypoints import THRESHOLDS, RelativeTo
from diffusion_featsel.pairs import Pair


def rescale(
    points: Float[Tensor, "points 2"], size: tuple[int, int], to: tuple[int, int], *, published: bool = False
) -> Float[Tensor, "points 2"]:
    """Returns positions (x, y) of an image in the same image at another size.

    Args:
        points: Positions in pixels; whole numbers are pixel centres.
        size: Height and width of the image.
        to: Height and width of the image at the other size.
        published: Whether to multiply only, as the published code does; half a pixel of each size is neglected then.

    Example:
        >>> rescale(torch.tensor([[0.0, 0.0]]), (2, 2), (8, 8)).tolist()
        [[1.5, 1.5]]
    """
    factor = torch.tensor([to[1] / size[1], to[0] / size[0]], dtype=torch.float64, device=points.device)
    half = 0.0 if published else 0.5
    return ((points.double() + half) * factor - half).to(points.dtype)


def same_positions(pairs: Sequence[Pair]) -> list[Float[Tensor, "_ 2"]]:
    """Returns the answer "the same place of the image" for each point of each pair.

    Example:
        >>> points = torch.tensor([[1.0, 2.0]])
        >>> same_positions([Pair("a", "b", points, points, (8, 8), (8, 8))])[0].tolist()
        [[1.0, 2.0]]
    """
    return [rescale(pair.source_points, pair.source_size, pair.target_size) for pair in pairs]


def random_positions(pairs: Sequence[Pair], generator: Generator) -> list[Float[Tensor, "_ 2"]]:
    """Returns uniformly random positions of the target image for each point of each pair."""
    sides = [torch.tensor([pair.target_size[1], pair.target_size[0]]) for pair in pairs]
    return [
        torch.rand(len(pair.target_points), 2, generator=generator) * side - 0.5
        for pair, side in zip(pairs, sides, strict=True)
    ]


def chance(
    pairs: Sequence[Pair], relative_to: RelativeTo = "image", thresholds: Sequence[float] = THRESHOLDS
) -> Float64[Tensor, " thresholds"]:
    """Returns the share of points that random positions get right: the mean share of the image within the radius.

    Circles are cut off at the image's border. Only counted points of pairs whose box has a size are taken.

    Args:
        pairs: Pairs with their true positions.
        relative_to: Whose longer side the thresholds are shares of.
        thresholds: Radii, as shares of the longer side.
    """
    shares = []
    for pair in pairs:
        if max(pair.box) > 0:
            height, width = pair.target_size
            side = max(pair.box) if relative_to == "box" else max(height, width)
            points = pair.target_points[pair.counted].double() + 0.5
            areas = [disc_in_frame(points, pair.target_size, alpha * side) for alpha in thresholds]
            shares.append(torch.stack(areas, 1) / (height * width))
    return torch.cat(shares).mean(0)


def disc_in_frame(centres: Float64[Tensor, "n 2"], size: tuple[int, int], radius: float) -> Float64[Tensor, " n"]:
    """Returns the area that each disc shares with a rectangle from the origin.

    Args:
        centres: Centres (x, y) of the discs.
        size: Height and width of the rectangle.
        radius: Radius of the discs.

    Example:
        >>> centres = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
        >>> (disc_in_frame(centres, (10, 10), 1.0) / math.pi).tolist()
        [0.25, 1.0]
    """
    x, y = centres.unbind(1)
    right, below = size[1] - x, size[0] - y
    return (
        _quadrant(right, below, radius)
        - _quadrant(-x, below, radius)
        - _quadrant(right, -y, radius)
        + _quadrant(-x, -y, radius)
    )


def _quadrant(x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Returns the area of the disc around the origin that lies left of x and above y."""
    x, y = x.clamp(-radius, radius), y.clamp(-radius, radius)
    left, above = _segment(x, radius), _segment(y, radius)
    inside = x * y + (left + above) / 2 - math.pi * radius**2 / 4
    both = left + above - math.pi * radius**2
    outside = torch.where(x >= 0, torch.where(y >= 0, both, above), torch.where(y >= 0, left, 0.0))
    return torch.where(x.square() + y.square() <= radius**2, inside, outside)


def _segment(x: Tensor, radius: float) -> Tensor:
    """Returns the area of the disc around the origin that lies left of x."""
    return x * (radius**2 - x.square()).clamp(min=0).sqrt() + radius**2 * ((x / radius).asin() + math.pi / 2)
