"""The data of the demo: 1797 real handwritten digits, 8x8, that scikit-learn carries."""

from typing import cast

import torch

from diffcore.data import ImageSet


def load_digits() -> ImageSet:
    """Returns the digits as grey images with their labels.

    References:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits as bundled
    from sklearn.utils import Bunch

    data = cast(Bunch, bundled())
    images = torch.as_tensor(data.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    return ImageSet(
        images=images,
        labels=torch.as_tensor(data.target, dtype=torch.int64),
        classes=tuple(str(digit) for digit in range(10)),
        names=tuple(f"digits/{i:04d}" for i in range(len(images))),
        skipped=(),
    )


def digits_inputs(images: ImageSet) -> dict[str, str]:
    """Returns name and sha256 of the digits, for a run's record."""
    return {"digits": images.sha256}
