"""From a batch of images and noise to the best permutation: costs on the device, one transfer, exact solves."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .blocks import same_block, split_blocks
from .cost import Cost, Precision, cost_matrix
from .potentials import reduced_costs
from .solvers import HostSolver, Solver, solve

SolvedBlock = tuple[Float[np.ndarray, "n n"], Int[np.ndarray, "n"]]
"""Costs of a block, up to row and column constants, and the column of each of its rows."""


def match(
    x: Float[Tensor, "b d"],
    noise: Float[Tensor, "b d"],
    table: Int[Tensor, "b m"] | None,
    mask: Bool[Tensor, "b d"] | None,
    *,
    cost: Cost,
    precision: Precision,
    solver: Solver,
) -> tuple[Int[Tensor, "b"], tuple[SolvedBlock, ...]]:
    """Returns, on the host, the noise row of every image, and the problems that were solved.

    Args:
        x: Flattened images.
        noise: Flattened noise.
        table: Labels as integers; rows exchange noise only where they are equal. None: all rows do.
        mask: False where ``x`` is padding.
        cost: Distance to minimise, see `cost_matrix`.
        precision: Number format of the matrix product.
        solver: A resolved solver, not "auto".

    Raises:
        FloatingPointError: If a cost is NaN or infinite.
    """
    costs = cost_matrix(x, noise, cost=cost, mask=mask, precision=precision)
    if solver.startswith("potentials"):
        allowed = None if table is None else same_block(table.to(x.device, non_blocking=True))
        costs = reduced_costs(costs, allowed)
    # On one stream the copies finish in order: waiting for the costs waits for the labels too.
    host_table = None if table is None else table.to("cpu", non_blocking=True)
    host_costs = costs.cpu().numpy()

    blocks = [np.arange(len(x))] if host_table is None else split_blocks(host_table.numpy())
    host_solver: HostSolver = "lapx" if solver.endswith("lapx") else "scipy"
    columns, solved = np.arange(len(x)), []
    for block in blocks:
        block_costs = host_costs if len(block) == len(x) else host_costs[np.ix_(block, block)]
        if not np.isfinite(block_costs).all():
            raise FloatingPointError("a cost is NaN or infinite")
        chosen = solve(block_costs, host_solver)
        columns[block] = block[chosen]
        solved.append((block_costs, chosen))
    return torch.from_numpy(columns), tuple(solved)
