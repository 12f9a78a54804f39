"""The data of the demo: 1797 real handwritten digits, 8x8, that scikit-learn carries."""

import torch

from diffcore.data import ImageSet
from diffcore.zoo.digits import data


def load_digits() -> ImageSet:
    """Returns the digits as grey images with their labels; see `diffcore.zoo.digits.data` for their source."""
    ink, labels = data.load_digits()
    images = (255 * ink).round().to(torch.uint8)
    return ImageSet(images, labels, data.DIGITS, tuple(f"digits/{i:04d}" for i in range(len(images))))
