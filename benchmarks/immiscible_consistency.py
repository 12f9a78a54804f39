"""The paper's headline: consistency training with and without assigned noise, both recipes, one and two sampling steps.

    python benchmarks/immiscible_consistency.py                          # 8x8 digits, three seeds
    python benchmarks/immiscible_consistency.py ZIP --split train --size 16 --network mlp
    python benchmarks/immiscible_consistency.py ZIP --split train --size 32 --seeds 1   # a U-Net: hours of a core

Fréchet distance over training steps, and how many times fewer steps a coupling takes to the distance that vanilla ends
at. Without a path it trains on 1797 real digits; with one, on the images of a folder or zip. An interrupted run
continues. Writes `immiscible-consistency.json` and `.md` in benchmarks/results, a part for each set of images, and a
run folder with a report for each recipe.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App
from immiscible_tables import record, spread

from diffcore.data import ImageSet, load_images
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.demo import SETTINGS
from immiscible_noise.app.options import Presets
from immiscible_noise.app.report import write_page
from immiscible_noise.coupling import PRESETS, Preset
from immiscible_noise.study.compare import Comparison, compare
from immiscible_noise.study.digits import load_digits
from immiscible_noise.study.settings import EvaluationSettings, Objective, TrainSettings

COUPLINGS: tuple[Preset, ...] = ("vanilla", "assignment", "half", "early", "flip")
RECIPES: dict[Objective, str] = {"consistency": "original recipe", "consistency-improved": "improved recipe"}
DIGITS = replace(SETTINGS, steps=3000, snapshots=9, snapshots_per_doubling=2)
IMAGES = TrainSettings(
    network="unet", width=32, steps=1500, batch_size=128, normalisation="standard", snapshots=7,
    snapshots_per_doubling=2, learning_rate=5e-4, ema_decay=0.995, gradient_clip=1.0,
)  # fmt: skip


def run(
    data: Path | None = None,
    *,
    size: int = 16,
    network: Literal["unet", "mlp"] = "unet",
    split: str | None = None,
    recipe: Literal["original", "improved", "both"] = "both",
    couplings: Presets = COUPLINGS,
    seeds: int = 3,
    steps: int | None = None,
    width: int | None = None,
    samples: int = 3000,
    out: Path = Path("runs/immiscible-consistency"),
) -> int:
    """Trains and measures everything.

    Args:
        data: Folder or zip of images; none takes the digits.
        size: Side that images are resized to.
        network: Network that learns images: a small U-Net in colour, or a multilayer perceptron on grey images, with
            which a core of a laptop sees whether the dimension matters.
        split: Folder inside the data, such as train.
        recipe: Recipes of consistency training that are run.
        couplings: Couplings that are compared.
        seeds: Trainings per coupling and recipe.
        steps: Training steps; none takes 3000 with the perceptron, 1500 with the U-Net.
        width: Number of channels of the U-Net's first level, none takes 32; or of units of the perceptron, none takes
            128 on digits, 256 on other images.
        samples: Samples per measurement.
        out: Run folder.
    """
    torch.set_num_threads(1)
    images = (
        load_digits()
        if data is None
        else load_images(data, size=size, split=split, channels=1 if network == "mlp" else 3)
    )
    name = "digits, 8x8" if data is None else f"{data.stem.split('-')[0]}, {size}x{size}, {network}"
    base = DIGITS if data is None else IMAGES if network == "unet" else replace(DIGITS, width=256)
    settings = replace(base, steps=steps or base.steps, width=width or base.width)
    for objective, told in RECIPES.items():
        if recipe not in ("both", told.split()[0]):
            continue
        folder = out / f"{name.replace(', ', '-')}-{told.split()[0]}"
        study = studied(images, folder, replace(settings, objective=objective), couplings, seeds, samples)
        section = table(f"{name}, {told}", study, settings, seeds)
        record("immiscible-consistency", "Consistency training with assigned noise", f"{name}, {told}", section, study)
    return 0


def studied(
    images: ImageSet, folder: Path, settings: TrainSettings, couplings: tuple[Preset, ...], seeds: int, samples: int
) -> Comparison:
    """Returns the comparison with one recipe, whose finished parts are read."""
    inputs = {"images": images.sha256}
    config = {"seeds": seeds, "steps": settings.steps, "couplings": list(couplings), "samples": samples}
    with Run.open(folder, command="immiscible-noise compare", config=config, inputs=inputs) as part:
        chosen, runtime = [PRESETS[name] for name in couplings], Runtime(device="cpu")
        evaluation = EvaluationSettings(num_samples=samples)
        study = compare(images, inputs, part, chosen, range(seeds), settings, evaluation, runtime)
        part.finish(study.summary())
        write_page(part)
    return study


def table(name: str, study: Comparison, settings: TrainSettings, seeds: int) -> str:
    """Returns a study's table in Markdown."""
    faster = {(row["coupling"], row["sampling_steps"]): row for row in study.speedup_rows()}
    lines = [
        f"## {name}",
        "",
        f"Fréchet distance after {settings.steps} steps of {settings.batch_size} images, mean ± deviation over "
        f"{seeds} paired seed{'s' if seeds > 1 else ''}; real against real {study.floor:.2f}. Features: "
        f"{study.features}.",
        "",
        "| coupling | 1 step | 2 steps | times fewer training steps to vanilla's last distance, 1 step: at first | "
        "for good |",
        "|---|---|---|---|---|",
    ]
    for coupling in study.couplings():
        cells = [spread([s.frechet for s in study.final(coupling, steps)]) for steps in study.sampling_steps()]
        row = faster.get((coupling, 1), {"fewer_steps_at_first": "–", "fewer_steps_for_good": "–"})
        cells += [row["fewer_steps_at_first"], row["fewer_steps_for_good"]]
        lines.append(f"| {coupling} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(App(help=__doc__, result_action="return_value", default_command=run)())
