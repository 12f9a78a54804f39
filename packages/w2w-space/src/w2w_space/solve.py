"""Principal components of a matrix that is read in column blocks, through inner products of its rows.

Z has a row for each of n members and d >> n columns, each with mean zero. The eigenvectors E of K = Z Z^T, n x n, with
eigenvalues lambda, give the components V = Z^T E / sqrt(lambda), orthonormal, and the coefficients Z V = E
sqrt(lambda). K is a sum over column blocks, and so is V's definition, so that two passes over the blocks are enough and
the whole matrix is never held. Where n x n numbers are too many, subspace iteration finds the leading eigenvectors from
products K Q = sum_b Z_b (Z_b^T Q).
"""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.sparse.linalg import eigsh
from torch import Tensor

Solver = Literal["gram", "iterative"]
Blocks = Callable[[], Iterable[Tensor]]
"""Goes through the column blocks of Z once; each block has all rows."""
DENSE_UP_TO = 5000
"""Number of members up to which all eigenvectors are computed."""
GRAM_UP_TO = 20_000
"""Number of members up to which the inner products of all pairs are held in memory."""
_OVERSAMPLED, _PASSES = 1.2, 6


def gram(blocks: Iterable[Float[Tensor, "n _"]], members: int) -> Float64[Tensor, "n n"]:
    """Returns the inner products of all rows: products of float32 blocks, summed in float64.

    Args:
        blocks: Column blocks of the matrix.
        members: Number of rows.

    Example:
        >>> z = torch.randn(4, 6)
        >>> torch.allclose(gram(z.split(2, 1), 4), (z @ z.T).double(), atol=1e-5)
        True
    """
    total = None
    for block in blocks:
        products = (block @ block.T).double()
        total = products if total is None else total.add_(products)
    return torch.zeros(members, members, dtype=torch.float64) if total is None else total


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
    kept = int((values > n * torch.finfo(torch.float32).eps * values[:1]).sum()) if len(values) else 0
    return values[:kept], vectors[:, :kept]


def leading_iteratively(
    blocks: Blocks, members: int, count: int, device: torch.device | str = "cpu"
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "n m"]]:
    """Returns the same as `leading`, without the matrix of inner products, by subspace iteration over the blocks.

    Exact where the spectrum falls off behind the last component; on a flat tail the last components turn within their
    equals, as those of any randomised solver do.

    Args:
        blocks: Column blocks of the matrix.
        members: Number of rows.
        count: Number of eigenvalues.
        device: Device that computes.
    """
    width = min(members, int(count * _OVERSAMPLED) + 10)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(members, width, generator=generator, dtype=torch.float64)).Q.to(device)
    image = basis
    for _ in range(_PASSES):
        basis = torch.linalg.qr(image).Q
        image = torch.zeros_like(basis)
        small = basis.float()
        for block in blocks():
            image += (block @ (block.T @ small)).double()
    values, turned = torch.linalg.eigh((basis.T @ image + image.T @ basis) / 2)
    values, vectors = values.flip(0)[:count], basis @ turned.flip(1)[:, :count]
    kept = int((values > members * torch.finfo(torch.float32).eps * values[:1]).sum())
    return values[:kept], vectors[:, :kept]


def components(
    blocks: Iterable[Float[Tensor, "n _"]], values: Float64[Tensor, " m"], vectors: Float64[Tensor, "n m"]
) -> tuple[Float[Tensor, "m d"], Float64[Tensor, " m"]]:
    """Returns the principal components V^T, and the sign that each eigenvector must be multiplied by.

    The entry of largest magnitude of each component is positive, so that two computations agree.

    Args:
        blocks: Column blocks of the matrix.
        values: Eigenvalues of the inner products.
        vectors: Their eigenvectors.
    """
    weights = (vectors / values.sqrt()).float()
    found = torch.cat([weights.T @ block for block in blocks], 1)
    largest = found.abs().argmax(1, keepdim=True)
    signs = torch.where(found.gather(1, largest) < 0, -1.0, 1.0)
    return found.mul_(signs), signs[:, 0].double()
