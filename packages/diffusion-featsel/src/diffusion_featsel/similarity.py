"""Linear CKA: how alike two activations are, up to rotation and scale of their channels.

With K and L the matrices of inner products of m samples under two activations, CKA = HSIC(K, L) / sqrt(HSIC(K, K)
HSIC(L, L)). HSIC is estimated without bias: with the plain estimate, activations with more channels than there are
samples would all look alike.

References:
    Kornblith et al. 2019, equation 3; Song et al. 2012, equation 5 (the unbiased estimate).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.sums import Sums
from diffusion_featsel.views import Views

IMAGES, SIDE = 16, 4
"""Number of images that are kept as samples, and rows and columns of places in each."""


@dataclass
class Samples(Sums):
    """Values of an activation at 16 places of the first 16 images, averaged over both draws.

    Attributes:
        values: One row per image and place; zero where no image was seen.
    """

    values: Float[Tensor, "m c"]

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> "Samples":
        """Returns samples of no image.

        Args:
            channels: Number of channels of the activation.
            device: Device that the samples are kept on.
        """
        return cls(torch.zeros(IMAGES * SIDE**2, channels, device=device))

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation.
        """
        first = views.batch.first
        count = min(IMAGES - first, len(views.batch))
        if count <= 0:
            return
        coarse = F.adaptive_avg_pool2d(views.draws[:, :count].mean(0), SIDE)
        rows = slice(first * SIDE**2, (first + count) * SIDE**2)
        self.values[rows] = coarse.flatten(2).transpose(1, 2).flatten(0, 1)


def cka_matrix(samples: Sequence[Float[Tensor, "m _"]]) -> Float[Tensor, "a a"]:
    """Returns the linear CKA of each pair of activations, from about 0 to 1; NaN for constant ones.

    Args:
        samples: Values of each activation on the same m samples, at least 4.

    Raises:
        ValueError: There are fewer than four samples.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 8)
        >>> rotation = torch.linalg.qr(torch.randn(8, 8)).Q
        >>> round(float(cka_matrix([x, 3 * x @ rotation])[0, 1]), 3)
        1.0
    """
    if len(samples[0]) < 4:
        raise ValueError(f"there are {len(samples[0])} samples; an unbiased CKA needs at least 4")
    rows = samples[0].new_empty(len(samples), len(samples[0]) ** 2, dtype=torch.float32)
    for row, values in zip(rows, samples, strict=True):
        row.copy_(_centered(values).flatten())
    products = rows @ rows.T
    own = products.diagonal().clamp(min=0).sqrt()
    return products / torch.outer(own, own)


def _centered(values: Tensor) -> Tensor:
    """Returns inner products of samples, centered such that products of two of them estimate HSIC without bias."""
    values = values.float() - values.float().mean(0)
    values = values / values.square().sum().sqrt().clamp(min=1e-30)
    gram = values @ values.T
    gram.fill_diagonal_(0)
    m = len(gram)
    row = gram.sum(0) / (m - 2)
    centered = gram - row[:, None] - row[None] + gram.sum() / ((m - 1) * (m - 2))
    return centered.fill_diagonal_(0)
