"""The demo: real handwritten digits, three couplings, and what labels change."""

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffcore.data import ImageSet
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.report import write_page
from immiscible_noise.coupling import PRESETS, Preset
from immiscible_noise.study.classifier import TrainedClassifier, shared_classifier
from immiscible_noise.study.compare import Comparison, compare
from immiscible_noise.study.diagnosis import diagnose_images
from immiscible_noise.study.digits import load_digits
from immiscible_noise.study.settings import EvaluationSettings, TrainSettings

LARGEST_RATIO = 0.75
LEAST_ACCURACY = 0.98
SETTINGS = TrainSettings(
    objective="flow",
    network="mlp",
    width=128,
    steps=1000,
    snapshots=3,
    batch_size=256,
    normalisation="standard",
    checkpoint_every=1000,
)


def study(folder: Path, names: list[Preset], settings: TrainSettings, classifier: TrainedClassifier) -> Comparison:
    """Trains and measures one half of the demo in a process of its own; finished parts are not repeated.

    Args:
        folder: Run folder of the half.
        names: Couplings that are compared; all trainings start from seed 0.
        settings: Settings that all trainings share.
        classifier: Network that gives the features.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="condition='ignore'")  # what it warns of is what the demo shows
    images, runtime, evaluation = load_digits(), Runtime(device="cpu"), EvaluationSettings(num_samples=2000)
    inputs, config = {"digits": images.sha256}, {"couplings": names, "steps": settings.steps}
    with Run.open(folder, command="immiscible-noise compare", config=config, inputs=inputs) as run:
        couplings = [PRESETS[name] for name in names]
        done = compare(images, inputs, run, couplings, [0], settings, evaluation, runtime, classifier=classifier)
        run.finish(done.summary())
    return done


def tour(images: ImageSet, run: Run, *, full: bool) -> dict[str, Any]:
    """Trains and measures on the digits, and returns the figures of the demo.

    Args:
        images: The handwritten digits, with labels.
        run: Run folder of the demo; its first images are there within half a minute.
        full: Train twice as long, as the benchmark does.
    """
    # One thread each: the networks are too small to share, and the two halves below run at the same time.
    torch.set_num_threads(1)
    diagnosis = diagnose_images(images, run, (64, 256, 1024), 4, "standard", seed=0)
    print(f"first images: {write_page(run)}", file=sys.stderr, flush=True)
    classifier = shared_classifier(images, run, Runtime(device="cpu"))
    assert classifier is not None  # the digits are labelled
    settings = replace(SETTINGS, steps=2 * SETTINGS.steps) if full else SETTINGS
    halves: list[tuple[str, bool, list[Preset]]] = [
        ("unconditional", False, ["vanilla", "assignment", "half"]),
        ("conditional", True, ["assignment", "ignore"]),
    ]
    with ProcessPoolExecutor(len(halves)) as pool:
        running = [
            pool.submit(study, run.folder / name, names, replace(settings, class_conditional=conditional), classifier)
            for name, conditional, names in halves
        ]
        free, conditional = (half.result() for half in running)
    return summarise(free, conditional, diagnosis)


def summarise(free: Comparison, conditional: Comparison, diagnosis: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of the demo and whether the effect was there."""
    ratio, _ = free.ratio("assignment", 5)
    within, ignored = (conditional.final(name, 5)[0] for name in ("assignment", "ignore"))
    passed = ratio <= LARGEST_RATIO and (within.accuracy or 0) > LEAST_ACCURACY
    return {
        "passed": passed,
        "assignment_over_vanilla_at_5_steps": ratio,
        "unconditional": free.summary(),
        "labels_respected": {"accuracy": within.accuracy, "frechet": within.frechet},
        "labels_ignored": {"accuracy": ignored.accuracy, "frechet": ignored.frechet},
        "leak": diagnosis["leak"],
        "features": free.features,
    }
