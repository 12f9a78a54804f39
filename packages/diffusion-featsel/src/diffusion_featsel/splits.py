"""Random splits of labelled images into training and test images."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusion_featsel.gram import IGNORED

_TRIES = 20


@dataclass(frozen=True)
class Split:
    """Indices of training and test images.

    Attributes:
        train: Indices of the training images.
        test: Indices of the test images.
        missing: Classes that test images have and no training image has.
    """

    train: tuple[int, ...]
    test: tuple[int, ...]
    missing: tuple[int, ...] = ()


def image_splits(
    labels: Int[Tensor, "b *grid"],
    num_classes: int,
    *,
    num_train: int | None = None,
    num_splits: int = 5,
    seed: int = 0,
) -> tuple[Split, ...]:
    """Deals images to training and test, several times at random.

    A split whose training images lack a class of its test images is drawn again, 20 times at most; then the classes are
    named in a warning, and in the split.

    Args:
        labels: Class of each pixel or image, or 255 for those that do not count.
        num_classes: Number of classes of the labels.
        num_train: Number of training images; two thirds of all by default.
        num_splits: Number of random splits.
        seed: Seed of the random order.

    Raises:
        ValueError: Training or test would have no image.

    Example:
        >>> labels = torch.arange(2).repeat(5)
        >>> [len(split.train) for split in image_splits(labels, num_classes=2, num_splits=2)]
        [7, 7]
    """
    num_train = round(len(labels) * 2 / 3) if num_train is None else num_train
    if not 0 < num_train < len(labels):
        raise ValueError(f"`num_train` is {num_train} of {len(labels)} images; leave at least one for each side")
    classes = classes_of(labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    return tuple(_split(classes, num_train, generator) for _ in range(num_splits))


def classes_of(labels: Int[Tensor, "b *grid"], num_classes: int) -> Bool[Tensor, "b classes"]:
    """Returns which classes each image has."""
    flat = labels.flatten(1) if labels.ndim > 1 else labels[:, None]
    found = torch.zeros(len(flat), num_classes + 1, dtype=torch.bool, device=labels.device)
    found.scatter_(1, torch.where(flat == IGNORED, num_classes, flat).long(), value=True)
    return found[:, :num_classes].cpu()


def _split(classes: Tensor, num_train: int, generator: torch.Generator) -> Split:
    train, test, missing = Tensor(), Tensor(), [0]
    for _ in range(_TRIES):
        order = torch.randperm(len(classes), generator=generator)
        train, test = order[:num_train].sort().values, order[num_train:].sort().values
        missing = (classes[test].any(0) & ~classes[train].any(0)).nonzero().flatten().tolist()
        if not missing:
            break
    else:
        warnings.warn(f"no training image has the classes {missing}; add images that have them", stacklevel=4)
    return Split(tuple(train.tolist()), tuple(test.tolist()), tuple(missing))
