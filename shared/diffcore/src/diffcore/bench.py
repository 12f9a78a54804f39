"""Benchmarks as ratios of an implementation to its reference, timed in turn on one machine in one state.

Seconds depend on the machine and its load; the median ratio of neighbouring runs does so far less. A case fails when
the two results disagree, however fast the implementation is.

Peak memory is what the timed function itself holds at most: on CUDA the allocator's peak above what was allocated
before; on a CPU the peak of torch's own allocations, summed up from the profiler's allocation events in one run apart
from the timed ones. Memory that other libraries allocate themselves, such as scipy's workspace, is not counted.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile  # torch.profiler's would import the whole compiler first

from diffcore.errors import UserError, printable
from diffcore.io import jsonfile

_RATIO = " ratio"  # ends the name of the rows that a later run is compared with
_LONG_ENOUGH = 100.0  # seconds of one case after which no further pair begins, once there are two


@dataclass(frozen=True)
class Case:
    """One comparison of an implementation (ours) with a reference.

    Attributes:
        name: The operation that is compared.
        sizes: The sizes that matter, shown in the table.
        ours: Runs the implementation on prepared inputs and returns its result.
        reference: Runs the reference on the same inputs and returns its result.
        agree: Compares both results, ours first, and returns whether they are equal within tolerance.
        goal: Smallest acceptable ratio of seconds, reference / ours; None sets no goal.
        memory_goal: Smallest acceptable ratio of peak memory, reference / ours; None sets no goal.
    """

    name: str
    sizes: Mapping[str, int | str]
    ours: Callable[[], Any]
    reference: Callable[[], Any]
    agree: Callable[[Any, Any], bool]
    goal: float | None = None
    memory_goal: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; ratios are reference / ours, above 1 where ours is better.

    Attributes:
        name: Name and sizes of the case.
        agreed: Whether the results agree.
        ratio: Median ratio of the seconds; its quartiles are `ratio_low` and `ratio_high`.
        ours_seconds: Median seconds of one run of ours.
        reference_seconds: Median seconds of one run of the reference.
        ours_megabytes: Peak memory of ours in MB (10^6 bytes).
        reference_megabytes: Peak memory of the reference in MB.
        goal: The goal of the case for seconds.
        memory_goal: The goal of the case for memory.
        smoke: Whether only agreement was checked, in which case no number means anything.
    """

    name: str
    agreed: bool
    ratio: float = 0.0
    ratio_low: float = 0.0
    ratio_high: float = 0.0
    ours_seconds: float = 0.0
    reference_seconds: float = 0.0
    ours_megabytes: float = 0.0
    reference_megabytes: float = 0.0
    goal: float | None = None
    memory_goal: float | None = None
    smoke: bool = False

    @property
    def memory_ratio(self) -> float:
        """Peak memory of the reference over ours; infinite where ours allocates nothing."""
        return self.reference_megabytes / self.ours_megabytes if self.ours_megabytes else float("inf")

    @property
    def reached(self) -> bool:
        """Whether the results agree and both goals are reached (agreement alone in a smoke run)."""
        fast = self.goal is None or self.ratio >= self.goal
        small = self.memory_goal is None or self.memory_ratio >= self.memory_goal
        return self.agreed and (self.smoke or (fast and small))


@dataclass
class _Times:
    ours: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        return [r / o for o, r in zip(self.ours, self.reference, strict=True)]


def compare(case: Case, repeats: int = 7, *, smoke: bool = False) -> Comparison:
    """Runs a case: warm-up with the check of agreement, then ours and the reference in turn.

    Args:
        case: The two functions to compare.
        repeats: Number of timed pairs, fewer where a pair takes long; which of the two goes first alternates.
        smoke: Whether only agreement is checked, without timing.
    """
    agreed = bool(case.agree(case.ours(), case.reference()))  # also the warm-up
    name = " ".join([case.name, *(f"{key}={value}" for key, value in case.sizes.items())])
    if smoke:
        return Comparison(name, agreed, goal=case.goal, memory_goal=case.memory_goal, smoke=True)
    times = _Times()
    started = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 2 and time.perf_counter() - started > _LONG_ENOUGH:
            break
        order = [(case.ours, times.ours), (case.reference, times.reference)]
        for function, seconds in order if repeat % 2 == 0 else reversed(order):
            seconds.append(_timed(function))
    ratios = times.ratios()
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Comparison(
        name,
        agreed,
        middle,
        low,
        high,
        statistics.median(times.ours),
        statistics.median(times.reference),
        peak_megabytes(case.ours),
        peak_megabytes(case.reference),
        case.goal,
        case.memory_goal,
    )


