"""What assigning noise does to training, on 1797 real 8x8 digits: three objectives, all couplings, three seeds.

Takes about half an hour on one idle core; an interrupted run continues. Writes immiscible-digits.json and .md in
benchmarks/results, and a run folder with a report per objective.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App

from diffcore.io.jsonfile import write_json, write_text
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.demo import SETTINGS
from immiscible_noise.app.report import write_page
from immiscible_noise.coupling import PRESETS, Coupling
from immiscible_noise.study.classifier import shared_classifier
from immiscible_noise.study.compare import Comparison, compare
from immiscible_noise.study.digits import load_digits
from immiscible_noise.study.evaluate import Evaluator
from immiscible_noise.study.settings import EvaluationSettings, TrainSettings
from immiscible_noise.study.train import load_snapshot

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 2000

BASE = replace(SETTINGS, steps=STEPS, snapshots=4)
STUDIES: dict[str, tuple[TrainSettings, list[Coupling]]] = {
    "flow": (
        BASE,
        [PRESETS[n] for n in ("vanilla", "assignment", "half", "early", "knn", "knn-inner")],
    ),
    "ddpm": (
        replace(BASE, objective="ddpm"),
        [PRESETS[n] for n in ("vanilla", "assignment", "half", "flip", "knn", "knn-inner")],
    ),
    "flow-conditional": (
        replace(BASE, class_conditional=True),
        [PRESETS[n] for n in ("vanilla", "ignore", "assignment")],
    ),
}


def run(out: Path = Path("runs/immiscible-digits"), seeds: int = 3) -> int:
    """Trains and measures everything; returns 1 if the two assertions of the study fail.

    Args:
        out: Run folder.
        seeds: Trainings per coupling.
    """
    torch.set_num_threads(1)
    images, runtime = load_digits(), Runtime(device="cpu")
    inputs, tables, summary = {"digits": images.sha256}, [], {}
    for name, (settings, couplings) in STUDIES.items():
        command, config = "immiscible-noise compare", {"study": name, "seeds": seeds, "steps": STEPS}
        with Run.open(out / name, command=command, config=config, inputs=inputs) as part:
            classifier = shared_classifier(images, part, runtime)
            evaluation = EvaluationSettings()
            study = compare(
                images, inputs, part, couplings, range(seeds), settings, evaluation, runtime,
                classifier=classifier,
            )  # fmt: skip
            ancestral = _ancestral(study, part, runtime, images) if name == "ddpm" else {}
            part.finish(study.summary())
            write_page(part)
        tables.append(_table(name, study, ancestral))
        summary[name] = {"rows": study.summary_rows(), "ancestral": ancestral, "features": study.features}
    write_json(RESULTS / "immiscible-digits.json", summary)
    write_text(RESULTS / "immiscible-digits.md", "\n".join(tables))
    print("\n".join(tables))
    return 0


def _ancestral(study: Comparison, part: Run, runtime: Runtime, images: Any) -> dict[str, list[float]]:
    """Returns by coupling the distances of 100 ancestral steps, which assigned noise does not support."""
    if part.missing(["ancestral"]):
        classifier = shared_classifier(images, part, runtime)
        evaluator = Evaluator(images, classifier, EvaluationSettings(), runtime.torch_device)
        distances: dict[str, list[float]] = {}
        for recipe in study.recipes:
            training = part.folder / "couplings" / f"{recipe.coupling.name}-seed{recipe.seed}"
            denoiser = load_snapshot(recipe, training, STEPS)
            score = evaluator.score(denoiser, recipe, STEPS, 100, eta=1.0)
            distances.setdefault(recipe.coupling.name, []).append(score.frechet)
        part.save("ancestral", {}, distances=distances)
    return part.load("ancestral").fields["distances"]


def _table(name: str, study: Comparison, ancestral: dict[str, list[float]]) -> str:
    """Returns a study's table in Markdown: mean ± deviation over the seeds."""
    steps = study.sampling_steps()
    head = ["coupling", *(f"{s} steps" for s in steps), *(["ancestral, 100"] if ancestral else [])]
    lines = [f"### {name}, Fréchet distance after {STEPS} training steps", "", _row(head), _row(["---"] * len(head))]
    for coupling in study.couplings():
        cells = []
        for count in steps:
            final = study.final(coupling, count)
            accuracies = [s.accuracy for s in final if s.accuracy is not None]
            told = f", {mean(accuracies):.1%}" if accuracies else ""
            cells.append(_spread([s.frechet for s in final]) + told)
        cells += [_spread(ancestral[coupling])] if ancestral else []
        lines.append(_row([coupling, *cells]))
    lines += ["", f"Real against real: {study.floor:.2f}. Features: {study.features}.", ""]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.3g}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(App(help=__doc__, result_action="return_value", default_command=run)())
