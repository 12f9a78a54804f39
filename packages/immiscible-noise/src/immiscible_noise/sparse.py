"""The exact assignment of a large batch from few of its pairs, with a certificate that the others do not matter.

Prices f_i of rows and g_j of columns, from an entropic relaxation, show which pairs can belong to the optimum: those of
small reduced cost `C_ij - f_i - g_j`. A sparse solver finds the best permutation among these few pairs. Exact prices,
by shortest paths, then certify it among all pairs: no reduced cost is below 0, and all are 0 along the permutation.
Where a reduced cost is below 0, its pair joins the few and the search repeats.

All that touches every pair runs where the costs lie. The host works on a few rows at a time and needs, beside a large
table of costs, half as much memory again. From an accelerator come the few pairs with their costs, about twenty for
each row, instead of the whole table; back goes one price for each row and column.

References:
    Sinkhorn's iteration: Cuturi 2013, algorithm 1. Optimality by complementary slackness: Burkard, Dell'Amico and
    Martello, "Assignment Problems", 2009, section 4.1.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

_SWEEPS = 8
_TEMPERATURE = 0.1  # in standard deviations of the costs of a middling row
_LEAST_EXPONENT = -80.0  # exp of it is no denormal number, which processors are slow with
_PER_ROW = 16  # pairs that are kept, on average
_MOST_PAIRS = 64  # per row; beyond, the dense solver is faster
_SAMPLED_ROWS = 64  # rows that tell how costs are spread
_SMALL = 2**20  # pairs of which a second table in float32 is no burden
_TOGETHER = 2**17  # pairs that are worked on together: as many as a core's cache holds
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
    prices = _prices(costs) if np.isfinite(largest) else None
    if prices is None:
        return None
    f, g = prices
    pairs = _candidates(costs, f, g)
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
        missed = _below_zero(costs, *potentials, largest)
        if not len(missed):
            return found
        pairs = np.union1d(pairs, missed)
    return None


def _prices(table: Tensor) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]] | None:
    """Returns prices of rows and columns that leave small reduced costs; None where costs are alike or wild."""
    spread = _TEMPERATURE * float(_sampled_rows(table).std(1).median())
    if not spread > 0:
        return None
    low, sums, kernel = table.amin(1), table.new_zeros(len(table)), []
    small = table.numel() <= _SMALL
    for some, room in _parts(table, table.numel() if small else _TOGETHER):
        part = torch.sub(low[some, None], table[some], out=room).div_(spread).clamp_(min=_LEAST_EXPONENT).exp_()
        sums += part.sum(0)
        # Prices only show where to look, so that three digits do; float16 has too few exponents.
        kernel.append(part if small else part.bfloat16())
    u = []
    for _ in range(_SWEEPS):
        v, u, sums = 1 / sums, [], torch.zeros_like(sums)
        for part in kernel:
            part = part.float()
            u.append(1 / (part @ v))
            sums += u[-1] @ part
    f, g = torch.stack([low + spread * torch.cat(u).log(), -spread * sums.log()]).cpu().double().numpy()
    return (f, g) if np.isfinite(f).all() and np.isfinite(g).all() else None


def _candidates(table: Tensor, f: Float64[np.ndarray, "n"], g: Float64[np.ndarray, "n"]) -> Int[np.ndarray, "pairs"]:
    """Returns the pairs of small reduced cost, as `row * n + column`; they contain at least one permutation."""
    n = len(table)
    rounded_f, rounded_g = _rounded(table, f, g)
    sample = (_sampled_rows(table) - _sampled_rows(rounded_f)[:, None] - rounded_g).flatten().cpu().numpy()
    place = min(len(sample) * _PER_ROW // n, len(sample) - 1)
    pairs = _at_most(table, rounded_f, rounded_g, float(np.partition(sample, place)[place]))
    rows, columns = np.divmod(pairs, n)
    # Few rows and columns are left without a pair.
    bare_rows, bare_columns = (np.flatnonzero(np.bincount(taken, minlength=n) == 0) for taken in (rows, columns))
    at_row, at_column = (torch.from_numpy(bare).to(table.device) for bare in (bare_rows, bare_columns))
    nearest_column = (table[at_row] - rounded_g).argmin(1).cpu().numpy()
    nearest_row = (table[:, at_column] - rounded_f[:, None]).argmin(0).cpu().numpy()
    own = np.arange(n) * (n + 1)
    # Sorting is faster than numpy's own way to drop duplicates.
    every = np.sort(np.concatenate([pairs, bare_rows * n + nearest_column, nearest_row * n + bare_columns, own]))
    return every[np.diff(every, prepend=-1) > 0]


def _sampled_rows(table: Tensor) -> Tensor:
    return table[:: max(len(table) // _SAMPLED_ROWS, 1)]


def _parts(table: Tensor, together: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of a table in parts, and room for the numbers of each; all at once on an accelerator.

    Args:
        table: Costs of all pairs.
        together: Number of pairs that a part has, to within a row.
    """
    n = len(table)
    count = together // n + 1 if on_host(table) else n
    room = table.new_empty((min(count, n), n))
    for first in range(0, n, count):
        yield slice(first, first + count), room[: n - first]


def _rounded(table: Tensor, f: np.ndarray, g: np.ndarray) -> Tensor:
    """Returns prices in the precision and on the device of a table."""
    return torch.from_numpy(np.stack([f, g])).to(table.dtype).to(table.device)


def _at_most(table: Tensor, f: Tensor, g: Tensor, bound: float) -> Int[np.ndarray, "pairs"]:
    """Returns where reduced costs are at most a number, as `row * n + column`, ascending."""
    found = []
    for some, room in _parts(table, _TOGETHER):
        reduced, first = torch.sub(table[some], f[some, None], out=room).sub_(g), some.start * len(table)
        if on_host(table):  # numpy looks for few among many faster
            found.append(np.flatnonzero(reduced.numpy() <= bound) + first)
        else:
            found.append((reduced <= bound).flatten().nonzero()[:, 0] + first)
    return np.concatenate(found) if on_host(table) else torch.cat(found).cpu().numpy()


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


def _below_zero(table: Tensor, f: np.ndarray, g: np.ndarray, largest: float) -> Int[np.ndarray, "pairs"]:
    """Returns the pairs whose reduced cost is below 0; float32 finds those in doubt, float64 decides."""
    largest = max(largest, abs(f).max(), abs(g).max())
    rounded_f, rounded_g = _rounded(table, f, g)
    pairs = _at_most(table, rounded_f, rounded_g, _ROUNDING * largest)
    i, j = np.divmod(pairs, len(f))
    return pairs[_gather(table, pairs) - f[i] - g[j] < -_EXACT * largest]
