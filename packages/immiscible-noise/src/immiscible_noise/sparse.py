"""The exact assignment of a large batch from few of its pairs, with a certificate that the others do not matter.

Prices f_i of rows and g_j of columns, from an entropic relaxation, show which pairs can belong to the optimum: those of
small reduced cost `C_ij - f_i - g_j`. A sparse solver finds the best permutation among these few pairs. Exact prices,
by shortest paths, then certify it among all pairs: no reduced cost is below 0, and all are 0 along the permutation.
Where a reduced cost is below 0, its pair joins the few and the search repeats.

All that touches every pair runs where the costs lie. From an accelerator come the few pairs with their costs, about
twenty for each row, instead of the whole table; back goes one price for each row and column.

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

_SWEEPS = 8
_TEMPERATURE = 0.1  # in standard deviations of the costs
_LEAST_EXPONENT = -80.0  # exp of it is no denormal number, which processors are slow with
_PER_ROW = 16  # pairs that are kept, on average
_MOST_PAIRS = 64  # per row; beyond, the dense solver is faster
_SAMPLED_ROWS = 64  # rows that tell how costs are spread
_ROUNDS, _MOST_SWEEPS = 3, 500
_EXACT = 1e-12  # of the largest number: what float64 sums of float32 costs may be off by
_ROUNDING = 1e-5  # of the largest number: what float32 differences may be off by


def on_host(table: Tensor) -> bool:
    """Tells whether a tensor lies in the memory of the host."""
    return table.device.type == "cpu"


def solve_sparse(costs: Float[Tensor, "n n"]) -> Int[np.ndarray, "n"] | None:
    """Returns the column of each row in a permutation of least total cost; None without a certificate.

    There is none for costs that are not finite, or all alike, or whose relaxation shows too little.

    Args:
        costs: Costs of each row with each column in float32, on any device.
    """
    n = len(costs)
    lowest, highest = costs.aminmax()
    largest = max(-float(lowest), float(highest))
    relaxed = _prices(costs) if np.isfinite(largest) else None
    if relaxed is None:
        return None
    reduced, f, g = relaxed
    pairs = _candidates(reduced)
    for _ in range(_ROUNDS):
        if len(pairs) > n * _MOST_PAIRS:
            return None
        rows, columns = np.divmod(pairs, n)
        exact = _gather(costs, pairs)
        weights = exact - f[rows] - g[columns]
        graph = csr_array((weights - weights.min() + 1.0, (rows, columns)), shape=(n, n))
        found = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
        own = exact[np.searchsorted(pairs, np.arange(n) * n + found)]
        potentials = _potentials(own, found, rows, columns, exact, f)
        if potentials is None:
            return None
        missed = _below_zero(costs, *potentials, largest, reduced)
        if not len(missed):
            return found
        pairs = np.union1d(pairs, missed)
    return None


def _prices(table: Tensor) -> tuple[Tensor, Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]] | None:
    """Returns reduced costs, and the prices of rows and columns that make them; None where costs are alike or wild."""
    spread = _TEMPERATURE * float(_sampled_rows(table).std())
    if not spread > 0:
        return None
    low = table.amin(1)
    kernel = torch.sub(low[:, None], table).div_(spread).clamp_(min=_LEAST_EXPONENT).exp_()
    u, v = torch.ones_like(low), torch.ones_like(low)
    for _ in range(_SWEEPS):
        v = 1 / (u @ kernel)
        u = 1 / (kernel @ v)
    f, g = low + spread * u.log(), spread * v.log()
    reduced = torch.sub(table, f[:, None], out=kernel).sub_(g)
    host_f, host_g = torch.stack([f, g]).cpu().double().numpy()
    if not (np.isfinite(host_f).all() and np.isfinite(host_g).all()):
        return None
    return reduced, host_f, host_g


def _candidates(reduced: Tensor) -> Int[np.ndarray, "pairs"]:
    """Returns the pairs of small reduced cost, as `row * n + column`; they contain at least one permutation."""
    n = len(reduced)
    sample = _sampled_rows(reduced).flatten().cpu().numpy()
    place = min(len(sample) * _PER_ROW // n, len(sample) - 1)
    pairs = _at_most(reduced, float(np.partition(sample, place)[place]))
    rows, columns = np.divmod(pairs, n)
    # Few rows and columns are left without a pair.
    bare_rows, bare_columns = (np.flatnonzero(np.bincount(taken, minlength=n) == 0) for taken in (rows, columns))
    nearest_column, nearest_row = (
        table[torch.from_numpy(bare).to(table.device)].argmin(1).cpu().numpy()
        for table, bare in ((reduced, bare_rows), (reduced.T, bare_columns))
    )
    own = np.arange(n) * (n + 1)
    # Sorting is faster than numpy's own way to drop duplicates.
    every = np.sort(np.concatenate([pairs, bare_rows * n + nearest_column, nearest_row * n + bare_columns, own]))
    return every[np.diff(every, prepend=-1) > 0]


def _sampled_rows(table: Tensor) -> Tensor:
    return table[:: max(len(table) // _SAMPLED_ROWS, 1)]


def _at_most(table: Tensor, bound: float) -> Int[np.ndarray, "pairs"]:
    """Returns where a table is at most a number, as `row * n + column`, ascending."""
    if on_host(table):  # numpy looks for few among many faster
        return np.flatnonzero(table.numpy() <= bound)
    return (table <= bound).flatten().nonzero()[:, 0].cpu().numpy()


def _gather(table: Tensor, pairs: Int[np.ndarray, "pairs"]) -> Float64[np.ndarray, "pairs"]:
    if on_host(table):
        return table.numpy().reshape(-1)[pairs].astype(np.float64)
    return table.flatten()[torch.from_numpy(pairs).to(table.device)].cpu().double().numpy()


def _potentials(
    own: np.ndarray, found: np.ndarray, rows: np.ndarray, columns: np.ndarray, exact: np.ndarray, start: np.ndarray
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]] | None:
    """Returns prices with `f_i + g_j <= C_ij` on the given pairs, and equality on those of the permutation.

    The prices of rows are lengths of shortest paths over exchanges between rows, from any start: every sweep relaxes
    all pairs at once.
    """
    owner = np.empty_like(found)
    owner[found] = np.arange(len(found))
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
    largest = max(largest, abs(f).max(), abs(g).max())
    rounded_f, rounded_g = torch.from_numpy(np.stack([f, g])).float().to(table.device)
    reduced = torch.sub(table, rounded_f[:, None], out=room).sub_(rounded_g)
    pairs = _at_most(reduced, _ROUNDING * largest)
    i, j = np.divmod(pairs, len(f))
    return pairs[_gather(table, pairs) - f[i] - g[j] < -_EXACT * largest]
