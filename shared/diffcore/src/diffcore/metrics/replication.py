"""Replication: how close generated images come to the training set, as cosines of copy-detection features.

References:
    Somepalli et al. 2023, section 4: SSCD features, the share of images with a similarity above 0.5.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from diffcore.metrics.rows import RealAndFake
from diffcore.stats import in_one_precision, require_finite

_IMAGES, _TRAIN = 2048, 8192  # rows of a chunk of the cosine matrix, and its columns


class Nearest(NamedTuple):
    """The nearest training images of each image, nearest first: cosines in [-1, 1], and rows of the training set."""

    cosine: Float[Tensor, "n k"]
    row: Int[Tensor, "n k"]


class Replication(NamedTuple):
    """The nearest cosine of each image: quantiles in the order asked for, and the share above the threshold."""

    quantiles: Float64[Tensor, " quantiles"]
    share: float
    n: int


def nearest_training_images(real: Float[Tensor, "m d"], fake: Float[Tensor, "n d"], *, k: int = 1) -> Nearest:
    """Returns the k training images most similar to each generated one; no more than chunks of the matrix are held.

    Args:
        real: Features of the training set.
        fake: Features of generated images.
        k: Number of training images to keep per image; at most as many as there are.

    Raises:
        ValueError: A side holds NaN, infinity or a row of zeros, or there is no training set.
    """
    if not 1 <= k <= len(real):
        raise ValueError(f"`k` is {k}; with {len(real)} real rows it must be from 1 to {len(real)}")
    real, fake = in_one_precision(real, fake)
    real, fake = _directions("real", real), _directions("fake", fake)
    parts = [_nearest(real, rows, k) for rows in fake.split(_IMAGES)]
    cosine, index = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Nearest(cosine.clamp(-1, 1), index)


class ReplicationScore(RealAndFake):
    """Quantiles and share of near copies among streamed features. Keeps them all; `compute` returns `Replication`.

    Features of training images are added as real ones.

    Args:
        threshold: Cosine above which an image is a copy; 0.5 is usual for SSCD.
        quantiles: Quantiles to report of the nearest cosine over images, each from 0 to 1.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    def __init__(
        self, *, threshold: float = 0.5, quantiles: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 1.0), **options: Any
    ) -> None:
        super().__init__(**options)
        if not all(0 <= quantile <= 1 for quantile in quantiles):
            raise ValueError(f"`quantiles` are {quantiles}; each must be from 0 to 1")
        self.threshold, self.quantiles = threshold, quantiles

    def compute(self) -> Replication:
        """Returns the scores of all images seen, over all processes."""
        cosine = nearest_training_images(*self.both()).cosine[:, 0]
        levels = torch.tensor(self.quantiles, dtype=torch.float64, device=cosine.device)
        share = (cosine > self.threshold).double().mean()
        return Replication(cosine.double().quantile(levels), float(share), len(cosine))


def _nearest(real: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merges the k best of each chunk of the training set into those of the chunks before."""
    cosine = rows.new_empty(len(rows), 0)
    index = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(real), _TRAIN):
        found, place = (rows @ real[start : start + _TRAIN].T).topk(min(k, len(real) - start, _TRAIN), dim=1)
        cosine, index = torch.cat([cosine, found], 1), torch.cat([index, place + start], 1)
        cosine, order = cosine.topk(min(k, cosine.shape[1]), dim=1)
        index = index.gather(1, order)
    return cosine, index


def _directions(name: str, features: Tensor) -> Tensor:
    require_finite(f"{name} features", features)
    zero = (features == 0).all(1).nonzero().flatten()
    if len(zero):
        raise ValueError(f"{name} features are all 0 in row {int(zero[0])}; they have no direction, leave the row out")
    return functional.normalize(features, dim=1, eps=0.0)
