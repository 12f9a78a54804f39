"""Exact solvers of the linear assignment problem, potentials that speed them up, and a certificate of their answer.

Subtracting a number f_i per row and a number g_j per column changes the total cost ``sum_i C_i,π(i)`` of every
permutation alike, so that ``C_ij - f_i - g_j`` has the same optimum. Such potentials serve twice. Those of an entropic
optimal transport problem, computed on the device, leave a matching that is almost visible in the zeros of what remains
(`reduced_costs`). And any of them with ``f_i + g_j <= C_ij`` bound the optimum from below (`dual_gap`).
"""

import importlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .batch import check_choice
from .sparse import solve_sparse

HostSolver = Literal["sparse", "scipy", "lapx"]
Solver = Literal["auto", "sparse", "scipy", "lapx", "potentials+scipy", "potentials+lapx"]


@dataclass(frozen=True)
class Thresholds:
    """From how many rows on "auto" takes the sparse solver, as `use_thresholds` sets it.

    The defaults were measured on one thread of a processor with AVX-512; that of an accelerator is a guess.

    Attributes:
        beside_scipy: Rows on the host, where lapx is not installed.
        beside_lapx: Rows on the host, where lapx is installed.
        on_device: Rows on an accelerator, where the alternative is to copy all costs to the host.
    """

    beside_scipy: int = 320
    beside_lapx: int = 1024
    on_device: int = 512


_in_use = Thresholds()


def use_thresholds(thresholds: Thresholds) -> None:
    """Lets "auto" choose by other numbers of rows from here on, such as those that `read_thresholds` takes from a run.

    Every solver is exact, so that only the time changes, and the choice between equally good permutations.

    Args:
        thresholds: Numbers of rows from which on the sparse solver is taken.

    Example:
        >>> use_thresholds(Thresholds(beside_scipy=256))
        >>> use_thresholds(Thresholds())  # the defaults again
    """
    global _in_use
    _in_use = thresholds


def has_lapx() -> bool:
    """Tells whether lapx is installed; the distribution "lap" installs a module of the same name without `lapjvh`."""
    try:
        return hasattr(importlib.import_module("lap"), "lapjvh")
    except ImportError:
        return False


def check_solver(solver: Solver) -> None:
    """Raises an error where a solver is unknown or not installed."""
    check_choice("solver", solver, Solver)
    if solver.endswith("lapx") and not has_lapx():
        raise ValueError(f"solver={solver!r} needs lapx, which is not installed: pip install lapx")


def choose_solver(solver: Solver, rows: int, *, on_host: bool, whole: bool = True) -> Solver:
    """Resolves "auto" to the fastest solver present.

    Args:
        solver: Name that the caller gives; all but "auto" stay as they are.
        rows: Number of rows of the problem.
        on_host: Whether the costs lie on the host. Potentials save time on an accelerator; on the host they cost more
            than they save.
        whole: Whether the problem is the whole table. An accelerator sends a table that splits into blocks in one
            piece.
    """
    if solver != "auto":
        return solver
    dense: HostSolver = "lapx" if has_lapx() else "scipy"
    limits = _in_use
    if not on_host:
        if whole and rows >= limits.on_device:
            return "sparse"
        return "potentials+lapx" if dense == "lapx" else "potentials+scipy"
    return "sparse" if rows >= (limits.beside_lapx if dense == "lapx" else limits.beside_scipy) else dense


def solve(costs: Float[np.ndarray, "n n"], solver: HostSolver) -> Int[np.ndarray, "n"]:
    """Returns the column of each row in a permutation of least total cost.

    Rows that are equal to the last bit take their columns in order, so that ties between duplicates do not depend on
    the solver.
    """
    if len(costs) < 2:
        return np.arange(len(costs))
    if solver == "sparse":
        columns = solve_in_place(torch.from_numpy(costs))
        if columns is not None:
            return columns
        solver = "lapx" if has_lapx() else "scipy"
    # Without row and column minima the optimum is the same and the search a third shorter; float64 keeps it exact.
    table = torch.from_numpy(costs)
    reduced = table.double() - table.amin(1, keepdim=True)
    reduced -= reduced.amin(0)
    if solver == "lapx":
        columns = importlib.import_module("lap").lapjvh(reduced.numpy())[2]
    else:
        columns = linear_sum_assignment(reduced.numpy())[1]
    return _order_duplicates(table, np.asarray(columns, dtype=np.int64))


def solve_in_place(costs: Float[Tensor, "n n"]) -> Int[np.ndarray, "n"] | None:
    """Returns what `solve` does, from few pairs of a table that stays where it is; None where that proves nothing."""
    columns = solve_sparse(costs) if costs.dtype == torch.float32 else None
    return None if columns is None else _order_duplicates(costs, columns)


def reduced_costs(
    costs: Float[Tensor, "b b"],
    allowed: Bool[Tensor, "b b"] | None = None,
    *,
    sweeps: int = 15,
) -> Float[Tensor, "b b"]:
    """Returns non-negative float64 costs with the same optimal permutations, close to zero along them.

    Log-domain Sinkhorn sweeps with uniform marginals and a temperature of a tenth of the costs' standard deviation;
    then row and column minima are subtracted. Nothing waits for the device.

    Args:
        costs: Cost of each row with each column.
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


def dual_gap(costs: Float[np.ndarray, "n n"], columns: Int[np.ndarray, "n"], *, sweeps: int = 256) -> float:
    """Returns a bound on how far a permutation's total cost lies above the least possible.

    For potentials ``f, g`` with ``f_i + g_j <= C_ij``, ``cost - optimum <= sum_i (C_i,pi(i) - f_i - g_pi(i))``.
    Bellman-Ford sweeps over the exchanges between rows look for potentials that make the right side small: zero up to
    rounding if the permutation is optimal, and a valid bound after any number of sweeps.
    """
    exchange = costs[:, columns].astype(np.float64)  # row k's column in position k
    exchange -= exchange.diagonal()[:, None].copy()
    potentials, bound = np.zeros(len(costs)), np.inf
    for _ in range(sweeps):
        cheapest = (exchange + potentials[:, None]).min(axis=0)
        bound = min(bound, -float(((exchange - potentials).min(axis=1) + potentials).sum()))
        if np.array_equal(cheapest, potentials):
            break
        potentials = cheapest
    return max(bound, 0.0)


def _order_duplicates(costs: Tensor, columns: np.ndarray) -> np.ndarray:
    """Gives equal rows their columns in ascending order."""
    first = costs[:, 0].cpu().numpy()
    ascending = np.sort(first)
    shared = ascending[1:][ascending[1:] == ascending[:-1]]
    if not len(shared):  # nearly always: no two rows can be equal
        return columns
    rows_of: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(np.isin(first, shared)):
        rows_of.setdefault(costs[i].cpu().numpy().tobytes(), []).append(int(i))
    ordered = columns.copy()
    for rows in rows_of.values():
        ordered[rows] = np.sort(columns[rows])
    return ordered
