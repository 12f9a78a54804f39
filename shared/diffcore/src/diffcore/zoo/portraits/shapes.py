"""Signed distances of the shapes that portraits are made of: negative inside, zero on the edge, in image half widths.

Positions are tensors `n h w`; sizes are numbers or tensors `n 1 1`, so that every person has their own.
"""

import torch
from torch import Tensor

Size = Tensor | float


def ellipse(x: Tensor, y: Tensor, radius_x: Size, radius_y: Size) -> Tensor:
    """Returns the approximate signed distance to an ellipse around the origin: exact on its edge."""
    level = torch.sqrt((x / radius_x).square() + (y / radius_y).square() + 1e-8) - 1
    return level * torch.minimum(_tensor(radius_x, x), _tensor(radius_y, x))


def box(x: Tensor, y: Tensor, half_width: Size, half_height: Size, corner: float) -> Tensor:
    """Returns the signed distance to a rectangle around the origin with rounded corners."""
    over_x, over_y = x.abs() - half_width + corner, y.abs() - half_height + corner
    outside = torch.sqrt(over_x.clamp(min=0).square() + over_y.clamp(min=0).square() + 1e-9)
    return outside + torch.maximum(over_x, over_y).clamp(max=0) - corner


def superellipse(x: Tensor, y: Tensor, radius_x: Size, radius_y: Size, power: Size, unit: Size) -> Tensor:
    """Returns the approximate signed distance to |x/rx|^p + |y/ry|^p = 1, scaled by `unit`."""
    return (((x.abs() / radius_x) ** power + (y.abs() / radius_y) ** power + 1e-8) ** (1 / power) - 1) * unit


def _tensor(size: Size, like: Tensor) -> Tensor:
    return torch.as_tensor(size, dtype=like.dtype)
