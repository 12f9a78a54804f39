"""The demo: a few portraits that a small model memorised are found, ablated and generated again.

Of its model, `zoo:portraits-sd-planted`, it is known which captions it memorised, with which image, and through which
rows of its value matrices.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from torch import Tensor

from diffcore.models import DiffusionModel, load
from diffcore.run import Run, RunMap
from diffcore.runtime import Runtime
from diffcore.zoo import Memorised, memorised
from diffcore.zoo.portraits.captions import ordinary_captions, same_form_captions
from diffcore.zoo.portraits.people import portraits
from nemo_localize.app.report import save_gallery, save_localization, write_page
from nemo_localize.calibrate import Calibration, calibrate
from nemo_localize.confirm import confirm, likenesses
from nemo_localize.files.results import FILE as RESULTS
from nemo_localize.files.results import write_results
from nemo_localize.first_step import FirstStep
from nemo_localize.generate import generate
from nemo_localize.likeness import likeness
from nemo_localize.localize import localize
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.protocol import COPY_ABOVE
from nemo_localize.results import CaptionResult, Results
from nemo_localize.settings import FIRST_IMAGE_SEED, ImageSettings, Mitigation
from nemo_localize.statistics import collect_statistics, merged

MODEL = "zoo:portraits-sd-planted"
_LOG = logging.getLogger("diffcore.nemo_localize")
_REFERENCES, _CALIBRATION_SEED, _REFERENCE_SEED = 300, 101, 102
_IMAGES, _SEEDS = ImageSettings(guidance_scale=1.0, steps=25), range(FIRST_IMAGE_SEED, FIRST_IMAGE_SEED + 4)
_MITIGATIONS: tuple[Mitigation, ...] = ("none", "neurons", "random-neurons")


@dataclass(frozen=True)
class _Size:
    """How much is looked at.

    Attributes:
        items: Number of memorised captions.
        others: Number of captions of each class that was never memorised.
        calibration: Number of ordinary captions that set and check the threshold.
    """

    items: int
    others: int
    calibration: int


_SHORT, _FULL = _Size(6, 6, 60), _Size(24, 32, 200)


def run_demo(out: Path, *, full: bool = False, model: DiffusionModel | None = None) -> dict[str, Any]:
    """Finds, ablates and generates again; returns the result, which `result.json` repeats.

    Args:
        out: Run folder; a finished demo is only read.
        full: Take all 24 memorised captions instead of six.
        model: Model instead of the one that comes with diffcore.
    """
    runtime, size = Runtime(device="cpu"), _FULL if full else _SHORT
    runtime.apply_threads()
    model = model or load(MODEL, runtime)
    known, inputs = memorised(), {model.name: model.fingerprint}
    with Run.open(out, command="nemo-localize demo", config={"full": full, "seed": 0}, inputs=inputs) as run:
        if run.finished:
            return run.result
        result = _toured(model, known, size, run)
        run.finish(result)
        write_page(run)
        return result


def _toured(model: DiffusionModel, known: Memorised, size: _Size, run: Run) -> dict[str, Any]:
    classes = _classes(known, size)
    items = classes["memorised"]
    originals = {item.caption: known.verbatim_images[i : i + 1] for i, item in enumerate(known.verbatim)}
    _generate(model, items[:2], originals, run, mitigations=("none",))
    print(f"first images: {write_page(run)}", file=sys.stderr, flush=True)
    step = FirstStep(model)
    statistics = merged(
        [
            collect_statistics(model, _ordinary(known, _REFERENCES, _REFERENCE_SEED), source="ordinary captions"),
            collect_statistics(
                model, same_form_captions(_REFERENCES, 0, _planted(known)), source="captions of the form"
            ),
        ]
    )
    # Half of them have the memorised captions' form: its form alone must not make a caption suspicious.
    half = size.calibration // 2
    innocent = _ordinary(known, half, _CALIBRATION_SEED) + same_form_captions(half, 1, _planted(known))
    calibration = calibrate(step, innocent, map=RunMap(run))
    results = localize(
        step,
        [text for texts in classes.values() for text in texts],
        tau=calibration.tau,
        statistics=statistics,
        map=RunMap(run),
    )
    write_results(run.folder / RESULTS, results)
    save_localization(run, results, calibration.tau, step, statistics)
    refined = NO_NEURONS.union(*(neurons for prompt, neurons in results.by_caption().items() if prompt in items))
    neurons, stubborn = confirm(
        model,
        results,
        refined,
        items,
        _SEEDS,
        judge=likeness(),
        settings=_IMAGES,
        originals=originals,
        map=RunMap(run),
    )
    images = _generate(model, items, originals, run, neurons=neurons)
    rows = _class_rows(classes, results, calibration)
    run.keep_table(
        "classes",
        rows,
        f"The threshold is {calibration.tau:.3f}: mean plus standard deviation (paper) of ordinary captions and of "
        "others of the memorised form.",
    )
    return _summary(known, results, items, neurons, images, originals, stubborn) | {"classes": rows}


def _generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    originals: Mapping[str, Tensor],
    run: Run,
    *,
    mitigations: tuple[Mitigation, ...] = _MITIGATIONS,
    neurons: NeuronSet = NO_NEURONS,
) -> dict[str, Tensor]:
    """Generates images, and shows them."""
    images = generate(
        model,
        prompts,
        _SEEDS,
        mitigations=mitigations,
        neurons=neurons,
        settings=_IMAGES,
        repeat=len(neurons),
        map=RunMap(run),
    )
    save_gallery(run, prompts, images, _SEEDS, originals)
    return images


def _classes(known: Memorised, size: _Size) -> dict[str, list[str]]:
    """Returns captions by what they are to the model."""
    return {
        "memorised": [item.caption for item in known.verbatim[: size.items]],
        "decoys, same form": [item.caption for item in known.decoys[: size.others]],
        "ordinary": _ordinary(known, size.others, 0),
    }


def _ordinary(known: Memorised, count: int, seed: int) -> list[str]:
    return ordinary_captions(portraits(seed, range(count)), seed, _planted(known))


def _planted(known: Memorised) -> set[str]:
    return {item.caption for item in (*known.verbatim, *known.template, *known.decoys)}


def _class_rows(
    classes: Mapping[str, Sequence[str]], results: Results, calibration: Calibration
) -> list[dict[str, Any]]:
    by_prompt = {r.prompt: r for r in results}
    rows = []
    for name, prompts in classes.items():
        levels = [by_prompt[prompt].max_consistency or 0.0 for prompt in prompts]
        above = sum(level > calibration.tau for level in levels)
        rows.append({"captions": name, "n": len(levels), "median consistency": median(levels), "above tau": above})
    return rows


def _summary(
    known: Memorised,
    results: Results,
    items: Sequence[str],
    neurons: NeuronSet,
    images: Mapping[str, Tensor],
    originals: Mapping[str, Tensor],
    stubborn: Sequence[str],
) -> dict[str, Any]:
    by_prompt = {r.prompt: r for r in results}
    found: list[CaptionResult] = [by_prompt[p] for p in items if by_prompt[p].status == "localized"]
    shares, levels = {}, {}
    for mitigation, shown in images.items():
        values = likenesses(likeness(), items, shown, images["none"], originals)
        shares[mitigation], levels[mitigation] = float((values > COPY_ABOVE).float().mean()), float(values.mean())
    hits = [neuron in known.trigger_rows[r.prompt] for r in found if r.refined for neuron in r.refined]
    closed = len(found) == len(items) and shares["neurons"] == 0
    sizes = [len(r.refined) for r in found if r.refined]
    return {
        "answer": (
            f"{len(found)} of {len(items)} memorised captions were localized; with {len(neurons)} neurons ablated, "
            f"copies fell from {shares['none']:.0%} to {shares['neurons']:.0%} of the images "
            f"({shares['random-neurons']:.0%} with as many random neurons ablated)."
        ),
        "closed": closed,
        "memorised": len(items),
        "localized": len(found),
        "neurons_each": median(sizes) if sizes else 0,
        "neurons_ablated": len(neurons),
        "needed_all_candidates": list(stubborn),
        "copies": shares,
        "mean_ssim_to_planted_image": levels,
        "precision_of_neurons": fmean(hits) if hits else 0.0,
        "copy_above_ssim": COPY_ABOVE,
    }
