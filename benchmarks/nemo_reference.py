"""What localisation costs against the plain sequential algorithm: rows and calls, which no machine changes.

    python benchmarks/nemo_reference.py [--captions 64] [--memorised 24] [--batch-size 64] [--repeats 1]

On U-Nets with planted memories; the neuron sets must be equal. Seconds are printed too: `nemo-localize bench` measures
them as ratios.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_localize.plain import Answer, PlainLocaliser, refine_plainly, select_plainly

__all__ = ["Answer", "Comparison", "PlainLocaliser", "compare", "refine_plainly", "select_plainly"]


@dataclass(frozen=True)
class Comparison:
    """Both ways on the same captions.

    Attributes:
        disagreements: Captions whose status or neuron sets differ.
        rows: Ours, and plain.
        calls: Likewise.
        seconds: Likewise.
    """

    disagreements: list[str]
    rows: tuple[int, int]
    calls: tuple[int, int]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        parts = [
            f"{name} {ours:g} of {plain:g} ({100 * ours / plain:.1f} %)"
            for name, (ours, plain) in (("rows", self.rows), ("calls", self.calls), ("seconds", self.seconds))
        ]
        return f"{', '.join(parts)}; {len(self.disagreements)} disagreements"


def compare(
    model: Any, captions: Sequence[str], statistics: Any, tau: float, *, batch_size: int = 64, num_seeds: int = 10
) -> Comparison:
    """Localises captions in both ways, with the same latents, threshold and statistics."""
    from nemo_localize import FirstStep, SearchSettings, StepSettings, localize

    step = FirstStep(model, StepSettings(num_seeds=num_seeds), batch_size=batch_size)
    plain = PlainLocaliser(
        model, [site.module for site in step.sites.sites], step.noise, statistics.mean, statistics.var.sqrt(), tau
    )
    start = time.perf_counter()
    ours = localize(step, captions, tau=tau, statistics=statistics, settings=SearchSettings(unit_size=len(captions)))
    middle = time.perf_counter()
    theirs = [plain.localise(caption) for caption in captions]
    seconds = (middle - start, time.perf_counter() - middle)
    disagreements = [
        result.prompt
        for result, answer in zip(ours, theirs, strict=True)
        if (result.status, step.sites.numbers(result.initial), step.sites.numbers(result.refined or result.initial))
        != (answer.status, answer.initial, answer.refined or answer.initial)
    ]
    return Comparison(disagreements, (step.num_rows, plain.num_rows), (step.num_calls, plain.num_calls), seconds)


def main() -> int:
    """Prints the comparison on one hard caption, and on a list."""
    from nemo_localize import collect_statistics
    from nemo_localize.planted import hard_case, list_case, ordinary_captions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--memorised", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    planted, captions = hard_case()
    lists, many = list_case(options.captions, options.memorised)
    failed = False
    for name, (case, prompts) in {"one caption": (planted, captions), "a list": (lists, many)}.items():
        statistics = collect_statistics(case.model, ordinary_captions(500, seed=3))
        found = compare(case.model, prompts, statistics, tau=0.45, batch_size=options.batch_size)
        sys.stdout.write(f"{name} ({len(prompts)}): {found}\n")
        failed |= bool(found.disagreements)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
