"""Sets of activations chosen under a budget, beside the best single one, the usual ones, and random ones.

    python benchmarks/featsel_sets.py [--smoke]

For two models of the zoo and three seeds, a set of at most 512 channels and four activations is chosen without labels,
by ridge regression on labelled images, and by key points of pairs. Each is measured on images and pairs that no choice
has seen, beside 20 random sets within the same budget. Writes results/featsel-sets.json and .md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from featsel_zoo import MODELS, SEEDS, text
from torch import Tensor

from diffcore.io.jsonfile import write_json, write_text
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from diffusion_featsel.app.portraits import NUM_CLASSES, Portraits, portraits
from diffusion_featsel.app.sets import legacy_like, maps_of, measured_set
from diffusion_featsel.inventory import inventory
from diffusion_featsel.labelled import LabelledPairs, LabelledPixelsAccumulator
from diffusion_featsel.rank import score
from diffusion_featsel.select import select
from diffusion_featsel.splits import image_splits

RESULTS = Path(__file__).resolve().parent / "results" / "featsel-sets.json"
CHANNELS, LARGEST, CANDIDATES = 512, 4, 24


def study(model: DiffusionModel, seed: int, *, images: int, pairs: int, draws: int) -> list[dict[str, Any]]:
    """Returns one row per set, measured on images and pairs that the choice has not seen."""
    seen, fresh = portraits(images, pairs, seed=10 + seed), portraits(images, pairs, seed=20 + seed)
    activations = {activation.name: activation for activation in inventory(model).features}
    ranking = score(model, seen.plain[:64], list(activations.values()), seed=seed, batch_size=96)
    rms = {row.name: row.rms for row in ranking.rows}
    first = {name: activations[name] for name in list(ranking.scores())[:CANDIDATES]}
    learned = maps_of(model, torch.stack(list(seen.images.values())), list(first.values()), seed=seed)
    budget = f"{CHANNELS}ch"
    chosen = {
        "without labels": select(ranking, budget).names,
        "by masks": select(first, budget, pixels=pixels_of(seen, learned)).names,
        "by key points": select(first, budget, pairs=pairs_of(seen, learned, rms)).names,
        "best single, without labels": (next(iter(ranking.scores())),),
        "legacy": tuple(legacy_like(list(activations.values()))),
    }
    maps = maps_of(model, torch.stack(list(fresh.images.values())), list(activations.values()), seed=seed)
    split = image_splits(fresh.labels.long(), NUM_CLASSES, num_splits=1, seed=seed)[0]
    rows = [measured_set(name, names, maps, rms, fresh, split) for name, names in chosen.items()]
    generator = torch.Generator().manual_seed(seed)
    random = [
        measured_set("random", names, maps, rms, fresh, split) for names in random_sets(activations, draws, generator)
    ]
    told = [
        {
            "model": model.name,
            "seed": seed,
            "set": row.name,
            "channels": row.num_channels,
            "pck": row.pck,
            "miou": row.miou,
        }
        for row in rows
    ]
    for word, pick in (("random, mean", fmean), ("random, best", max)):
        told.append(
            {
                "model": model.name,
                "seed": seed,
                "set": word,
                "channels": round(fmean(row.num_channels for row in random)),
                "pck": pick([row.pck for row in random]),
                "miou": pick([row.miou for row in random]),
            }
        )
    print(told, flush=True)
    return told


def pixels_of(data: Portraits, maps: Mapping[str, Tensor]) -> Any:
    """Returns the moments of activations and masks."""
    sums = LabelledPixelsAccumulator({name: tensor.shape[1] for name, tensor in maps.items()}, NUM_CLASSES, (16, 16))
    sums.update({name: tensor[: len(data.plain)] for name, tensor in maps.items()}, data.labels.long())
    return sums.compute()


def pairs_of(data: Portraits, maps: Mapping[str, Tensor], rms: Mapping[str, float]) -> LabelledPairs:
    """Returns stored matches of all pairs."""
    rows = {image: row for row, image in enumerate(data.images)}
    kept = LabelledPairs((32, 32), {name: 1 / rms[name] for name in maps})
    for start in range(0, len(data.pairs), 32):
        some = data.pairs[start : start + 32]
        source, target = (
            {name: tensor[[rows[getattr(pair, side)] for pair in some]] for name, tensor in maps.items()}
            for side in ("source", "target")
        )
        kept.update(
            source,
            target,
            torch.stack([pair.source_points for pair in some]),
            torch.stack([pair.target_points for pair in some]),
            size=some[0].source_size,
            radius=torch.tensor([0.1 * max(pair.box) for pair in some]),
            counted=torch.stack([pair.counted for pair in some]),
        )
    return kept


def random_sets(activations: Mapping[str, Any], draws: int, generator: torch.Generator) -> list[list[str]]:
    """Returns random sets of at most as many activations and channels as a chosen one may have."""
    names, sets = list(activations), []
    for _ in range(draws):
        found: list[str] = []
        for index in torch.randperm(len(names), generator=generator).tolist():
            used = sum(activations[name].channels for name in found)
            if len(found) < LARGEST and used + activations[names[index]].channels <= CHANNELS:
                found.append(names[index])
        sets.append(found)
    return sets


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the means over models and seeds of each set, with the least of any run."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    told = []
    for name in names:
        mine = [row for row in rows if row["set"] == name]
        told.append(
            {
                "set": name,
                "channels": fmean(row["channels"] for row in mine),
                "PCK@0.1": fmean(row["pck"] for row in mine),
                "least": min(row["pck"] for row in mine),
                "mean IoU": fmean(row["miou"] for row in mine),
                "least ": min(row["miou"] for row in mine),
            }
        )
    return told


def main() -> int:
    """Runs the study and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small configuration; writes nothing")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    size = {"images": 24, "pairs": 12, "draws": 2} if smoke else {"images": 120, "pairs": 200, "draws": 20}
    rows = []
    for name in MODELS[:1] if smoke else MODELS:
        model = load(name, Runtime(device="cpu"))
        for seed in SEEDS[:1] if smoke else SEEDS:
            rows += study(model, seed, **size)
    page = "\n\n".join(
        [
            "# Sets of activations under a budget",
            f"At most {LARGEST} activations and {CHANNELS} channels, means over {len(MODELS)} models and {len(SEEDS)} "
            f"seeds; measured on {size['images']} images and {size['pairs']} warped pairs that no choice has seen.",
            text(table(rows)),
        ]
    )
    print(page)
    if not smoke:
        write_json(RESULTS, {"rows": rows, "table": table(rows)})
        write_text(RESULTS.with_suffix(".md"), page + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
