"""Plain implementations that the fast ones are measured against, and held equal to."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
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


def left_out_error_by_refitting(
    features: Sequence[Float[Tensor, "n _ h w"]],
    labels: Int[Tensor, "n h w"],
    num_classes: int,
    num_pieces: int,
    strength: float,
) -> float:
    """Fits a ridge regression of one-hot labels to the pixels of all pieces but one, for each piece.

    Args:
        features: Maps (n, c, h, w) of each activation on the grid of the labels.
        labels: Class of each pixel.
        num_classes: Number of classes in the labels.
        num_pieces: Number of pieces that images are dealt to in turn.
        strength: Regularisation, as a share of the mean eigenvalue of the standardised channels.

    Returns:
        The sum of squared errors over classes and pixels, each of the fit that did not see the pixel's piece.
    """
    maps = torch.cat(list(features), 1).double().movedim(1, 3)
    targets = F.one_hot(labels.long(), num_classes).double()
    piece = torch.arange(len(maps)) % num_pieces
    error = 0.0
    for out in range(num_pieces):
        x, y = maps[piece != out].flatten(0, 2), targets[piece != out].flatten(0, 2)
        std, mean = torch.std_mean(x, 0, correction=0)
        mean_y = y.mean(0)
        x = (x - mean) / std
        a = x.T @ x
        lifted = a + strength * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)
        weight = torch.cholesky_solve(x.T @ (y - mean_y), torch.linalg.cholesky(lifted))
        predicted = ((maps[piece == out] - mean) / std) @ weight + mean_y
        error += float((predicted - targets[piece == out]).square().sum())
    return error
