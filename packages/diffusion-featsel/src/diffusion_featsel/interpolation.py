"""Bilinear interpolation of maps as a linear operation: its matrices, and the squared norms of its results.

Cell i of an axis with n cells reaches over the share [i / n, (i + 1) / n] of the image, and holds the value at its
centre; beyond the outermost centres, the border's value goes on. This is `torch.nn.functional.interpolate` with
`align_corners=False`.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_CHUNK = 2**22  # numbers of a map that are in double precision at one time


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
    height, width = maps.shape[2:]
    columns = maps.flatten(2)
    x, right = corners(positions[..., 0], width)
    y, below = corners(positions[..., 1], height)
    values = maps.new_zeros(())
    for down, weight_y in ((0, 1 - below), (1, below)):
        for along, weight_x in ((0, 1 - right), (1, right)):
            cell = (y + down).clamp(max=height - 1) * width + (x + along).clamp(max=width - 1)
            corner = columns.gather(2, cell[:, None].expand(-1, columns.shape[1], -1))
            values = values + corner * (weight_y * weight_x)[:, None].to(maps.dtype)
    return values.transpose(1, 2)


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
    each = max(_CHUNK // max(maps[:, 0].numel(), 1), 1)
    products = sum(_products(part.double()) for part in maps.split(each, 1))
    down, along = (
        _pair_weights(axis.to(maps.device), n) for axis, n in zip((rows, columns), maps.shape[2:], strict=True)
    )
    return (down @ products @ along.transpose(0, 1)).clamp(min=0)


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
