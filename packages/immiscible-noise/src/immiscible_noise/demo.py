"""The two-minute tour: real handwritten digits, three arms, and what labels change."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.compare import Comparison, compare, shared_classifier
from immiscible_noise.diagnosis import diagnose_images
from immiscible_noise.digits import digits_inputs, load_digits
from immiscible_noise.page import write_page
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


def run_demo(out: Path, *, full: bool = False) -> dict[str, Any]:
    """Trains and measures on the digits; returns the result, which `result.json` repeats.

    Args:
        out: Run folder; a finished demo is only read.
        full: Train twice as long, as the benchmark does.
    """
    images, runtime = load_digits(), Runtime(device="cpu")
    inputs = digits_inputs(images)
    with Run.open(out, command="immiscible-noise demo", config={"full": full, "seed": 0}, inputs=inputs) as run:
        if run.finished:
            return run.result
        diagnosis = diagnose_images(images, run, (64, 256, 1024), 4, "standard", seed=0)
        write_page(run)
        print(f"first pictures: {run.folder / 'report.html'}", file=sys.stderr, flush=True)
        classifier = shared_classifier(images, run, runtime)

        def study(name: str, arms: list[str], settings: TrainSettings) -> Comparison:
            command, config = "immiscible-noise compare", {"arms": arms, "steps": settings.steps}
            with Run.open(run.folder / name, command=command, config=config, inputs=inputs) as part:
                evaluation = EvaluationSettings()
                chosen = [PRESETS[arm] for arm in arms]
                done = compare(images, inputs, part, chosen, [0], settings, evaluation, runtime, classifier=classifier)
                part.finish(done.summary())
            return done

        settings = replace(SETTINGS, steps=2 * SETTINGS.steps) if full else SETTINGS
        free = study("unconditional", ["vanilla", "assignment", "half"], settings)
        conditional = study("conditional", ["assignment", "ignore"], replace(settings, class_conditional=True))
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