def run_cases(
    cases: Sequence[Case] | Callable[[], Sequence[Case]],
    *,
    smoke: bool = False,
    repeats: int = 7,
    json_path: Path | None = None,
    baseline: Path | None = None,
    fail_below: float | None = None,
) -> int:
    """Runs cases on one thread, prints a table, and returns an exit code: 0, or 1 where one failed.

    Each result is printed and written as soon as it is there: one case can take minutes.

    A case fails when results disagree, when a goal is missed, or when its ratio falls below `fail_below` times the
    baseline's.

    Args:
        cases: The comparisons to run, in order; or a function that makes them, once the baseline is read.
        smoke: Whether only agreement is checked, without timing.
        repeats: Number of timed pairs per case.
        json_path: The JSON file to write, with rows of name, value and unit.
        baseline: A file that an earlier run wrote to `json_path`.
        fail_below: Smallest acceptable share of the baseline's ratio, such as 0.8.

    Raises:
        UserError: `fail_below` without a baseline, or a baseline that is no such file.
    """
    before = _baseline_ratios(baseline, fail_below)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = []
        for case in cases() if callable(cases) else cases:
            results.append(compare(case, repeats, smoke=smoke))
            if not smoke:
                _print_line(results[-1])
            if json_path is not None:
                jsonfile.write_json(json_path, [row for result in results for row in _json_rows(result)])
    finally:
        torch.set_num_threads(threads)
    slower = {
        result.name
        for result in results
        if fail_below and not smoke and result.ratio < fail_below * before.get(result.name, 0.0)
    }
    _print_table(results, slower)
    return 0 if all(result.reached for result in results) and not slower else 1


def peak_megabytes(function: Callable[[], Any]) -> float:
    """Returns the most memory that `function` holds at once through torch, in MB (10^6 bytes), above the start."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        on_device = torch.cuda.max_memory_allocated() - start
        if on_device:
            return on_device / 1e6
    held = peak = 0
    for change in _allocation_changes(function):
        held += change
        peak = max(peak, held)
    return peak / 1e6


def _allocation_changes(function: Callable[[], Any]) -> list[int]:
    """Returns the bytes that each allocation takes (positive) or gives back (negative), in order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces itself on standard error
    with profile(profile_memory=True) as profiler:
        _ = function()
    recorded: Any = profiler  # torch's type stubs lack the fields of events
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _timed(function: Callable[[], Any]) -> float:
    _synchronize()
    started = time.perf_counter()
    result = function()
    _synchronize()
    seconds = time.perf_counter() - started
    del result  # freed outside the timing, for ours and the reference alike
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _baseline_ratios(baseline: Path | None, fail_below: float | None) -> dict[str, float]:
    if baseline is None:
        if fail_below is not None:
            raise UserError("`fail_below` compares with an earlier run; give its file with `baseline`")
        return {}
    if not baseline.is_file():
        raise UserError(f"{printable(baseline, 300)} is no file; give as `baseline` one that `json_path` named")
    try:
        values = {row["name"]: row["value"] for row in jsonfile.read_json(baseline)}
        return {name.removesuffix(_RATIO): float(value) for name, value in values.items() if name.endswith(_RATIO)}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"{printable(baseline, 300)} is no file that `json_path` named; make one on the older version"
        ) from error


def _json_rows(result: Comparison) -> list[dict[str, Any]]:
    agreement = {"name": f"{result.name} agreed", "value": int(result.agreed), "unit": "bool"}
    if result.smoke:
        return [agreement]
    spread = f"{result.ratio_low:.4g} - {result.ratio_high:.4g}"
    return [
        agreement,
        {"name": result.name + _RATIO, "value": result.ratio, "unit": "x", "range": spread},
        {"name": f"{result.name} seconds", "value": result.ours_seconds, "unit": "s"},
        {"name": f"{result.name} reference seconds", "value": result.reference_seconds, "unit": "s"},
        {"name": f"{result.name} memory", "value": result.ours_megabytes, "unit": "MB"},
        {"name": f"{result.name} reference memory", "value": result.reference_megabytes, "unit": "MB"},
    ]


def _print_line(result: Comparison) -> None:
    seconds = f"{result.ours_seconds:.3g} s beside {result.reference_seconds:.3g} s"
    print(f"{result.name}: {result.ratio:.3g} ({seconds})", file=sys.stderr, flush=True)


def _print_table(results: Sequence[Comparison], slower: set[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="ratio = reference / ours, median (quartiles) of interleaved runs on one thread")
    for title in (
        "case",
        "agree",
        "ratio",
        "goal",
        "ours",
        "reference",
        "memory ratio",
        "ours",
        "reference",
        "verdict",
    ):
        table.add_column(title, justify="left" if title in ("case", "verdict") else "right")
    for result in results:
        table.add_row(*_cells(result, result.name in slower))
    console = Console()
    # A log keeps whole rows; a terminal folds them.
    Console(width=None if console.is_terminal else 200).print(table)


def _cells(result: Comparison, slower: bool) -> list[str]:
    agreed = "yes" if result.agreed else "NO"
    verdict = "slower than baseline" if slower else "ok" if result.reached else "FAILED"
    if result.smoke:
        return [result.name, agreed, *[""] * 7, verdict]
    return [
        result.name,
        agreed,
        f"{result.ratio:.3g} ({result.ratio_low:.3g}-{result.ratio_high:.3g})",
        "" if result.goal is None else f">= {result.goal:g}",
        f"{result.ours_seconds * 1e3:.3g} ms",
        f"{result.reference_seconds * 1e3:.3g} ms",
        f"{result.memory_ratio:.3g}" + ("" if result.memory_goal is None else f" (>= {result.memory_goal:g})"),
        f"{result.ours_megabytes:.3g} MB",
        f"{result.reference_megabytes:.3g} MB",
        verdict,
    ]
