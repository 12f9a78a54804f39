"""The exact assignment of a large batch from few of its pairs, with a certificate that the others do not matter.

Prices f_i of rows and g_j of columns, from an entropic relaxation, show which pairs can belong to the optimum: those of
small reduced cost `C_ij - f_i - g_j`. A sparse solver finds the best permutation among these few pairs. Exact prices,
by shortest paths, then certify it among all pairs: no reduced cost is below 0, and all are 0 along the permutation.
Where a reduced cost is below 0, its pair joins the few and the search repeats.

References:
    Sinkhorn's iteration: Cuturi 2013, algorithm 1. Optimality by complementary slackness: Burkard, Dell'Amico and
    Martello, "Assignment Problems", 2009, section 4.1.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

SMALLEST = 512  # rows; below, dense solvers are faster
_SWEEPS = 8
_TEMPERATURE = 0.1  # in standard deviations of the costs
_LEAST_EXPONENT = -80.0  # exp of it is no denormal number, which processors are slow with
_PER_ROW = 16  # pairs that are kept, on average
_MOST_PAIRS = 64  # per row; beyond, the dense solver is faster
_ROUNDS, _MOST_SWEEPS = 3, 500
_EXACT = 1e-12  # of the largest cost: what float64 sums of float32 costs may be off by
_ROUNDING = 1e-5  # of the largest cost: what float32 differences may be off by


def solve_sparse(costs: Float[np.ndarray, "n n"]) -> Int[np.ndarray, "n"] | None:
    """Returns the column of each row in a permutation of least total cost; None without a certificate.

    Args:
        costs: Finite costs of each row with each column, in float32.
    """
    n, table = len(costs), torch.from_numpy(costs)
    largest = float(table.abs().max())
    relaxed = _prices(table)
    if relaxed is None:
        return None
    reduced, f, g = relaxed
    pairs = _candidates(reduced)
    for _ in range(_ROUNDS):
        if len(pairs) > n * _MOST_PAIRS:
            return None
        rows, columns = np.divmod(pairs, n)
        exact = costs[rows, columns].astype(np.float64)
        weights = exact - f[rows] - g[columns]
        graph = csr_array((weights - weights.min() + 1.0, (rows, columns)), shape=(n, n))
        found = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
        potentials = _potentials(costs, found, rows, columns, exact, f)
        if potentials is None:
            return None
        missed = _below_zero(table, *potentials, largest, reduced)
        if not len(missed):
            return found
        pairs = np.union1d(pairs, missed)
    return None


def _prices(table: Tensor) -> tuple[Tensor, Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]] | None:
    """Returns reduced costs, and the prices of rows and columns that make them."""
    n = len(table)
    temperature = _TEMPERATURE * float(table[:: max(n // 512, 1)].std())
    if not temperature > 0:
        return None
    low = table.amin(1)
    kernel = torch.sub(low[:, None], table).div_(temperature).clamp_(min=_LEAST_EXPONENT).exp_()
    u, v = torch.ones(n), torch.ones(n)
    for _ in range(_SWEEPS):
        v = 1 / (u @ kernel)
        u = 1 / (kernel @ v)
    f, g = low + temperature * u.log(), temperature * v.log()
    if not bool((f.isfinite() & g.isfinite()).all()):
        return None
    reduced = torch.sub(table, f[:, None], out=kernel).sub_(g)
    return reduced, f.double().numpy(), g.double().numpy()


def _candidates(reduced: Tensor) -> Int[np.ndarray, "pairs"]:
    """Returns the pairs of small reduced cost, as `row * n + column`; they contain at least one permutation."""
    n = len(reduced)
    sample = reduced[:: max(n // 64, 1)].flatten()
    cut = sample.kthvalue(max(len(sample) * _PER_ROW // n, 1)).values
    i, j = (reduced <= cut).nonzero(as_tuple=True)
    each = torch.arange(n)
    parts = (i * n + j, each * n + reduced.argmin(1), reduced.argmin(0) * n + each, each * n + each)
    return torch.cat(parts).unique().numpy()


def _potentials(
    costs: np.ndarray, found: np.ndarray, rows: np.ndarray, columns: np.ndarray, exact: np.ndarray, start: np.ndarray
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]] | None:
    """Returns prices with `f_i + g_j <= C_ij` on the given pairs, and equality on those of the permutation.

    The prices of rows are lengths of shortest paths over exchanges between rows, from any start: every sweep relaxes
    all pairs at once.
    """
    n = len(costs)
    own = costs[np.arange(n), found].astype(np.float64)
    owner = np.empty(n, dtype=np.int64)
    owner[found] = np.arange(n)
    source, first = owner[columns], np.flatnonzero(np.diff(rows, prepend=-1))
    step, f = exact - own[source], start
    for _ in range(_MOST_SWEEPS):
        nearer = np.minimum(f, np.minimum.reduceat(f[source] + step, first))
        if np.array_equal(nearer, f):
            return f, (own - f)[owner]
        f = nearer
    return None


def _below_zero(table: Tensor, f: np.ndarray, g: np.ndarray, largest: float, room: Tensor) -> Int[np.ndarray, "pairs"]:
    """Returns the pairs whose reduced cost is below 0; float32 finds those in doubt, float64 decides."""
    reduced = torch.sub(table, torch.from_numpy(f).float()[:, None], out=room).sub_(torch.from_numpy(g).float())
    i, j = (part.numpy() for part in (reduced < _ROUNDING * largest).nonzero(as_tuple=True))
    below = table.numpy()[i, j].astype(np.float64) - f[i] - g[j] < -_EXACT * largest
    return i[below] * len(f) + j[below]
