import json

import pytest
import torch

from diffcore.bench import Case, compare, peak_megabytes, run_cases
from diffcore.errors import UserError


def slow(n: int) -> torch.Tensor:
    x = torch.ones(100, 100)
    for _ in range(n):
        x = x @ x / 100
    return x


def case(name="case", *, agree=True, **options):
    return Case(name, {"n": 3}, lambda: slow(2), lambda: slow(200), lambda a, b: agree, **options)


def test_ratio_orders_and_counts_calls():
    calls = []
    counted = Case("c", {}, lambda: calls.append("o"), lambda: calls.append("r"), lambda a, b: True)
    compare(counted, repeats=3)
    # warm-up, three pairs whose order alternates, one run each for the memory
    assert "".join(calls) == "or" + "or" + "ro" + "or" + "or"


def test_ratio_is_above_one_where_ours_is_faster():
    result = compare(case(goal=2.0), repeats=5)
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert result.ratio > 5  # a hundred times the work
    assert result.reached
    assert not compare(case(goal=1e6), repeats=2).reached


def test_disagreement_fails_however_fast():
    assert not compare(case(agree=False), repeats=2).reached
    assert not compare(case(agree=False), smoke=True).reached


def test_agree_gets_ours_first():
    seen = []
    compare(Case("c", {}, lambda: 1, lambda: 2, lambda a, b: seen.append((a, b)) or True), smoke=True)
    assert seen == [(1, 2)]


@pytest.mark.parametrize("megabytes", [0.5, 40.0])
def test_peak_memory_is_what_is_held_at_once(megabytes):
    n = int(megabytes * 1e6 / 4)
    outside = torch.zeros(n)

    def one_after_another():
        for _ in range(3):
            x = torch.zeros(n)
            del x

    def three_together():
        kept = [torch.zeros(n) for _ in range(3)]
        return len(kept)

    assert peak_megabytes(one_after_another) == pytest.approx(megabytes, rel=0.01)
    assert peak_megabytes(three_together) == pytest.approx(3 * megabytes, rel=0.01)
    assert peak_megabytes(lambda: outside.add_(1)) < 0.01 * megabytes
    memory = Case("m", {}, one_after_another, three_together, lambda a, b: True, memory_goal=2.5)
    assert compare(memory, repeats=1).reached
    assert compare(memory, repeats=1).memory_ratio == pytest.approx(3, rel=0.02)


def test_rows_for_other_tools_and_a_baseline(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert run_cases([case()], repeats=2, json_path=file) == 0
    rows = json.loads(file.read_text())
    assert {row["unit"] for row in rows} == {"bool", "x", "s", "MB"}
    assert all({"name", "value", "unit"} <= set(row) for row in rows)
    assert "case n=3" in capsys.readouterr().out
    assert run_cases([case()], repeats=2, baseline=file, fail_below=1e-3) == 0
    assert run_cases([case()], repeats=2, baseline=file, fail_below=1e3) == 1
    assert "slower than baseline" in capsys.readouterr().out
    assert run_cases([case("new")], repeats=2, baseline=file, fail_below=1e3) == 0  # nothing to compare with
    assert run_cases([case(agree=False)], smoke=True) == 1
    assert "FAILED" in capsys.readouterr().out


def test_smoke_run_measures_nothing(tmp_path):
    file = tmp_path / "bench.json"
    assert run_cases([case(goal=1e9)], smoke=True, json_path=file) == 0
    assert json.loads(file.read_text()) == [{"name": "case n=3 agreed", "value": 1, "unit": "bool"}]


def test_threads_are_one_and_put_back():
    torch.set_num_threads(2)
    seen = []
    run_cases([Case("c", {}, torch.get_num_threads, lambda: 1, lambda a, b: seen.append(a) or True)], smoke=True)
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_bad_baselines(tmp_path):
    def unmade() -> list[Case]:
        raise AssertionError("the cases were made before the baseline was looked at")

    with pytest.raises(UserError, match="with `baseline`"):
        run_cases(unmade, fail_below=0.8)
    with pytest.raises(UserError, match="is no file; give as `baseline`"):
        run_cases(unmade, baseline=tmp_path / "none.json")
    file = tmp_path / "other.json"
    file.write_text('{"a": 1}')
    with pytest.raises(UserError, match="`json_path`"):
        run_cases([], baseline=file)


def test_a_case_that_fails_does_not_cost_those_before_it(tmp_path, capsys):
    def broken():
        raise RuntimeError("out of memory")

    file = tmp_path / "bench.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        run_cases([case(), Case("broken", {}, broken, broken, lambda a, b: True)], repeats=2, json_path=file)
    assert any(row["name"] == "case n=3 ratio" for row in json.loads(file.read_text()))
    assert "case n=3" in capsys.readouterr().err


def test_long_cases_take_two_pairs(monkeypatch):
    monkeypatch.setattr("diffcore.bench._LONG_ENOUGH", 0.0)
    calls = []
    compare(Case("c", {}, lambda: calls.append(1), lambda: 1, lambda a, b: True), repeats=7)
    assert len(calls) == 1 + 2 + 1  # warm-up, timed, memory
