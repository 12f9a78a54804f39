"""A pair of images with key points that belong together, and pairs made by warping single images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_featsel.warp import Affine, in_frame, warp_points


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and the positions of the same key points in both.

    Positions are (x, y) in pixels of the original images; whole numbers are pixel centres.

    Attributes:
        source: Name of the source image, by which its features are asked for.
        target: Name of the target image.
        source_points: Positions in the source image.
        target_points: Positions of the same key points in the target image.
        source_size: Height and width of the source image in pixels.
        target_size: Height and width of the target image in pixels.
        target_box: Left, top, right and bottom of the object in the target image; None where the data set has none.
        source_box: Left, top, right and bottom of the object in the source image; None where the data set has none.
        category: Word for what is shown, such as "cat"; "" where there is none.
        visible: Whether each key point is there in both images; all by default.
    """

    source: str
    target: str
    source_points: Float[Tensor, "_ 2"]
    target_points: Float[Tensor, "_ 2"]
    source_size: tuple[int, int]
    target_size: tuple[int, int]
    target_box: tuple[float, float, float, float] | None = None
    source_box: tuple[float, float, float, float] | None = None
    category: str = ""
    visible: Bool[Tensor, " _"] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where both sides differ in their number of points, or an image has no size."""
        counts = {len(self.source_points), len(self.target_points)}
        if self.visible is not None:
            counts.add(len(self.visible))
        if len(counts) > 1:
            raise ValueError(f"the pair {self.source}, {self.target} has {sorted(counts)} points; give equal numbers")
        if min(*self.source_size, *self.target_size) < 1:
            raise ValueError(f"the pair {self.source}, {self.target} has an image without pixels")

    @property
    def shown(self) -> Bool[Tensor, " points"]:
        """Whether each key point is there in both images, by the data set's own word."""
        return torch.ones(len(self.source_points), dtype=torch.bool) if self.visible is None else self.visible

    @property
    def counted(self) -> Bool[Tensor, " points"]:
        """Whether each key point is shown, and inside the frame of both images."""
        inside = in_frame(self.source_points, self.source_size) & in_frame(self.target_points, self.target_size)
        return self.shown & inside

    @property
    def box(self) -> tuple[float, float]:
        """Height and width of the object in the target image: of its box, else of the box of its counted points."""
        if self.target_box is not None:
            left, top, right, bottom = self.target_box
            return bottom - top, right - left
        points = self.target_points[self.counted]
        if not len(points):
            return 0.0, 0.0
        width, height = (points.amax(0) - points.amin(0)).tolist()
        return height, width


def warped_pairs(
    names: Sequence[str],
    warped: Sequence[str],
    points: Float[Tensor, "b points 2"],
    affine: Affine,
    size: tuple[int, int],
    *,
    boxes: Float[Tensor, "b 4"] | None = None,
    category: str = "",
    visible: Bool[Tensor, "b points"] | None = None,
) -> list[Pair]:
    """Returns pairs of images with warped images, whose key points are known exactly.

    Args:
        names: Name of each source image.
        warped: Name of each warped target image.
        points: Key points (x, y) of the target images before they were warped, and by default of the source images.
        affine: Warps of the target images.
        size: Height and width of all images in pixels.
        boxes: Left, top, right and bottom of each object before the warp; its box afterwards holds all four corners.
        category: Word for what is shown in all images.
        visible: Whether each key point is there; all by default.

    Example:
        >>> from diffusion_featsel.warp import random_affine
        >>> affine = random_affine(2, torch.Generator().manual_seed(0))
        >>> pairs = warped_pairs(["a", "b"], ["a*", "b*"], torch.rand(2, 5, 2) * 32, affine, (32, 32))
        >>> len(pairs), pairs[0].target_size
        (2, (32, 32))
    """
    moved = warp_points(points, affine, size)
    around = None
    if boxes is not None:
        around = warp_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].unflatten(1, (4, 2)), affine, size)
    return [
        Pair(
            source,
            target,
            points[row],
            moved[row],
            size,
            size,
            target_box=None if around is None else _bounds(around[row]),
            source_box=None if boxes is None else _bounds(boxes[row].unflatten(0, (2, 2))),
            category=category,
            visible=None if visible is None else visible[row],
        )
        for row, (source, target) in enumerate(zip(names, warped, strict=True))
    ]


def _bounds(corners: Tensor) -> tuple[float, float, float, float]:
    (left, top), (right, bottom) = corners.amin(0).tolist(), corners.amax(0).tolist()
    return left, top, right, bottom
