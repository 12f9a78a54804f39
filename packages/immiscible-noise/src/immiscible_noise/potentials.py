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
    """Returns non-negative float64 costs with the same optimal permutations, close to zero along them.

    Log-domain Sinkhorn sweeps with uniform marginals and a temperature of a tenth of the costs' standard deviation;
    then row and column minima go. Nothing waits for the device.

    Args:
        costs: Square costs.
        allowed: True where row i may take column j; the rest becomes infinite. Must split into square blocks.
        sweeps: Pairs of row and column updates. More sweeps leave the host less to do; the optimum never changes.
    """
    centred = costs - costs.mean()
    spread = torch.linalg.vector_norm(centred) / max(len(costs), 1)
    # Equal costs have no spread; the floor keeps the quotient below finite.
    temperature = (0.1 * spread).clamp_min(torch.finfo(costs.dtype).tiny ** 0.5)
    scaled = centred / -temperature
    if allowed is not None:
        scaled.masked_fill_(~allowed, -torch.inf)
    rows = columns = costs.new_zeros(len(costs))
    for _ in range(sweeps):
        rows = -torch.logsumexp(scaled + columns, dim=1)
        columns = -torch.logsumexp(scaled + rows[:, None], dim=0)
    # One wild entry makes potentials large; float64 keeps the small differences beside them (Apple's GPUs lack it).
    exact = torch.float32 if costs.device.type == "mps" else torch.float64
    reduced = costs.to(exact) - columns.to(exact) * temperature
    if allowed is not None:
        reduced.masked_fill_(~allowed, torch.inf)
    reduced -= reduced.amin(dim=1, keepdim=True)
    reduced -= reduced.amin(dim=0)
    return reduced
