"""Dual potentials on the device, which make the exact solver's work on the host small.

Subtracting a number per row and a number per column changes every permutation's cost alike. With the potentials of an
entropic optimal transport problem as those numbers, nearly all of the matching is already visible in the zeros of what
remains, and an exact solver only has to settle the rest.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def reduced_costs(
    costs: Float[Tensor, "b b"],
    allowed: Bool[Tensor, "b b"] | None = None,
    *,
    sweeps: int = 15,
) -> Float[Tensor, "b b"]:
    """Returns non-negative costs with the same optimal permutations, close to zero along them.

    Log-domain Sinkhorn sweeps with uniform marginals and a temperature of a tenth of the costs' standard deviation;
    then row and column minima go. Nothing waits for the device.

    Args:
        costs: Square costs.
        allowed: True where row i may take column j; the rest becomes infinite. Must split into square blocks.
        sweeps: Pairs of row and column updates. More sweeps leave the host less to do; the optimum never changes.
    """
    allowed = torch.ones_like(costs, dtype=torch.bool) if allowed is None else allowed
    temperature = _temperature(costs, allowed)
    scaled = (-costs / temperature).masked_fill_(~allowed, -torch.inf)
    rows = columns = costs.new_zeros(len(costs))
    for _ in range(sweeps):
        rows = -torch.logsumexp(scaled + columns, dim=1)
        columns = -torch.logsumexp(scaled + rows[:, None], dim=0)
    # One wild entry makes potentials large; in float64 subtracting them loses nothing of the small entries.
    exact = torch.float32 if costs.device.type == "mps" else torch.float64
    columns = columns.to(exact) * temperature
    reduced = (costs.to(exact) - columns).masked_fill_(~allowed, torch.inf)
    reduced -= reduced.amin(dim=1, keepdim=True)
    reduced -= reduced.amin(dim=0, keepdim=True)
    return reduced.to(costs.dtype)


def _temperature(costs: Tensor, allowed: Tensor) -> Tensor:
    count = allowed.sum()
    mean = costs.where(allowed, 0).sum() / count
    spread = ((costs - mean).square().where(allowed, 0).sum() / count).sqrt()
    # Equal costs have no spread; the floor keeps the quotient costs / temperature finite.
    return torch.maximum(0.1 * spread, 1e-6 * mean.abs()) + torch.finfo(costs.dtype).tiny
