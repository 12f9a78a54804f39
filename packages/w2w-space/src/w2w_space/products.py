"""Adapters compared by their changes B A, which no gauge touches; the products are never formed.

The inner product of B A and B' A' is the sum of the entries of (A A'^T) * (B^T B'), two matrices of rank x rank'.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from w2w_space.layout import Layout


def product_gram(
    layout: Layout,
    vectors: Float[Tensor, "n size"],
    others: Float[Tensor, "k _"] | None = None,
    other_layout: Layout | None = None,
) -> Float64[Tensor, "n k"]:
    """Returns the inner products of the adapters' changes B A, without forming them.

    Args:
        layout: Table of the vectors.
        vectors: Vectors, one row per adapter, in any gauge.
        others: Vectors of the adapters that they are compared with; by default the same.
        other_layout: Table of the others, of the same modules at another rank; by default the same.

    Example:
        >>> layout = Layout.of({"to_q": (4, 3)}, rank=1)
        >>> inner = product_gram(layout, torch.ones(2, 7))
        >>> inner.tolist()
        [[12.0, 12.0], [12.0, 12.0]]
    """
    others, other_layout = vectors if others is None else others, other_layout or layout
    total = torch.zeros(len(vectors), len(others), dtype=torch.float64)
    for place, (span, other_span) in enumerate(zip(layout.spans, other_layout.spans, strict=True)):
        down, up = layout.split(vectors[:, span].double(), place)
        down_, up_ = other_layout.split(others[:, other_span].double(), place)
        if layout.rank == other_layout.rank == 1:
            total += (down[:, 0] @ down_[:, 0].T) * (up[..., 0] @ up_[..., 0].T)
        else:
            total += torch.einsum("iac,jbc,ioa,job->ij", down, down_, up, up_)
    return total


def relative_distance(layout: Layout, one: Float[Tensor, " size"], other: Float[Tensor, " size"]) -> float:
    """Returns the Frobenius norm of the difference of two adapters' changes, divided by that of the first.

    Args:
        layout: Table of the vectors.
        one: Vector of the first adapter, in any gauge.
        other: Vector of the other.
    """
    apart = total = 0.0
    first, second = layout.factors(one.double()), layout.factors(other.double())
    for module, (down, up) in first.items():
        down_, up_ = second[module]
        own = _inner(down, up, down, up)
        apart += own - 2 * _inner(down, up, down_, up_) + _inner(down_, up_, down_, up_)
        total += own
    return math.sqrt(max(apart, 0.0) / total) if total > 0 else 0.0


def _inner(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor) -> float:
    """Returns the inner product of B A and B' A', through the small matrices A A'^T and B^T B'."""
    return float(((down @ other_down.T) * (up.T @ other_up)).sum())
