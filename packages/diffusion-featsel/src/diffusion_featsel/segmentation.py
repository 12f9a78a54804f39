"""Scores of predicted segmentations: mIoU over the data set, pixel accuracy, and the IoU along boundaries."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from diffcore.metrics.segmentation import DataSetIoU
from diffusion_featsel.gram import IGNORED, require_labels

_BOUNDARY = 0.02  # half-width of a boundary, as a share of the image's diagonal


@dataclass(frozen=True)
class SegmentationScores:
    """How well the predicted classes of pixels agree with the true ones.

    Attributes:
        miou: Mean over the classes of the true labels of intersection over union, both summed over all images.
        pixel_accuracy: Share of pixels with the right class.
        per_class: Intersection over union of each class; NaN for those that no true label has.
        boundary_iou: The same mean, of the parts of each class that lie along its boundary.
    """

    miou: float
    pixel_accuracy: float
    per_class: tuple[float, ...]
    boundary_iou: float


def segmentation_scores(
    predicted: Int[Tensor, "b h w"], labels: Int[Tensor, "b h w"], num_classes: int
) -> SegmentationScores:
    """Compares predicted classes with labels.

    The mean is over the classes of the true labels: a class that is only predicted costs the others their intersection,
    but is no member of the mean. Published code counts absent classes as 0.

    Args:
        predicted: Predicted class of each pixel.
        labels: True class of each pixel, or 255 for pixels that do not count.
        num_classes: Number of classes of the labels.

    Raises:
        ValueError: A label does not exist.

    References:
        Everingham et al. 2015, section 4.2; boundary IoU: Cheng et al. 2021, equation 4, with 2 % of the diagonal.

    Example:
        >>> labels = torch.tensor([[[0, 0], [1, 1]]])
        >>> segmentation_scores(torch.tensor([[[0, 0], [0, 1]]]), labels, num_classes=3).per_class[:2]
        (0.6666666666666666, 0.5)
    """
    require_labels(labels, num_classes)
    metric = DataSetIoU(num_classes, ignore_label=IGNORED)
    metric.update(predicted, labels)
    confusion = metric.confusion.double()
    present = confusion.sum(1) > 0
    per_class = torch.where(present, metric.compute().per_class, torch.nan)
    accuracy = confusion.diagonal().sum() / confusion.sum()
    boundary = torch.stack([_boundary_iou(predicted, labels, c) for c in range(num_classes)])
    return SegmentationScores(
        float(per_class[present].mean()),
        float(accuracy),
        tuple(per_class.tolist()),
        float(boundary[present].nanmean()),
    )


def _boundary_iou(predicted: Tensor, labels: Tensor, index: int) -> Tensor:
    counted = labels != IGNORED
    found, true = (boundary_region((classes == index) & counted) for classes in (predicted, labels))
    return (found & true).sum().double() / (found | true).sum()


def boundary_region(masks: Bool[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Returns the pixels of masks within 2 % of the image's diagonal, at least one pixel, of the outside.

    The outside of the image is outside of the mask.

    Example:
        >>> boundary_region(torch.ones(1, 4, 4, dtype=torch.bool)).sum().item()
        12
    """
    height, width = masks.shape[1:]
    reach = max(round(_BOUNDARY * math.hypot(height, width)), 1)
    outside = F.pad((~masks).float(), (reach,) * 4, value=1.0)
    near = F.max_pool2d(outside[:, None], 2 * reach + 1, stride=1)[:, 0] > 0
    return masks & near
