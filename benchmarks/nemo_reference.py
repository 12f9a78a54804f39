"""What localisation costs against the plain sequential algorithm: rows and calls, which no machine changes, and memory.

    python benchmarks/nemo_reference.py [--captions 64] [--memorised 4] [--batch-size 64] [--smoke]

On U-Nets with planted memories; the neuron sets must be equal. Seconds are printed too: `nemo-localize bench` measures
them as ratios. Peak memory is what torch allocates above the start, in a run apart from the timed one.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_localize.plain import Answer, PlainLocaliser, refine_plainly, select_plainly

__all__ = ["Answer", "Comparison", "PlainLocaliser", "compare", "refine_plainly", "select_plainly"]

RESULTS = Path(__file__).parent / "results" / "nemo-reference.json"
ONE_CAPTION = (0.45, 1 / 4)  # most rows and calls, as shares of the plain way's
A_LIST = (0.55, 1 / 8)


@dataclass(frozen=True)
class Comparison:
    """Both ways on the same captions.

    Attributes:
        disagreements: Captions whose status or neuron sets differ.
        rows: Ours, and plain.
        calls: Likewise.
        seconds: Likewise.
        megabytes: Peak memory, likewise; None where it was not asked for.
    """

    disagreements: list[str]
    rows: tuple[int, int]
    calls: tuple[int, int]
    seconds: tuple[float, float]
    megabytes: tuple[float, float] | None = None

    def within(self, limits: tuple[float, float]) -> bool:
        """Returns whether shares of rows and calls are at most these."""
        pairs = zip((self.rows, self.calls), limits, strict=True)
        return all(ours <= limit * plain for (ours, plain), limit in pairs)

    def described(self, name: str) -> list[dict[str, Any]]:
        """Returns the figures that hardly a machine changes, as rows of name, value and unit."""
        rows: list[dict[str, Any]] = []
        for unit, (ours, plain) in self._counts():
            rows += [{"name": f"{name} {unit}", "value": ours, "unit": unit}]
            rows += [{"name": f"{name} reference {unit}", "value": plain, "unit": unit}]
        return [*rows, {"name": f"{name} disagreements", "value": len(self.disagreements), "unit": "captions"}]

    def __str__(self) -> str:
        parts = [
            f"{name} {ours:g} of {plain:g} ({100 * ours / plain:.1f} %)"
            for name, (ours, plain) in [*self._counts(), ("seconds", self.seconds)]
        ]
        return f"{', '.join(parts)}; {len(self.disagreements)} disagreements"

    def _counts(self) -> list[tuple[str, tuple[float, float]]]:
        memory = () if self.megabytes is None else (("MB", self.megabytes),)
        return [("rows", self.rows), ("calls", self.calls), *memory]


def compare(
    model: Any,
    captions: Sequence[str],
    statistics: Any,
    tau: float,
    *,
    batch_size: int = 64,
    num_seeds: int = 10,
    memory: bool = False,
) -> Comparison:
    """Localises captions in both ways, with the same latents, threshold and statistics."""
    from diffcore.bench import peak_megabytes
    from nemo_localize import FirstStep, SearchSettings, StepSettings, localize

    step = FirstStep(model, StepSettings(num_seeds=num_seeds), batch_size=batch_size)
    plain = PlainLocaliser(
        model, [site.module for site in step.sites.sites], step.noise, statistics.mean, statistics.var.sqrt(), tau
    )
    settings = SearchSettings(unit_size=len(captions))

    def quickly() -> Any:
        return localize(step, captions, tau=tau, statistics=statistics, settings=settings)

    def plainly() -> list[Answer]:
        return [plain.localise(caption) for caption in captions]

    start = time.perf_counter()
    ours = quickly()
    middle = time.perf_counter()
    theirs = plainly()
    seconds = (middle - start, time.perf_counter() - middle)
    rows, calls = (step.num_rows, plain.num_rows), (step.num_calls, plain.num_calls)
    disagreements = [
        result.prompt
        for result, answer in zip(ours, theirs, strict=True)
        if (result.status, step.sites.numbers(result.initial), step.sites.numbers(result.refined or result.initial))
        != (answer.status, answer.initial, answer.refined or answer.initial)
    ]
    megabytes = (round(peak_megabytes(quickly), 1), round(peak_megabytes(plainly), 1)) if memory else None
    return Comparison(disagreements, rows, calls, seconds, megabytes)


def main() -> int:
    """Prints and writes the comparison on one hard caption and on a list; 1 where they differ or a limit is missed."""
    from diffcore.io.jsonfile import write_json
    from nemo_localize import collect_statistics
    from nemo_localize.planted import hard_case, list_case, ordinary_captions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--memorised", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="8 captions, 2 of them memorised; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = (8, 2) if options.smoke else (options.captions, options.memorised)
    written, failed = [], False
    for name, (planted, captions), limits in (
        ("one hard caption", hard_case(), ONE_CAPTION),
        (f"{size[0]} captions, {size[1]} memorised", list_case(*size), A_LIST),
    ):
        statistics = collect_statistics(planted.model, ordinary_captions(500, seed=3))
        found = compare(planted.model, captions, statistics, tau=0.45, batch_size=options.batch_size, memory=True)
        kept = found.within(limits)
        sys.stdout.write(f"{name}: {found}{'' if kept else '; MORE THAN ALLOWED'}\n")
        sys.stdout.flush()
        failed |= bool(found.disagreements) or not kept
        written += found.described(name)
    if not options.smoke:
        write_json(RESULTS, written)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
