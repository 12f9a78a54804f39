"""Select noise near each image out of k candidates: no solver, no communication, works at batch size one.

Y. Li et al., "Improved Immiscible Diffusion: Accelerate Diffusion Training by Reducing Its Miscibility", 2025.
Selection discards noise, so that what remains is not exactly Gaussian: the published score prefers short noise, both
scores widen it along the data's main directions. Prefer `assign_noise` where a batch can be looked at.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .draw import draw_noise
from .validate import check_choice, check_images, non_finite_message

Score = Literal["l2", "inner"]


def select_noise(
    x: Float[Tensor, "b *data"],
    k: int = 4,
    *,
    score: Score = "l2",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b *data"]:
    """Draws k noises for each image and returns the nearest.

    Candidates are drawn one after the other and only the best so far is kept: memory does not grow with ``k``, and
    ``k=1`` is an ordinary draw bit for bit.

    Args:
        x: Clean batch, any floating type, at least one row.
        k: Candidates per image. The paper uses 4 for flow matching and 8 for DDIM on CIFAR-10, 64 for latents of
            Stable Diffusion.
        score: "l2" keeps the nearest, as published; "inner" keeps the largest inner product, which leaves the noise's
            mean square norm nearly right.
        generator: Source of the noise; may live on another device than ``x``.

    Raises:
        ValueError: For integer types, an empty batch, k below 1, an unknown score, and, on the CPU only (it would
            make an accelerator wait), images with NaN or infinity.
    """
    check_images(x)
    check_choice("score", score, Score)
    if len(x) == 0:
        raise ValueError("x has no rows, so there is no image to select noise for")
    if k < 1:
        raise ValueError(f"k is {k}; at least one noise per image is needed")
    with torch.no_grad():
        best = draw_noise(x, generator)
        if k == 1:
            return best
        images = x.detach().reshape(len(x), -1).float()
        best_badness = _badness(images, best, score)
        if x.device.type == "cpu" and not torch.isfinite(best_badness).all():
            raise ValueError(non_finite_message(x=x))
        for _ in range(k - 1):
            candidate = draw_noise(x, generator)
            badness = _badness(images, candidate, score)
            better = (badness < best_badness).reshape(-1, *[1] * (x.ndim - 1))
            best = torch.where(better, candidate, best)
            best_badness = torch.minimum(badness, best_badness)
        return best


def _badness(images: Float[Tensor, "b d"], noise: Float[Tensor, "b *data"], score: Score) -> Float[Tensor, "b"]:
    """Returns what the chosen noise has least of: the squared distance without the image's own norm, or ``-<x, n>``."""
    flat = noise.reshape(images.shape).float()
    inner = torch.linalg.vecdot(images, flat)
    return -inner if score == "inner" else torch.linalg.vecdot(flat, flat) - 2 * inner
