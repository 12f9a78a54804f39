"""Exactness: scipy and brute force as oracles, on costs that are random and on costs that are nasty."""

import importlib.util
import itertools
import json
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from immiscible_noise import Thresholds, assign_noise, read_thresholds, use_thresholds
from immiscible_noise.app.bench import cases
from immiscible_noise.solvers import check_solver, choose_solver, dual_gap, has_lapx, reduced_costs, solve

LAPX = pytest.param("lapx", marks=pytest.mark.skipif(importlib.util.find_spec("lap") is None, reason="needs lapx"))
HOSTS = ["scipy", "sparse", LAPX]


def make_costs(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    costs = rng.normal(size=(size, size))
    match kind:
        case "duplicates":
            costs = costs[rng.integers(0, max(size // 2, 1), size)]
        case "all equal":
            costs = np.full_like(costs, 3.7)
        case "integer ties":
            costs = rng.integers(0, 3, (size, size))
        case "one huge entry":
            costs[size // 2, size // 3] = 1e9
        case "one hugely negative entry":
            costs[size // 2, size // 3] = -1e9
        case "rivals for a huge gain":
            costs[: size // 2 + 1, size // 3] = -1e9
        case "scale 1e-3":
            costs *= 1e-3
        case "scale 1e6":
            costs *= 1e6
        case "offset":
            costs += 1e4
    return costs.astype(np.float32)


def total(costs: np.ndarray, columns: np.ndarray) -> float:
    return float(costs[np.arange(len(costs)), columns].astype(np.float64).sum())


def solve_on(costs: np.ndarray, host: str, *, potentials: bool) -> np.ndarray:
    return solve(reduced_costs(torch.from_numpy(costs)).numpy() if potentials else costs, host)


KINDS = [
    "random",
    "duplicates",
    "all equal",
    "integer ties",
    "one huge entry",
    "one hugely negative entry",
    "rivals for a huge gain",
    "scale 1e-3",
    "scale 1e6",
    "offset",
]


@pytest.mark.parametrize("potentials", [False, True])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_total_cost_is_scipys(kind, host, potentials):
    for size in (1, 2, 3, 7, 64, 257):
        costs = make_costs(kind, size)
        columns = solve_on(costs, host, potentials=potentials)
        assert sorted(columns) == list(range(size))
        reference = linear_sum_assignment(costs.astype(np.float64))[1]
        chosen = abs(costs[np.arange(size), reference].astype(np.float64))
        scale = chosen[chosen < 1e8].sum()  # a wild entry must not hide errors in the others
        assert abs(total(costs, columns) - total(costs, reference)) <= 1e-6 * scale


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("potentials", [False, True])
def test_small_problems_match_brute_force(host, potentials):
    for size in range(1, 7):
        costs = make_costs("random", size)
        best = min(total(costs, np.array(p)) for p in itertools.permutations(range(size)))
        assert total(costs, solve_on(costs, host, potentials=potentials)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("potentials", [False, True])
def test_equal_rows_take_their_columns_in_order(host, potentials):
    costs = make_costs("duplicates", 40)
    columns = solve_on(costs, host, potentials=potentials)
    for row in np.unique(costs, axis=0):
        assert np.all(np.diff(columns[(costs == row).all(1)]) > 0)
    assert solve_on(make_costs("all equal", 40), host, potentials=potentials).tolist() == list(range(40))


def test_reduced_costs_keep_every_permutations_difference():
    costs = torch.randn(6, 6, dtype=torch.float64)
    reduced = reduced_costs(costs)
    assert reduced.min() >= 0
    permutations = torch.tensor(list(itertools.permutations(range(6))))
    rows = torch.arange(6)
    shift = costs[rows, permutations].sum(1) - reduced[rows, permutations].sum(1)
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))


def test_potentials_leave_most_of_the_matching_in_the_zeros():
    costs = torch.from_numpy(make_costs("random", 257))
    reduced = reduced_costs(costs).numpy()
    columns = linear_sum_assignment(costs)[1]
    plain = (costs - costs.amin(1, keepdim=True)).numpy()
    along, plainly = (c[np.arange(257), columns].mean() / c.mean() for c in (reduced, plain - plain.min(0)))
    assert along < 0.25 * plainly


def test_reduced_costs_never_cross_blocks():
    allowed = torch.zeros(9, 9, dtype=torch.bool)
    allowed[:4, :4] = allowed[4:, 4:] = True
    costs = torch.randn(9, 9)
    reduced = reduced_costs(costs, allowed)
    assert torch.equal(reduced.isfinite(), allowed)
    expected = linear_sum_assignment(costs[:4, :4])[1]
    assert np.array_equal(solve(reduced[:4, :4].numpy(), "scipy"), expected)


@pytest.mark.parametrize("size", [2, 7, 64])
def test_certificate_bounds_the_gap(size):
    rng = np.random.default_rng(0)
    costs = make_costs("random", size)
    best = linear_sum_assignment(costs)[1]
    assert dual_gap(costs, best) <= 1e-9
    for _ in range(20):
        columns = best.copy()
        moved = rng.choice(size, 2, replace=False)
        columns[moved] = columns[moved[::-1]]
        gap = total(costs, columns) - total(costs, best)
        bound = dual_gap(costs, columns)
        assert 0 < gap <= bound + 1e-9


def test_certificate_is_valid_for_any_permutation_and_any_number_of_sweeps():
    costs = make_costs("random", 30)
    optimum = total(costs, linear_sum_assignment(costs)[1])
    for sweeps in (1, 3, 100):
        for seed in range(5):
            columns = np.random.default_rng(seed).permutation(30)
            assert total(costs, columns) - optimum <= dual_gap(costs, columns, sweeps=sweeps) + 1e-9


def test_auto_takes_the_dense_solvers_for_few_rows_and_the_sparse_one_for_many(monkeypatch):
    assert [choose_solver("auto", rows, on_host=True) for rows in (64, 4096)] == [
        "lapx" if has_lapx() else "scipy",
        "sparse",
    ]
    assert choose_solver("auto", 64, on_host=False).startswith("potentials+")
    assert choose_solver("auto", 4096, on_host=False) == "sparse"
    assert choose_solver("auto", 4096, on_host=False, whole=False).startswith("potentials+")
    assert choose_solver("lapx", 4096, on_host=False) == "lapx"
    monkeypatch.setattr("immiscible_noise.solvers.has_lapx", lambda: False)
    assert [choose_solver("auto", 400, on_host=host) for host in (True, False)] == ["sparse", "potentials+scipy"]


def test_a_solver_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("immiscible_noise.solvers.has_lapx", lambda: False)
    check_solver("auto")
    for solver in ("lapx", "potentials+lapx"):
        with pytest.raises(ValueError, match="pip install lapx"):
            check_solver(solver)


def rows_of(**ratios: list[float]) -> list[dict]:
    timed = [(other, *pair) for other, found in ratios.items() for pair in zip((192, 384, 768), found, strict=True)]
    prefix = "solve few of the pairs, against"
    return [{"name": "assign, against torchcfm batch=1024 ratio", "value": 6.5, "unit": "x"}] + [
        {"name": f"{prefix} {other} batch={rows} {what}", "value": value, "unit": "x"}
        for other, rows, ratio in timed
        for what, value in (("ratio", ratio), ("seconds", 9.0), ("agreed", 1))
    ]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"scipy": [0.5, 1.2, 3.0]}, Thresholds(beside_scipy=384)),
        ({"scipy": [1.1, 0.9, 3.0], "lapx": [0.2, 0.5, 0.8]}, Thresholds(beside_scipy=768, beside_lapx=1536)),
        ({"lapx": [1.5, 2.0, 3.0], "potentials": [0.1, 1.0, 2.0]}, Thresholds(beside_lapx=192, on_device=384)),
    ],
)
def test_thresholds_are_where_the_sparse_solver_becomes_the_fastest(ratios, expected, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(rows_of(**ratios)))
    assert read_thresholds(path) == expected


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '[{"name": 3}]', '[{"name": "x ratio", "value": 2}]'])
def test_a_file_without_times_of_solvers_is_refused(text, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bench\.json holds no times of solvers"):
        read_thresholds(path)


def test_the_benchmark_times_what_is_read(tmp_path):
    names = [" ".join([case.name, *(f"{k}={v}" for k, v in case.sizes.items()), "ratio"]) for case in cases(smoke=True)]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"name": name, "value": 2.0} for name in names]))
    assert read_thresholds(path).beside_scipy == 192


def test_auto_takes_the_thresholds_that_are_set(monkeypatch):
    monkeypatch.setattr("immiscible_noise.solvers.has_lapx", lambda: False)
    monkeypatch.setattr("immiscible_noise.solvers._in_use", Thresholds())  # and back afterwards
    x, noise = torch.randn(100, 8), torch.randn(100, 8)
    seen = []
    for limit in (100, 101):
        use_thresholds(Thresholds(beside_scipy=limit))
        seen.append(assign_noise(x, noise, return_info=True)[1].solver)
    assert seen == ["sparse", "scipy"]


def test_training_ahead_in_the_benchmark_compares_assigned_with_drawn_noise():
    (case,) = [case for case in cases(smoke=True) if case.name.startswith("train with noise assigned ahead")]
    ours, theirs = case.ours(), case.reference()
    assert case.agree(ours, theirs)
    assert not case.agree(theirs, theirs)
    assert not case.agree(ours, ours)
    assert re.fullmatch(r"<\d\.\d% of a step|<100\.0% of a step", str(case.sizes["worker"]))
