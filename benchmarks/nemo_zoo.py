"""Plain NeMo on the zoo's two models that memorise: what it finds, what is left, and how it compares with the truth.

Takes a few minutes on one core. Writes nemo-zoo.json and nemo-zoo.md in benchmarks/results.
"""

import os
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from torch import Tensor

from diffcore import zoo
from diffcore.jsonfile import write_json, write_text
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from diffcore.shipped import shipped_folder
from diffcore.zoo.portraits.captions import ordinary_captions, same_form_captions
from diffcore.zoo.portraits.gates import PortraitsJudge, draw_samples, share_above, similarity_to
from diffcore.zoo.portraits.people import portraits
from diffcore.zoo.portraits.planted import planted
from nemo_localize import (
    FirstStep,
    NeuronSet,
    StepSettings,
    ValueSites,
    calibrate,
    collect_statistics,
    localize,
    switched_off,
)

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("portraits-sd-memorised", "portraits-sd-planted")
SEEDS = 4  # pictures per caption; their noise is not that of the search
PICTURE_SEED = 5


def ordinary(seed: int, count: int) -> list[str]:
    """Returns ordinary captions, planted ones and decoys left out."""
    return ordinary_captions(portraits(50 + seed, range(count)), seed, planted().captions)


def same_form(seed: int, count: int) -> list[str]:
    """Returns captions of the planted form that were never planted."""
    return same_form_captions(count, 20 + seed, planted().captions)


def random_set(sites: ValueSites, like: NeuronSet, avoided: NeuronSet, generator: torch.Generator) -> NeuronSet:
    """Returns as many neurons per layer as `like` has, none of those avoided."""
    chosen = {}
    for site, width in zip(sites.sites, sites.widths, strict=True):
        free = [i for i in range(width) if i not in avoided[site.module]]
        order = torch.randperm(len(free), generator=generator)
        chosen[site.module] = [free[int(i)] for i in order[: len(like[site.module])]]
    return NeuronSet.of(chosen)


def copies(model: DiffusionModel, sites: ValueSites, sets: list[NeuronSet], truth: zoo.Memorised) -> Tensor:
    """Returns the SSIM of each item's samples to its picture, with the item's own set off: items x seeds."""
    rows = []
    for item, picture, neurons in zip(truth.verbatim, truth.verbatim_images, sets, strict=True):
        with switched_off(model.backbone, sites, neurons):
            samples = draw_samples(model, [item.caption], seeds=SEEDS, seed=PICTURE_SEED)
        rows.append(similarity_to(picture.unsqueeze(0), samples))
    return torch.cat(rows)


def evaluate(name: str, runtime: Runtime) -> dict[str, Any]:
    """Returns the figures of one model."""
    model, truth = load(f"zoo:{name}", runtime), zoo.memorised()
    judge = PortraitsJudge(load_attribute_network(shipped_folder("portraits-oracle")))
    statistics = collect_statistics(model, ordinary(0, 500) + same_form(0, 500), source="ordinary and same form")
    step = FirstStep(model, StepSettings())
    calibration = calibrate(step, ordinary(1, 150) + same_form(1, 150))
    captions = [item.caption for item in truth.verbatim]
    results = localize(step, captions, tau=calibration.tau, statistics=statistics)
    sites = step.sites
    sets = [result.refined or NeuronSet.of({}) for result in results.distinct()]
    union = results.union()
    generator = torch.Generator().manual_seed(0)
    strangers = [random_set(sites, neurons, union, generator) for neurons in sets]
    nothing = [NeuronSet.of({})] * len(sets)
    similar = {
        "as it is": copies(model, sites, nothing, truth),
        "found neurons off": copies(model, sites, sets, truth),
        "random neurons off": copies(model, sites, strangers, truth),
    }
    planted_rows = [set(truth.trigger_rows[caption]) for caption in captions]
    found_rows = [set(neurons) for neurons in sets]
    hits = sum(len(found & true) for found, true in zip(found_rows, planted_rows, strict=True))
    accuracy = judge.followed(model)
    with switched_off(model.backbone, sites, union):
        blocked = judge.followed(model)
    summary: dict[str, Any] = {
        "tau": calibration.tau,
        "memorised of 24": sum(result.status != "not_memorised" for result in results.distinct()),
        "localised of 24": sum(result.status == "localised" for result in results.distinct()),
        "neurons at first, median": median(len(result.initial) for result in results.distinct()),
        "neurons refined, median": median(len(neurons) for neurons in sets),
        "union of all sets": len(union),
        "ordinary captions followed": sum(accuracy.values()) / len(accuracy),
        "ordinary captions followed, union off": sum(blocked.values()) / len(blocked),
    }
    for what, values in similar.items():
        summary |= {f"SSIM, {what}": float(values.mean()), f"share above .7, {what}": share_above(values)}
    if name == "portraits-sd-planted":
        summary["precision against the trigger rows"] = hits / max(sum(map(len, found_rows)), 1)
        summary["recall against the trigger rows"] = hits / sum(map(len, planted_rows))
    return summary


def main() -> None:
    """Evaluates both models and writes the results."""
    torch.set_num_threads(1)
    figures = {name: evaluate(name, Runtime(device="cpu", threads=1)) for name in MODELS}
    write_json(RESULTS / "nemo-zoo.json", figures)
    names = list(dict.fromkeys(key for values in figures.values() for key in values))
    lines = ["# Plain NeMo on the zoo", "", "| | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    for key in names:
        shown = [f"{figures[model][key]:.3f}" if key in figures[model] else "-" for model in MODELS]
        lines.append(f"| {key} | " + " | ".join(shown) + " |")
    write_text(RESULTS / "nemo-zoo.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
