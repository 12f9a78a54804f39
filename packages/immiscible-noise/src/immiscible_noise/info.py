"""What an assignment did: distances before and after, and a bound on how far it is from the optimum."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from .cost import Cost
from .solvers import dual_gap

SolvedBlock = tuple[Tensor, np.ndarray]  # n x n and n, where n differs between blocks
"""Costs of a block, up to row and column constants, and the column of each of its rows."""


@dataclass(frozen=True, eq=False)
class AssignmentInfo:
    """One assignment: ``assigned[i] = noise[permutation[i]]``.

    Reading a number waits for the device and may compute; making the object does neither. It keeps the solved costs,
    four bytes per pair of rows, so let it go after reading.

    Example:
        >>> import torch
        >>> from immiscible_noise import assign_noise
        >>> _, info = assign_noise(torch.randn(32, 6), torch.randn(32, 6), return_info=True)
        >>> 0 < info.reduction < 1, info.gap_bound < 1e-6
        (True, True)
    """

    permutation: Int[Tensor, "b"]
    cost: Cost
    """Which distance the figures below are in: squared L2 for "sq"."""
    solver: str
    """The solver that ran, several with commas where blocks took different ones; "none" where nothing was to solve."""
    ms: float
    """Milliseconds of host time for the whole call, the wait for the device included."""
    pair_costs_before: Float[Tensor, "b"] = field(repr=False)
    pair_costs_after: Float[Tensor, "b"] = field(repr=False)
    solved: tuple[SolvedBlock, ...] = field(repr=False)
    """Costs and columns of each block; they add up to the pair costs except for row and column constants."""

    @cached_property
    def cost_before(self) -> float:
        """Mean over rows of the distance between image and noise before the assignment."""
        return _mean(self.pair_costs_before)

    @cached_property
    def cost_after(self) -> float:
        """Mean over rows of the distance between image and noise after the assignment."""
        return _mean(self.pair_costs_after)

    @property
    def reduction(self) -> float:
        """Share by which the distance fell; for "sq" of the root mean square distance, so that all costs compare."""
        if self.cost_before == 0:
            return 0.0
        ratio = self.cost_after / self.cost_before
        return 1 - (ratio**0.5 if self.cost == "sq" else ratio)

    @cached_property
    def gap_bound(self) -> float:
        """Certificate: ``cost_after`` lies at most this far above the best that the same rows and blocks allow.

        It refers to the costs the solver saw; with bfloat16 factors those differ a little from the exact ones.
        """
        total = sum(dual_gap(costs.cpu().numpy(), columns) for costs, columns in self.solved)
        # The squared distance is a constant minus twice the inner product.
        return (2 if self.cost == "sq" else 1) * total / max(len(self.permutation), 1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
