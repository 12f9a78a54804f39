"""At which timestep pure noise is best shown to the network: detection on the zoo's two models that memorise.

    python benchmarks/nemo_timestep.py [--smoke]

For each of the first solver steps and several sets of ten seeds, the area under the curve with which the largest
consistency of a caption's seeds tells the 24 memorised captions of a model from ordinary, full and same-form ones.
Steps of one model, one set of seeds and one class are pairs: the same noise and captions. Writes
results/nemo-timestep.json and .md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nemo_zoo import MODELS, table
from nemo_zoo_parts import auroc

from diffcore import zoo
from diffcore.io.jsonfile import write_json, write_text
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from diffcore.zoo.portraits.captions import describe, ordinary_captions, same_form_captions
from diffcore.zoo.portraits.people import portraits
from diffcore.zoo.portraits.planted import planted
from nemo_localize import FirstStep, StepSettings, detect

RESULTS = Path(__file__).resolve().parent / "results" / "nemo-timestep.json"
STEPS = (1, 2, 3, 5, 8)
FIRST_SEEDS = (1, 11, 21)


def classes(count: int) -> dict[str, list[str]]:
    """Returns captions by kind: the memories, and others that were never planted."""
    excluded, people = planted().captions, portraits(57, range(count))
    return {
        "verbatim": [item.caption for item in zoo.memorised().verbatim],
        "ordinary": ordinary_captions(people, 7, excluded),
        "full": describe(people, full=True),
        "same form": same_form_captions(count, 27, excluded),
    }


def study(
    model: DiffusionModel, steps: Sequence[int], first_seeds: Sequence[int], captions: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Returns one row per step and set of seeds."""
    rows = []
    for first_seed in first_seeds:
        for at_step in steps:
            step = FirstStep(model, StepSettings(first_seed=first_seed, at_step=at_step))
            levels = {}
            for kind, texts in captions.items():
                levels[kind] = torch.tensor([found.level for found in detect(step, texts)], dtype=torch.float64)
            row: dict[str, Any] = {"model": model.name, "first seed": first_seed, "step": at_step, "timestep": step.t}
            rows.append(row | {f"AUROC, {k}": auroc(levels["verbatim"], levels[k]) for k in levels if k != "verbatim"})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps, few captions; no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, first_seeds, count = (STEPS[:2], FIRST_SEEDS[:1], 4) if options.smoke else (STEPS, FIRST_SEEDS, 60)
    rows = []
    for name in MODELS:
        rows += study(load(f"zoo:{name}", Runtime(device="cpu", threads=1)), steps, first_seeds, classes(count))
    if not options.smoke:
        write_json(RESULTS, rows)
        write_text(RESULTS.with_suffix(".md"), f"# Detection by the timestep that is looked at\n\n{table(rows)}\n")


if __name__ == "__main__":
    sys.exit(main())
