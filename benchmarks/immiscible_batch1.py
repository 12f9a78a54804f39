"""Batches of one: ordinary noise, a window of 256 upcoming samples, and the nearest of four draws, on 8x8 digits.

Flow matching with a small network, the same number of single images for each coupling, three paired seeds; Fréchet
distance over sampling steps and over training. An interrupted run continues. Writes `immiscible-batch1.json` and `.md`
in benchmarks/results, and a run folder with a report.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App
from immiscible_tables import RESULTS, curves

from diffcore.io.jsonfile import write_json, write_text
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.demo import SETTINGS
from immiscible_noise.app.report import write_page
from immiscible_noise.coupling import PRESETS, Coupling
from immiscible_noise.study.compare import compare
from immiscible_noise.study.digits import load_digits
from immiscible_noise.study.settings import EvaluationSettings

COUPLINGS = [PRESETS["vanilla"], Coupling("assignment", window=256), PRESETS["knn"]]


def run(steps: int = 16_000, seeds: int = 3, out: Path = Path("runs/immiscible-batch1")) -> int:
    """Trains and measures everything.

    Args:
        steps: Training steps, of one image each.
        seeds: Trainings per coupling.
        out: Run folder.
    """
    torch.set_num_threads(1)
    images, runtime = load_digits(), Runtime(device="cpu")
    settings = replace(
        SETTINGS, batch_size=1, steps=steps, learning_rate=3e-4, snapshots=4, checkpoint_every=steps, ema_decay=0.9995
    )
    config, inputs = {"steps": steps, "seeds": seeds}, {"digits": images.sha256}
    with Run.open(out, command="immiscible-noise compare", config=config, inputs=inputs) as part:
        study = compare(images, inputs, part, COUPLINGS, range(seeds), settings, EvaluationSettings(), runtime)
        part.finish(study.summary())
        write_page(part)
    lines = [
        "# Batches of one image",
        "",
        f"Written by `benchmarks/immiscible_batch1.py`: Fréchet distance, mean ± deviation over {seeds} paired seeds; "
        f"real against real {study.floor:.2f}. Features: {study.features}.",
        "",
        *curves(study),
    ]
    write_json(RESULTS / "immiscible-batch1.json", {"summary": study.summary_rows(), "speedup": study.speedup_rows()})
    write_text(RESULTS / "immiscible-batch1.md", "\n".join([*lines, ""]))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(App(help=__doc__, result_action="return_value", default_command=run)())
