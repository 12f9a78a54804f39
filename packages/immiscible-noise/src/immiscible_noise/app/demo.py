"""The two-minute tour: real handwritten digits, three arms, and what labels change."""

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.report import write_page
from immiscible_noise.classifier import TrainedClassifier
from immiscible_noise.compare import Comparison, compare, shared_classifier
from immiscible_noise.diagnosis import diagnose_images
from immiscible_noise.digits import digits_inputs, load_digits
from immiscible_noise.settings import PRESETS, EvaluationSettings, TrainSettings

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


@dataclass(frozen=True)
class Study:
    """One half of the demo: what a worker process needs to know of it.

    Attributes:
        folder: Of its run.
        arms: Names of presets; all start from seed 0.
        settings: Of every training.
        classifier: Gives the features.
    """

    folder: Path
    arms: tuple[str, ...]
    settings: TrainSettings
    classifier: TrainedClassifier

    def run(self) -> Comparison:
        """Trains and measures the arms; what is already there is not done again."""
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="condition='ignore'")  # what it warns of is what the demo shows
        images = load_digits()
        inputs = digits_inputs(images)
        config = {"arms": self.arms, "steps": self.settings.steps}
        with Run.open(self.folder, command="immiscible-noise compare", config=config, inputs=inputs) as run:
            done = compare(
                images,
                inputs,
                run,
                [PRESETS[arm] for arm in self.arms],
                [0],
                self.settings,
                EvaluationSettings(num_samples=2000),
                Runtime(device="cpu"),
                classifier=self.classifier,
            )
            run.finish(done.summary())
        return done


def run_demo(out: Path, *, full: bool = False) -> dict[str, Any]:
    """Trains and measures on the digits; returns the result, which `result.json` repeats.

    Args:
        out: Run folder; a finished demo is only read.
        full: Train twice as long, as the benchmark does.
    """
    # One thread each: the networks are too small to share, and the two halves below run at the same time.
    torch.set_num_threads(1)
    images = load_digits()
    inputs = digits_inputs(images)
    with Run.open(out, command="immiscible-noise demo", config={"full": full, "seed": 0}, inputs=inputs) as run:
        if run.finished:
            return run.result
        diagnosis = diagnose_images(images, run, (64, 256, 1024), 4, "standard", seed=0)
        print(f"first pictures: {write_page(run)}", file=sys.stderr, flush=True)
        classifier = shared_classifier(images, run, Runtime(device="cpu"))
        assert classifier is not None  # the digits are labelled
        settings = replace(SETTINGS, steps=2 * SETTINGS.steps) if full else SETTINGS
        labelled = replace(settings, class_conditional=True)
        studies = [
            Study(out / "unconditional", ("vanilla", "assignment", "half"), settings, classifier),
            Study(out / "conditional", ("assignment", "ignore"), labelled, classifier),
        ]
        with ProcessPoolExecutor(len(studies)) as pool:
            free, conditional = pool.map(Study.run, studies)
        result = summarise(free, conditional, diagnosis)
        run.finish(result)
        write_page(run)
        return result


def summarise(free: Comparison, conditional: Comparison, diagnosis: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of the demo and whether the effect was there."""
    ratio, _ = free.ratio("assignment", 5)
    within, ignored = (conditional.final(arm, 5)[0] for arm in ("assignment", "ignore"))
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
