"""Kernel distance (KID): the squared maximum mean discrepancy of features under the cubic kernel `(a·b / d + 1)³`.

Unlike a Fréchet distance the estimate is unbiased: it may fall below 0, and for two samples of one distribution it is 0
on average, at any number of rows. All pairs of rows are used, where other tools average over random subsets.

References:
    Bińkowski et al. 2018, section 3; the unbiased estimate: Gretton et al. 2012, equation 3; the error: the
    delete-a-group jackknife, Kott 2001.
"""

import math
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.metrics.estimate import Estimate
from diffcore.metrics.rows import RealAndFake
from diffcore.stats import in_one_precision, require_finite

_ROWS = 2048  # per side of a chunk of the kernel matrix


def kernel_distance(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], *, blocks: int = 10) -> Estimate:
    """Returns the unbiased kernel distance, with a standard error from blocks of neighbouring rows.

    The error comes from leaving out one block at a time: rows that belong together, such as several seeds of one
    prompt, should be neighbours. It is NaN with fewer than three rows on a side.

    Args:
        real: Features of real images.
        fake: Features of generated images.
        blocks: Number of blocks per side for the standard error, at most one per row.

    Raises:
        ValueError: A side has fewer than two rows, or holds NaN or infinity.
    """
    if blocks < 2:
        raise ValueError(f"`blocks` is {blocks}; leaving one out needs at least 2")
    for name, features in (("real", real), ("fake", fake)):
        require_finite(f"{name} features", features)
        if len(features) < 2:
            raise ValueError(f"{name} has {len(features)} rows; a kernel distance needs at least 2")
    real, fake = in_one_precision(real, fake)
    x, y = (torch.tensor_split(side, min(blocks, len(side))) for side in (real, fake))
    within_real, within_fake, between = _within(x), _within(y), _sums(x, y)
    n, m = _lengths(x), _lengths(y)
    mean_real = within_real.sum() / (n.sum() * (n.sum() - 1))
    mean_fake = within_fake.sum() / (m.sum() * (m.sum() - 1))
    value = mean_real + mean_fake - 2 * between.sum() / (n.sum() * m.sum())
    without_real = _without_one(within_real, n) + mean_fake - 2 * _between_without_one(between, n, m)
    without_fake = mean_real + _without_one(within_fake, m) - 2 * _between_without_one(between.T, m, n)
    variance = sum(_jackknife_variance(values) for values in (without_real, without_fake))
    enough = min(len(real), len(fake)) > 2
    return Estimate(float(value), math.sqrt(float(variance)) if enough else math.nan, min(len(real), len(fake)))


class KernelDistance(RealAndFake):
    """`kernel_distance` of streamed features. Keeps them all; `compute` returns an `Estimate`.

    The value does not depend on the order of rows; its standard error does, as blocks are made of neighbours. Rows of
    several processes follow one another in order of rank.

    Args:
        blocks: Number of blocks per side for the standard error.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    def __init__(self, blocks: int = 10, **options: Any) -> None:
        super().__init__(**options)
        self.blocks = blocks

    def compute(self) -> Estimate:
        """Returns the distance of all rows seen, over all processes."""
        return kernel_distance(*self.both(), blocks=self.blocks)


def _within(blocks: tuple[Tensor, ...]) -> Float64[Tensor, "blocks blocks"]:
    """Returns kernel sums of all pairs of different rows of one side."""
    sums = _sums(blocks, blocks, symmetric=True)
    own = [_cube(block.square().sum(1), block.shape[1]).sum(dtype=torch.float64) for block in blocks]
    return sums - torch.stack(own).diag()


def _sums(
    first: tuple[Tensor, ...], second: tuple[Tensor, ...], *, symmetric: bool = False
) -> Float64[Tensor, "blocks others"]:
    """Returns the kernel's sum over the pairs of rows of each pair of blocks; half are computed where symmetric."""
    sums = torch.zeros(len(first), len(second), dtype=torch.float64, device=first[0].device)
    for (i, block), (j, other) in product(enumerate(first), enumerate(second)):
        if symmetric and j < i:
            sums[i, j] = sums[j, i]
            continue
        for rows, columns in product(block.split(_ROWS), other.split(_ROWS)):
            sums[i, j] += _cube(rows @ columns.T, rows.shape[1]).sum(dtype=torch.float64)
    return sums


def _cube(products: Tensor, width: int) -> Tensor:
    base = products / width + 1
    return base * base * base  # a general power costs more than the matrix product


def _lengths(blocks: tuple[Tensor, ...]) -> Float64[Tensor, " blocks"]:
    return torch.tensor([len(block) for block in blocks], dtype=torch.float64, device=blocks[0].device)


def _without_one(within: Tensor, n: Tensor) -> Float64[Tensor, " blocks"]:
    """Returns the mean over pairs of one side with each block left out in turn."""
    rest = n.sum() - n
    return (within.sum() - 2 * within.sum(1) + within.diagonal()) / (rest * (rest - 1))


def _between_without_one(between: Tensor, n: Tensor, m: Tensor) -> Float64[Tensor, " blocks"]:
    return (between.sum() - between.sum(1)) / ((n.sum() - n) * m.sum())


def _jackknife_variance(values: Tensor) -> Float64[Tensor, ""]:
    return (values - values.mean()).square().sum() * (len(values) - 1) / len(values)
