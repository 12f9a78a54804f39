"""Exact solvers of the linear assignment problem on the host, and a certificate that needs none of them."""

import importlib
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from .sparse import SMALLEST, solve_sparse

HostSolver = Literal["scipy", "lapx"]
Solver = Literal["auto", "scipy", "lapx", "potentials+scipy", "potentials+lapx"]


def has_lapx() -> bool:
    """Tells whether lapx is installed; the distribution "lap" installs a module of the same name without `lapjvh`."""
    try:
        return hasattr(importlib.import_module("lap"), "lapjvh")
    except ImportError:
        return False


def choose_solver(solver: Solver, *, on_host: bool) -> Solver:
    """Resolves "auto" to the fastest solver present, and refuses one that is not installed.

    Potentials pay on an accelerator. On the host they cost more than they save.
    """
    if solver == "auto":
        if on_host:
            return "lapx" if has_lapx() else "scipy"
        return "potentials+lapx" if has_lapx() else "potentials+scipy"
    if solver.endswith("lapx") and not has_lapx():
        raise ValueError(f"solver={solver!r} needs lapx, which is not installed: pip install lapx")
    return solver


def solve(costs: Float[np.ndarray, "n n"], solver: HostSolver) -> Int[np.ndarray, "n"]:
    """Returns the column of each row in a permutation of least total cost.

    Rows that are equal to the last bit take their columns in order, so that ties between duplicates do not depend on
    the solver.
    """
    if len(costs) < 2:
        return np.arange(len(costs))
    if solver == "scipy" and len(costs) >= SMALLEST and costs.dtype == np.float32:
        columns = solve_sparse(costs)
        if columns is not None:
            return _order_duplicates(costs, columns)
    # Without row and column minima the optimum is the same and the search a third shorter; float64 keeps it exact.
    reduced = costs - costs.min(axis=1, keepdims=True).astype(np.float64)
    reduced -= reduced.min(axis=0)
    if solver == "lapx":
        columns = importlib.import_module("lap").lapjvh(reduced)[2]
    else:
        columns = linear_sum_assignment(reduced)[1]
    return _order_duplicates(costs, np.asarray(columns, dtype=np.int64))


def dual_gap(costs: Float[np.ndarray, "n n"], columns: Int[np.ndarray, "n"], *, sweeps: int = 256) -> float:
    """Returns a bound on how far a permutation's total cost lies above the least possible.

    Any potentials ``f, g`` with ``f_i + g_j <= C_ij`` prove ``cost - optimum <= sum_i (C_i,pi(i) - f_i - g_pi(i))``.
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


def _order_duplicates(costs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Gives equal rows their columns in ascending order."""
    first = np.sort(costs[:, 0])
    if np.all(first[1:] != first[:-1]):  # nearly always: no two rows can be equal
        return columns
    rows_of: dict[bytes, list[int]] = {}
    for i, row in enumerate(costs):
        rows_of.setdefault(row.tobytes(), []).append(i)
    ordered = columns.copy()
    for rows in rows_of.values():
        ordered[rows] = np.sort(columns[rows])
    return ordered
