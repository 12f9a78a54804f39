"""Bilinear interpolation of maps as a linear operation: its matrices, and the squared norms of its results.

Cell i of an axis with n cells reaches over the share [i / n, (i + 1) / n] of the image, and holds the value at its
centre; beyond the outermost centres, the border's value goes on. This is `torch.nn.functional.interpolate` with
`align_corners=False`.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_CHUNK = 2**18  # numbers of a map that are in double precision at one time


def centres(cells: int) -> Float64[Tensor, " cells"]:
    """Returns where the cells of an axis have their centres, as shares of the side.

    Example:
        >>> centres(2).tolist()
        [0.25, 0.75]
    """
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def weights_at(positions: Float[Tensor, "*batch"], cells: int) -> Float64[Tensor, "*batch cells"]:
    """Returns the weight of each cell in the values at some positions along one axis.

    Args:
        positions: Positions on the axis, as shares of the side.
        cells: Number of cells on the axis.

    Example:
        >>> weights_at(torch.tensor([0.0, 0.5]), 2).tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    before, share = corners(positions, cells)
    weights = torch.zeros(*positions.shape, cells, dtype=torch.float64, device=positions.device)
    weights.scatter_(-1, before[..., None], 1 - share[..., None])
    return weights.scatter_add_(-1, (before[..., None] + 1).clamp(max=cells - 1), share[..., None])


def corners(positions: Float[Tensor, "*batch"], cells: int) -> tuple[Tensor, Float64[Tensor, "*batch"]]:
    """Returns the cell before each position along one axis, and the weight of the cell after it.

    Args:
        positions: Positions on the axis, as shares of the side.
        cells: Number of cells on the axis.
    """
    place = (positions.double() * cells - 0.5).clamp(0, cells - 1)
    before = place.floor().clamp(max=max(cells - 2, 0)).long()
    return before, place - before


def values_at(maps: Float[Tensor, "b c h w"], positions: Float[Tensor, "b k 2"]) -> Float[Tensor, "b k c"]:
    """Returns the interpolated columns of maps at any positions.

    Args:
        maps: Maps of channels at native size.
        positions: Positions (x, y), as shares of width and height.
    """
    return sampled(maps, *sampling(positions, (maps.shape[2], maps.shape[3])))


def sampling(
    positions: Float[Tensor, "b k 2"], grid: tuple[int, int]
) -> tuple[Int[Tensor, "b corners"], Float64[Tensor, "b corners"]]:
    """Returns the four cells around each position, counted row by row, and their weights.

    Args:
        positions: Positions (x, y), as shares of width and height.
        grid: Rows and columns of the maps.
    """
    height, width = grid
    x, right = corners(positions[..., 0], width)
    y, below = corners(positions[..., 1], height)
    next_x, next_y = (x + 1).clamp(max=width - 1), (y + 1).clamp(max=height - 1)
    cells = torch.cat([y * width + x, y * width + next_x, next_y * width + x, next_y * width + next_x], 1)
    left, above = 1 - right, 1 - below
    return cells, torch.cat([above * left, above * right, below * left, below * right], 1)


def sampled(
    maps: Float[Tensor, "b c h w"], cells: Int[Tensor, "b corners"], weights: Float64[Tensor, "b corners"]
) -> Float[Tensor, "b k c"]:
    """Returns the columns of maps at the positions that `sampling` was given.

    Args:
        maps: Maps of channels at native size.
        cells: The four cells around each position.
        weights: Weights of these cells.
    """
    corner = maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1))
    values = (corner * weights[:, None].to(maps.dtype)).unflatten(2, (4, cells.shape[1] // 4))
    return values.sum(2).transpose(1, 2)


def squared_norms(
    maps: Float[Tensor, "b c h w"], rows: Float64[Tensor, " gh"], columns: Float64[Tensor, " gw"]
) -> Float64[Tensor, "b gh gw"]:
    """Returns |F(p)|^2 of interpolated maps at every place of a grid, without interpolating a channel.

    F(p) is a weighted sum of the four cells around p. Its squared norm therefore needs only the inner products of each
    cell with itself and with its neighbours to the right, below, and on both diagonals; they are the same for all
    places between the same four cells.

    Args:
        maps: Maps of channels at native size.
        rows: Positions of the grid's rows, as shares of the height.
        columns: Positions of the grid's columns, as shares of the width.

    Example:
        >>> maps = torch.rand(1, 5, 2, 3, dtype=torch.float64)
        >>> large = torch.nn.functional.interpolate(maps, size=(8, 9), mode="bilinear")
        >>> bool(torch.allclose(squared_norms(maps, centres(8), centres(9)), large.square().sum(1)))
        True
    """
    down, along = (
        _pair_weights(axis.to(maps.device), n) for axis, n in zip((rows, columns), maps.shape[2:], strict=True)
    )
    return _from_products(maps, down, along)


def squared_norms_at_centres(maps: Float[Tensor, "b c h w"], grid: tuple[int, int]) -> Float64[Tensor, "b gh gw"]:
    """Returns `squared_norms` at the centres of a grid of places.

    Args:
        maps: Maps of channels at native size.
        grid: Number of rows and columns of places.
    """
    weights = (_pair_weights_at_centres(n, cells) for n, cells in zip(grid, maps.shape[2:], strict=True))
    down, along = (axis.to(maps.device) for axis in weights)
    return _from_products(maps, down, along)


def _from_products(maps: Tensor, down: Tensor, along: Tensor) -> Tensor:
    each = max(_CHUNK // max(maps[:, 0].numel(), 1), 1)
    products = sum(_products(part.double()) for part in maps.split(each, 1))
    return (down @ products @ along.transpose(0, 1)).clamp(min=0)


@lru_cache(maxsize=64)
def _pair_weights_at_centres(places: int, cells: int) -> Tensor:
    return _pair_weights(centres(places), cells)


def _products(maps: Tensor) -> Tensor:
    """Returns inner products of neighbouring cells (b, 2h, 2w): cells with themselves come first, then with the next.

    A pair in one direction stands in the quarter of this direction; the last quarter holds half the sum of both
    diagonals, since a pair of rows and a pair of columns meet in two pairs of opposite corners.
    """
    height, width = maps.shape[2:]
    products = maps.new_zeros(len(maps), 2 * height, 2 * width)
    products[:, :height, :width] = maps.square().sum(1)
    products[:, :height, width:-1] = (maps[..., 1:] * maps[..., :-1]).sum(1)
    products[:, height:-1, :width] = (maps[..., 1:, :] * maps[..., :-1, :]).sum(1)
    falling = (maps[..., :-1, :-1] * maps[..., 1:, 1:]).sum(1)
    rising = (maps[..., 1:, :-1] * maps[..., :-1, 1:]).sum(1)
    products[:, height:-1, width:-1] = (falling + rising) / 2
    return products


def _pair_weights(places: Tensor, cells: int) -> Tensor:
    """Returns the weights of products along one axis: l_i^2 of each cell, and 2 l_i l_(i+1) of each pair."""
    weights = weights_at(places, cells)
    pairs = torch.zeros_like(weights)
    pairs[:, :-1] = 2 * weights[:, :-1] * weights[:, 1:]
    return torch.cat([weights.square(), pairs], 1)
