"""Units of work: fixed slices, computed once, the same on one process and two, and after any interruption."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore.run import Run, RunMap
from diffcore.testing.distributed import run_forked
from diffcore.units import each_unit


@dataclass(frozen=True)
class Length:
    """A result."""

    word: str
    letters: int
    unit: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Length":
        return cls(**row)


WORDS = ["a", "bb", "ccc", "bb", "dddd", "a"]


def lengths(unit: list[str]) -> list[Length]:
    return [Length(word, len(word), len(unit)) for word in unit]


def opened(folder: Path) -> Run:
    return Run.open(folder, command="words count", config={})


def test_units_are_fixed_slices_of_the_distinct_items():
    found = each_unit(lengths, WORDS, name="words", kind=Length, unit_size=3)
    assert [one.word for one in found] == WORDS
    assert [one.unit for one in found] == [3, 3, 3, 3, 1, 3]


def test_a_run_gives_what_the_plain_loop_gives_and_computes_nothing_twice(tmp_path):
    plain = each_unit(lengths, WORDS, name="words", kind=Length, unit_size=2)
    with opened(tmp_path / "run") as run:
        assert RunMap(run)(lengths, WORDS, name="words", kind=Length, unit_size=2) == plain
    with opened(tmp_path / "run") as run:
        again = RunMap(run)(lambda unit: pytest.fail("it was there"), WORDS, name="words", kind=Length, unit_size=2)
        assert again == plain
        with pytest.raises(KeyError):  # another name is other work
            RunMap(run)(lambda unit: {}[0], WORDS, name="other", kind=Length)


def test_an_interrupted_map_goes_on_with_the_unit_that_was_interrupted(tmp_path):
    asked: list[list[str]] = []

    def stopping(unit: list[str]) -> list[Length]:
        asked.append(unit)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return lengths(unit)

    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "run") as run:
        RunMap(run)(stopping, WORDS, name="words", kind=Length, unit_size=2)
    with opened(tmp_path / "run") as run:
        RunMap(run)(stopping, WORDS, name="words", kind=Length, unit_size=2)
    assert asked == [["a", "bb"], ["ccc", "dddd"], ["ccc", "dddd"]]


def test_tensors_survive_to_the_bit(tmp_path):
    values = {n: torch.randn(2, n + 1, generator=torch.Generator().manual_seed(n)) for n in range(12)}
    with opened(tmp_path / "run") as run:
        found = RunMap(run)(lambda unit: [values[n] for n in unit], list(values), name="n", kind=Tensor, unit_size=12)
    assert all(torch.equal(a, b) for a, b in zip(found, values.values(), strict=True))


def test_two_processes_share_the_units_and_return_the_same(tmp_path):
    def on_rank(rank: int) -> list[int]:
        from lightning.fabric import Fabric
        from lightning.fabric.plugins.environments import LightningEnvironment

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[LightningEnvironment()])
        fabric.launch()
        with opened(tmp_path / "run") as run:
            mine = RunMap(run, fabric)
            found = mine(
                lambda unit: [Length(word, len(word), rank) for word in unit], WORDS, name="words", kind=Length
            )
        return [one.unit for one in found]

    first, second = run_forked(on_rank)
    assert first == second == [0, 1, 0, 1, 1, 0]


def test_one_string_is_no_list_of_items():
    with pytest.raises(TypeError, match="one string"):
        each_unit(lengths, "abc", name="words", kind=Length)
