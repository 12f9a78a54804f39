"""Intersection over union of segmentations, summed over the whole data set."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Integer
from torch import Tensor

from diffcore.stats import ExactMetric


class IntersectionOverUnion(NamedTuple):
    """Mean over the classes that occur, and each class's; a class that is nowhere, true or predicted, is NaN."""

    mean: Float64[Tensor, ""]
    per_class: Float64[Tensor, " classes"]


class DataSetIoU(ExactMetric):
    """The mean IoU of the data set: intersections and unions are summed over all images before they are divided.

    This is the number of the segmentation literature. The mean of each image's own IoU, as torchmetrics' `MeanIoU` has
    it, is another: small objects weigh more there. Classes that occur nowhere are left out of the mean.

    Args:
        num_classes: Number of classes in the labels.
        ignore_label: Label of pixels that do not count, such as 255.
        options: Keyword arguments of `torchmetrics.Metric`.

    References:
        Everingham et al. 2015 (the PASCAL challenge), section 4.2.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, *, ignore_label: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.ignore_label = num_classes, ignore_label
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Integer[Tensor, "b *grid"], label: Integer[Tensor, "b *grid"]) -> None:
        """Adds the segmentations of a batch of images.

        Args:
            predicted: Class of each pixel.
            label: True class of each pixel, or `ignore_label`.

        Raises:
            ValueError: A class is not from 0 to `num_classes` - 1.
        """
        counted = torch.ones_like(label, dtype=torch.bool) if self.ignore_label is None else label != self.ignore_label
        label, predicted = label[counted].long(), predicted[counted].long()
        for name, values in (("label", label), ("predicted", predicted)):
            low, high = torch.stack(values.aminmax()).tolist() if len(values) else (0, 0)
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{name} has classes from {low} to {high}; they must be from 0 to {self.num_classes - 1}"
                )
        pairs = torch.bincount(label * self.num_classes + predicted, minlength=self.num_classes**2)
        self.confusion += pairs.view(self.num_classes, self.num_classes)

    def compute(self) -> IntersectionOverUnion:
        """Returns the scores of all pixels seen, over all processes; the mean is NaN if there were none."""
        confusion = self.confusion.double()
        hit = confusion.diagonal()
        per_class = hit / (confusion.sum(0) + confusion.sum(1) - hit)  # 0 / 0 where a class is nowhere
        return IntersectionOverUnion(per_class.nanmean(), per_class)
