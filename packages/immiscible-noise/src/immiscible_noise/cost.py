"""What it costs to pair image i with noise j, for all pairs of a batch at once.

The squared distance ``|x_i - n_j|^2 = |x_i|^2 + |n_j|^2 - 2 <x_i, n_j>`` loses its first two terms in an assignment:
every permutation pays them alike. One matrix product is left, and the optimum depends neither on the mean nor on the
scale of the images. The unsquared distance, which the paper uses, keeps all three terms.
"""

from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Cost = Literal["sq", "l2", "l1"]
Precision = Literal["float32", "bfloat16"]
_LARGE = 2**22  # multiplications; below, preparing the product costs what it saves


def cost_matrix(
    x: Float[Tensor, "b d"],
    noise: Float[Tensor, "m d"],
    *,
    cost: Cost = "sq",
    mask: Bool[Tensor, "b d"] | None = None,
    precision: Precision = "float32",
) -> Float[Tensor, "b m"]:
    """Returns the cost of every pair, on the device of the inputs and in float32 (float64 if an input is).

    Args:
        x: Images, one flattened row each.
        noise: Gaussian noise, one flattened row each.
        cost: "sq" gives ``-<x_i, n_j>``, the squared L2 distance up to terms that no permutation changes and a factor
            of two; "l2" the distance of the paper's Algorithm 1; "l1" the sum of absolute differences.
        mask: False where ``x`` is padding. Padding of row i takes no part in the costs of row i.
        precision: Number format of the factors of the matrix product; its sums are float32 either way.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, noise.dtype), torch.float32)
    x, noise = x.to(dtype), noise.to(dtype)
    padding = None if mask is None else (~mask).to(dtype)
    if mask is not None:
        x = x.masked_fill(~mask, 0)
    # Inside a training step autocast may be on; half-precision costs would lose most of what an assignment gains.
    with torch.autocast(x.device.type, enabled=False):
        if cost == "l1":
            distances = torch.cdist(x, noise, p=1.0)
            return distances if padding is None else distances - padding @ noise.abs().T
        inner = _inner_products(x, noise, precision)
        if cost == "sq":
            return inner.neg_()
        energy = noise.square()
        squared = inner.mul_(-2).add_(x.square().sum(1)[:, None]).add_(energy.sum(1))
        if padding is not None:
            squared -= padding @ energy.T
        return squared.clamp_min_(0).sqrt_()


def pair_costs(
    x: Float[Tensor, "b d"],
    noise: Float[Tensor, "b d"],
    *,
    cost: Cost = "sq",
    mask: Bool[Tensor, "b d"] | None = None,
) -> Float[Tensor, "b"]:
    """Returns the cost of each image with the noise in its own row: squared L2, L2 or L1 distance.

    Padding counts as `cost_matrix` counts it: as zeros in ``x`` for "sq", not at all for "l2" and "l1".
    """
    difference = (x if mask is None else x.masked_fill(~mask, 0)).float() - noise.float()
    if mask is not None and cost != "sq":
        difference = difference.masked_fill(~mask, 0)
    if cost == "l1":
        return difference.abs().sum(1)
    norms = torch.linalg.vector_norm(difference, dim=1)
    return norms.square() if cost == "sq" else norms


def _inner_products(x: Tensor, noise: Tensor, precision: Precision) -> Tensor:
    if precision == "bfloat16":
        return (x.bfloat16() @ noise.bfloat16().T).to(x.dtype)
    product = _wide_product() if _on_host_in_float32(x, noise) else None
    if product is None:
        return x @ noise.T
    return product(x.contiguous(), noise.contiguous(), None, "none", [], "")


def _on_host_in_float32(x: Tensor, noise: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or noise.requires_grad)
    large = len(x) * noise.numel() >= _LARGE
    return x.device.type == "cpu" and x.dtype == torch.float32 and large and not needs_gradient


@cache
def _wide_product() -> Any:
    """Returns oneDNN's product of one matrix with another's transpose; None where it has nothing over torch's own.

    Both sum in float32. On processors that are not Intel's, torch's own (MKL) leaves half of an AVX-512 unit idle.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    # What torch's compiler turns a linear layer into; there is no public name that takes plain tensors.
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
