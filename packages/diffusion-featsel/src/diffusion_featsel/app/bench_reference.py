"""Plain implementations that the fast ones are measured against, and held equal to."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def match_by_brute_force(
    source: Mapping[str, Float[Tensor, "b _ _ _"]],
    target: Mapping[str, Float[Tensor, "b _ _ _"]],
    points: Float[Tensor, "b points 2"],
    *,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    weights: Mapping[str, float] | None = None,
) -> tuple[Float[Tensor, "b points 2"], Float[Tensor, "b points h w"]]:
    """Interpolates every channel to every pixel of the target, as published code does.

    Args:
        source: Activations (b, c, h, w) of the source images.
        target: The same activations of the target images.
        points: Positions (x, y) in pixels of the source images.
        source_size: Height and width of the source images.
        target_size: Height and width of the target images.
        weights: Factor of each activation before they are concatenated; 1 where it is missing.

    Returns:
        The pixel of the largest cosine for each point, and the cosines of all pixels.
    """
    sides = points.new_tensor([source_size[1], source_size[0]])
    grid = ((2 * points + 1) / sides - 1)[:, :, None]
    factors = [(weights or {}).get(name, 1.0) for name in source]
    columns = torch.cat(
        [
            factor * F.grid_sample(maps, grid.to(maps), padding_mode="border", align_corners=False)[..., 0]
            for factor, maps in zip(factors, source.values(), strict=True)
        ],
        1,
    )
    large = torch.cat(
        [
            factor * F.interpolate(target[name], size=target_size, mode="bilinear", align_corners=False)
            for factor, name in zip(factors, source, strict=True)
        ],
        1,
    )
    cosines = (F.normalize(columns, dim=1).transpose(1, 2) @ F.normalize(large, dim=1).flatten(2)).unflatten(
        2, target_size
    )
    best = cosines.flatten(2).argmax(2)
    return torch.stack([best % target_size[1], best // target_size[1]], -1).to(points.dtype), cosines
