"""Percentage of correct keypoints (PCK): how many predicted points lie close to the true ones.

A point is correct at `alpha` if its distance is at most `alpha` times the longer side of its box; the box is the
object's or the whole image's, whichever sizes are given.

References:
    Yang and Ramanan 2013; per point and per image as in Min et al. 2019 (SPair-71k) and what preceded it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diffcore.stats import ExactMetric, require_finite


class CorrectKeypoints(NamedTuple):
    """Shares in [0, 1] for each alpha: over all points, and as the mean over images of each image's share."""

    per_point: Float64[Tensor, " alphas"]
    per_image: Float64[Tensor, " alphas"]


def count_correct(
    predicted: Float[Tensor, "b points 2"],
    target: Float[Tensor, "b points 2"],
    box: Float[Tensor, "b 2"],
    alphas: Sequence[float],
    visible: Bool[Tensor, "b points"],
    first_row: int = 0,
) -> Float64[Tensor, "b alphas"]:
    """Returns how many keypoints of each image lie within `alpha` times the longer side of its box.

    Args:
        predicted: Predicted positions in pixels.
        target: True positions in pixels.
        box: Height and width of each image's box in pixels.
        alphas: Radii, as shares of the longer side of the box.
        visible: Whether each point counts.
        first_row: Index of the first image over the whole data set, for messages.

    Raises:
        ValueError: A point that counts is NaN or infinite, or a box is not larger than 0.

    Example:
        >>> points = torch.tensor([[[0.0, 0.0], [5.0, 5.0]]])
        >>> found = points + torch.tensor([[[1.0, 0.0], [0.0, 1.5]]])
        >>> count_correct(found, points, torch.tensor([[10.0, 8.0]]), (0.1, 0.2), points[..., 0] >= 0).tolist()
        [[1.0, 2.0]]
    """
    offset = torch.where(visible[..., None], predicted.double() - target.double(), 0.0)
    require_finite("keypoints", offset.flatten(1), first_row)
    side = box.double().amax(1)
    if not bool((side > 0).all() & side.isfinite().all()):
        raise ValueError(
            f"box {int((~(side > 0) | ~side.isfinite()).nonzero()[0])} has no size; give its height and width"
        )
    # 0.29 * 100 is a little below 29 in floating point: the border must not fall outside by rounding.
    radius = side[:, None, None] * torch.tensor(tuple(alphas), dtype=torch.float64, device=side.device)
    inside = offset.square().sum(-1, keepdim=True) <= radius.square() * (1 + 1e-12)
    return (inside & visible[..., None]).double().sum(1)


class PercentageCorrectKeypoints(ExactMetric):
    """Shares of points within `alpha` of the box, the border included; `compute` returns `CorrectKeypoints`.

    Args:
        alphas: Radii, as shares of the longer side of the box.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    correct: Tensor
    num_points: Tensor
    image_shares: Tensor
    num_images: Tensor

    def __init__(self, alphas: Sequence[float] = (0.1,), **options: Any) -> None:
        super().__init__(**options)
        if not alphas or min(alphas) <= 0:
            raise ValueError(f"`alphas` are {tuple(alphas)}; give at least one, each above 0")
        self.alphas = tuple(alphas)
        for name, shape in (
            ("correct", len(alphas)),
            ("image_shares", len(alphas)),
            ("num_points", ()),
            ("num_images", ()),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        predicted: Float[Tensor, "b points 2"],
        target: Float[Tensor, "b points 2"],
        box: Float[Tensor, "b 2"],
        visible: Bool[Tensor, "b points"] | None = None,
    ) -> None:
        """Adds the keypoints of a batch of images.

        Args:
            predicted: Predicted positions in pixels.
            target: True positions in pixels.
            box: Height and width of each image's box in pixels.
            visible: Whether each point counts; all by default. Images without any are left out.

        Raises:
            ValueError: A point that counts is NaN or infinite, or a box is not larger than 0.
        """
        counted = torch.ones_like(target[..., 0], dtype=torch.bool) if visible is None else visible
        correct = count_correct(predicted, target, box, self.alphas, counted, first_row=int(self.num_images))
        points = counted.sum(1)
        some = points > 0
        self.correct += correct.sum(0)
        self.num_points += points.sum()
        self.image_shares += (correct / points.clamp(min=1)[:, None]).sum(0)
        self.num_images += some.sum()

    def compute(self) -> CorrectKeypoints:
        """Returns the shares over all images seen, over all processes; NaN where no point was visible."""
        return CorrectKeypoints(self.correct / self.num_points, self.image_shares / self.num_images)
