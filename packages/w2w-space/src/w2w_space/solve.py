"""Principal components of a matrix that is read in column blocks, through inner products of its rows.

Z has a row for each of n members and d >> n columns, each with mean zero. The eigenvectors E of K = Z Z^T, n x n, with
eigenvalues lambda, give the components V = Z^T E / sqrt(lambda), orthonormal, and the coefficients Z V = E
sqrt(lambda). K is a sum over column blocks, and so is V's definition, so that two passes over the blocks are enough and
the whole matrix is never held. With more members than numbers, the same follows from Z^T Z, d x d, over blocks of rows.
Where both tables are too large, subspace iteration finds the leading eigenvectors from products
K Q = sum_b Z_b (Z_b^T Q).
"""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.sparse.linalg import eigsh
from torch import Tensor

Solver = Literal["gram", "covariance", "iterative"]
DENSE_UP_TO = 5000
"""Number of members up to which all eigenvectors are computed."""
TABLE_UP_TO = 20_000
"""Number of members, or else of numbers, up to which the inner products of all pairs are held in memory."""
_OVERSAMPLED, _PASSES = 1.2, 6
_TILES = 6  # of rows, in each direction
_ROUNDING = 1e-7  # of the largest eigenvalue: errors of float32 products are some hundred times smaller


def best_solver(members: int, numbers: int) -> Solver:
    """Returns the way with the smallest table of inner products, or the one without where each is too large.

    Args:
        members: Number of rows of the matrix.
        numbers: Number of columns of the matrix.
    """
    if min(members, numbers) > TABLE_UP_TO:
        return "iterative"
    return "gram" if members <= numbers else "covariance"


def sum_of(parts: Iterable[Tensor]) -> Float64[Tensor, "n k"]:
    """Returns the sum of tensors in float64.

    Args:
        parts: Tensors of one shape, at least one.
    """
    rest = iter(parts)
    total = next(rest).double().clone()
    for part in rest:
        total += part
    return total


def gram(blocks: Iterable[Float[Tensor, "n _"]], members: int) -> Float64[Tensor, "n n"]:
    """Returns the inner products of all rows: products of float32 blocks, summed in float64.

    Args:
        blocks: Column blocks of the matrix.
        members: Number of rows of the matrix.

    Example:
        >>> z = torch.randn(4, 6)
        >>> torch.allclose(gram(z.split(2, 1), 4), (z @ z.T).double(), atol=1e-5)
        True
    """
    total = torch.zeros(members, members, dtype=torch.float64)
    tiles = [slice(start, start + size) for size in (-(-members // _TILES),) for start in range(0, members, size)]
    for block in blocks:
        for place, rows in enumerate(tiles):
            for columns in tiles[place:]:
                total[rows, columns] += block[rows] @ block[columns].T
    # Tiles below the diagonal are those above it: a symmetric product costs half.
    for place, rows in enumerate(tiles):
        for columns in tiles[place + 1 :]:
            total[columns, rows] = total[rows, columns].T
    return total


def leading(inner: Float64[Tensor, "n n"], count: int) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "n m"]]:
    """Returns the largest eigenvalues of inner products, falling, and their eigenvectors; rounding errors are left out.

    Args:
        inner: Symmetric matrix of inner products.
        count: Largest number of eigenvalues.
    """
    n = len(inner)
    if n <= DENSE_UP_TO or count > n // 4:
        values, vectors = torch.linalg.eigh(inner)
    else:
        start = np.random.default_rng(0).standard_normal(n)
        found = eigsh(inner.cpu().numpy(), k=count, which="LA", v0=start)
        values, vectors = (torch.from_numpy(np.ascontiguousarray(part)).to(inner.device) for part in found)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    kept = int((values > _ROUNDING * values[:1]).sum()) if len(values) else 0
    return values[:kept], vectors[:, :kept]


def leading_iteratively(
    multiplied: Callable[[Float64[Tensor, "n k"]], Float64[Tensor, "n k"]], members: int, count: int
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "n m"]]:
    """Returns the same as `leading`, without the matrix of inner products, by subspace iteration.

    Exact where the spectrum falls off behind the last component; on a flat tail the last components turn within their
    equals, as those of any randomised solver do.

    Args:
        multiplied: Function that returns K Q, the inner products times a matrix.
        members: Number of rows of the matrix.
        count: Number of eigenvalues to find.
    """
    width = min(members, int(count * _OVERSAMPLED) + 10)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(members, width, generator=generator, dtype=torch.float64)).Q
    image = multiplied(basis)
    for _ in range(_PASSES - 1):
        basis = torch.linalg.qr(image).Q
        image = multiplied(basis)
    values, turned = torch.linalg.eigh((basis.T @ image + image.T @ basis) / 2)
    values, vectors = values.flip(0)[:count], basis @ turned.flip(1)[:, :count]
    kept = int((values > _ROUNDING * values[:1]).sum())
    return values[:kept], vectors[:, :kept]


def signed(components: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """Returns components whose entry of largest magnitude is positive, so that two computations agree, and the signs.

    Args:
        components: Components with whatever signs; they are changed in place.
    """
    largest = components.abs().argmax(1, keepdim=True)
    signs = torch.where(components.gather(1, largest) < 0, -1.0, 1.0).to(components)
    return components.mul_(signs), signs[:, 0]
