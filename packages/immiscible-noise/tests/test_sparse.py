"""The sparse solver: the optimum of the dense one, or no answer."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from diffcore.bench import peak_megabytes
from immiscible_noise import assign_noise, sparse
from immiscible_noise.assign import solve_costs
from immiscible_noise.solvers import solve
from immiscible_noise.sparse import solve_sparse

ELSEWHERE = ["immiscible_noise.assign.on_host", "immiscible_noise.sparse.on_host"]


def costs_of(kind: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(n, 12)) @ rng.normal(size=(12, 192))
    tables = {
        "images": lambda: -2 * (smooth + 0.3 * rng.normal(size=(n, 192))) @ rng.normal(size=(192, n)),
        "noise": lambda: rng.normal(size=(n, n)),
        "far from 0": lambda: 1e4 + rng.normal(size=(n, n)),
        "one bright image": lambda: (
            -2 * (rng.normal(size=(n, 64)) * np.r_[100, np.ones(n - 1)][:, None]) @ rng.normal(size=(64, n))
        ),
        "heavy tails": lambda: rng.standard_cauchy(size=(n, n)),
        "a grid": lambda: rng.integers(0, 9, size=(n, n)),
        "repeated rows": lambda: np.repeat(rng.normal(size=(n // 8, n)), 8, 0),
        "rank one": lambda: np.outer(rng.normal(size=n), rng.normal(size=n)),
    }
    return np.ascontiguousarray(tables[kind]().astype(np.float32))


@pytest.mark.parametrize("n", [64, 528])
@pytest.mark.parametrize(
    "kind",
    ["images", "noise", "far from 0", "one bright image", "heavy tails", "a grid", "repeated rows", "rank one"],
)
def test_the_total_is_the_dense_solvers(kind, n):
    costs = costs_of(kind, n)
    columns = solve_sparse(torch.from_numpy(costs))
    exact = costs.astype(np.float64)
    best = exact[linear_sum_assignment(exact)].sum()
    if columns is None:  # no proof, so no answer; the dense solver takes over
        columns = solve(costs, "sparse")
    assert sorted(columns) == list(range(n))
    assert exact[np.arange(n), columns].sum() == pytest.approx(best, rel=1e-9, abs=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize("n", [600, 1200])
@pytest.mark.parametrize("kind", ["images", "noise", "one bright image"])
def test_ordinary_batches_get_a_proof(kind, n):
    assert solve_sparse(torch.from_numpy(costs_of(kind, n))) is not None


def test_pairs_that_were_missed_are_found_by_the_proof(monkeypatch):
    costs, looked = costs_of("images", 400), []
    below = sparse._below_zero
    monkeypatch.setattr(sparse, "_PER_ROW", 1)
    monkeypatch.setattr(sparse, "_SWEEPS", 1)
    monkeypatch.setattr(sparse, "_ROUNDS", 20)
    monkeypatch.setattr(sparse, "_MOST_PAIRS", 400)
    monkeypatch.setattr(sparse, "_below_zero", lambda *given: looked.append(below(*given)) or looked[-1])
    columns = solve_sparse(torch.from_numpy(costs))
    assert len(looked[0])
    assert not len(looked[-1])
    assert np.array_equal(columns, linear_sum_assignment(costs)[1])


@pytest.mark.parametrize(("name", "value"), [("_ROUNDS", 0), ("_MOST_SWEEPS", 1), ("_MOST_PAIRS", 1)])
def test_without_a_proof_there_is_no_answer(name, value, monkeypatch):
    costs = costs_of("images", 600)
    monkeypatch.setattr(sparse, name, value)
    assert solve_sparse(torch.from_numpy(costs)) is None
    assert np.array_equal(solve(costs, "sparse"), linear_sum_assignment(costs)[1])


def test_equal_costs_have_no_temperature():
    costs = np.ones((600, 600), dtype=np.float32)
    assert solve_sparse(torch.from_numpy(costs)) is None
    assert sorted(solve(costs, "sparse")) == list(range(600))


def test_large_batches_are_certified():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(640, 48, generator=generator) for _ in range(2))
    info = assign_noise(x, noise, solver="sparse", return_info=True)[1]
    assert info.gap_bound <= 1e-5
    assert sorted(info.permutation.tolist()) == list(range(640))
    assert info.solver == "sparse"


def test_a_row_that_keeps_its_own_place_counts_once():
    costs = costs_of("noise", 600) - 5 * np.eye(600, dtype=np.float32)
    assert np.array_equal(solve_sparse(torch.from_numpy(costs)), np.arange(600))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 301])
def test_costs_that_are_not_finite_get_no_proof(bad, row):
    costs = costs_of("images", 600)
    costs[row, 77] = bad
    assert solve_sparse(torch.from_numpy(costs)) is None


def test_large_prices_hide_no_pair():
    rng = np.random.default_rng(0)
    costs = rng.uniform(-30, 0, (50, 50)).astype(np.float32)
    f = 1e9 + rng.uniform(0, 100, 50)  # float32 knows these to 64 at best
    g = -1e9 - rng.uniform(0, 100, 50)
    expected = np.flatnonzero(costs - f[:, None] - g < 0)
    assert 100 < len(expected) < 2400
    table = torch.from_numpy(costs)
    assert np.array_equal(sparse._below_zero(table, f, g, 30.0), expected)


@pytest.mark.parametrize("kind", ["images", "noise", "repeated rows"])
def test_large_tables_are_worked_on_in_parts(kind, monkeypatch):
    costs = costs_of(kind, 560)
    expected = costs[np.arange(560), solve(costs, "scipy")].astype(float).sum()
    monkeypatch.setattr(sparse, "_SMALL", 0)
    monkeypatch.setattr(sparse, "_TOGETHER", 70 * 560)  # parts of 71 rows, and one of 63
    columns = solve_sparse(torch.from_numpy(costs))
    assert costs[np.arange(560), columns].astype(float).sum() == pytest.approx(expected, rel=1e-12)


def test_a_large_table_takes_half_as_much_memory_again():
    costs = torch.from_numpy(costs_of("images", 1100))
    assert costs.numel() > sparse._SMALL
    part = 4e-6 * sparse._TOGETHER
    assert peak_megabytes(lambda: solve_sparse(costs)) < 2e-6 * costs.numel() + 3 * part


@pytest.mark.parametrize("kind", ["images", "noise", "repeated rows", "a grid", "all alike"])
def test_what_lies_elsewhere_stays_there(kind, monkeypatch):
    costs = np.ones((600, 600), dtype=np.float32) if kind == "all alike" else costs_of(kind, 600)
    expected, copied = solve(costs, "scipy"), []
    copy = torch.Tensor.cpu
    for name in ELSEWHERE:
        monkeypatch.setattr(name, lambda table: False)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor.numel()) or copy(tensor))
    columns = solve_costs(torch.from_numpy(costs)).numpy()
    assert costs[np.arange(600), columns].astype(float).sum() == pytest.approx(
        costs[np.arange(600), expected].astype(float).sum(), rel=1e-9
    )
    if kind in ("images", "noise"):
        assert np.array_equal(columns, expected)
        assert max(copied) <= sparse._SAMPLED_ROWS * 1200  # the sample of rows, and never the table
        assert sum(copied) < 600 * 600 / 2


def test_labels_elsewhere_are_solved_in_blocks(monkeypatch):
    for name in ELSEWHERE:
        monkeypatch.setattr(name, lambda table: False)
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(600, 48, generator=generator) for _ in range(2))
    labels = torch.arange(600) % 2
    for solver in ("auto", "sparse"):
        info = assign_noise(x, noise, labels=labels, solver=solver, return_info=True)[1]
        assert torch.equal(labels[info.permutation], labels)
        assert info.gap_bound <= 1e-5
