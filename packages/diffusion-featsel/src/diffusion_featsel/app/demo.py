"""The demo: all activations of a small model ranked without labels, and the ranking held against exact labels."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from diffcore.models import DiffusionModel, load
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffusion_featsel.alignment import Alignment
from diffusion_featsel.app.portraits import MODEL, NUM_CLASSES, SIDE, Portraits, portraits
from diffusion_featsel.app.report import components_of, save_components, save_strips, write_page
from diffusion_featsel.app.sets import SetScore, legacy_like, maps_of, measured_set
from diffusion_featsel.files.ranking import FILE as RANKING
from diffusion_featsel.files.ranking import save_ranking
from diffusion_featsel.inventory import Inventory, inventory
from diffusion_featsel.judge import find_points, segment
from diffusion_featsel.keypoints import keypoint_scores
from diffusion_featsel.match import match_points
from diffusion_featsel.measured_filter import Filtered, measured_filter
from diffusion_featsel.rank import score
from diffusion_featsel.ranking import Ranking
from diffusion_featsel.select import select
from diffusion_featsel.selection import Selection
from diffusion_featsel.splits import Split, image_splits

_T, _BUDGET = 50.0, "512ch"
_STRIPS = 4


@dataclass(frozen=True)
class _Size:
    """How much is looked at.

    Attributes:
        images: Number of portraits of strangers.
        pairs: Number of pairs with key points.
        random_sets: Number of random sets that the chosen one is compared with.
    """

    images: int
    pairs: int
    random_sets: int


_SHORT, _FULL = _Size(60, 60, 8), _Size(160, 300, 20)


def run_demo(out: Path, *, full: bool = False, model: DiffusionModel | None = None) -> dict[str, Any]:
    """Lists, ranks, chooses and checks; returns the result, which `result.json` repeats.

    Args:
        out: Run folder; a finished demo is only read.
        full: Take more images, pairs and random sets.
        model: Model instead of the one that comes with diffcore.
    """
    runtime, size = Runtime(device="cpu"), _FULL if full else _SHORT
    runtime.apply_threads()
    model = model or load(MODEL, runtime)
    inputs = {model.name: model.fingerprint}
    with Run.open(out, command="diffusion-featsel demo", config={"full": full, "seed": 0}, inputs=inputs) as run:
        if run.finished:
            return run.result
        result = _toured(model, size, run)
        run.finish(result)
        write_page(run)
        return result


def _toured(model: DiffusionModel, size: _Size, run: Run) -> dict[str, Any]:
    data, listed = portraits(size.images, size.pairs), inventory(model)
    shown = maps_of(model, data.plain[:1], listed.features)
    save_components(run, data.plain[0], components_of(shown))
    print(f"first pictures: {write_page(run)}", file=sys.stderr, flush=True)
    ranking = score(model, data.plain, listed.features, t=_T)
    filtered = measured_filter(
        listed.features, {row.name: row.reliability for row in ranking.rows}, ranking.similarity, image_side=SIDE
    )
    save_ranking(run.folder / RANKING, ranking, filtered)
    run.table("ranking", ranking.to_rows())
    save_components(run, data.plain[0], components_of(shown), list(filtered.dropped))
    print(f"ranked without labels: {write_page(run)}", file=sys.stderr, flush=True)
    split = image_splits(data.labels.long(), NUM_CLASSES, num_splits=1)[0]
    pck, miou = _truth(model, data, split, listed, run)
    chosen = _chosen(ranking, filtered)
    rows = _compared(model, data, split, listed, ranking, chosen, size, run)
    return _summary(ranking, filtered, pck, miou, chosen, rows, data, listed)


def _truth(
    model: DiffusionModel, data: Portraits, split: Split, listed: Inventory, run: Run
) -> tuple[dict[str, float], dict[str, float]]:
    """Measures every activation with the exact labels, and keeps that for the report."""
    found = find_points(model, data.images, data.pairs, listed.features, t=_T)
    pck = {name: _share(data, points) for name, points in found.items()}
    scored = segment(
        model, data.plain, data.labels, split, listed.features, num_classes=NUM_CLASSES, grid=(16, 16), t=_T
    )
    miou = {name: scores.miou for name, scores in scored.items()}
    same = _share(data, [pair.source_points for pair in data.pairs])
    run.save(
        "truth",
        {},
        tasks={"pck": pck, "miou": miou},
        labels={"pck": "key points found, PCK@0.1 of the head", "miou": "mean IoU of a linear probe"},
        captions={
            "pck": f"Each point is an activation. Across: its score without labels; up: true correspondence on "
            f"{len(data.pairs)} pairs with warped targets. Answering with the same position would score {same:.2f}.",
            "miou": f"The same against segmentation, ridge regression on {len(split.train)} images and tested on "
            f"{len(split.test)} others.",
        },
    )
    return pck, miou


def _chosen(ranking: Ranking, filtered: Filtered) -> Selection:
    assert ranking.similarity is not None
    candidates = {row.name: row.activation for row in ranking.rows if row.name in filtered.kept}
    alignment = Alignment(tuple(row.name for row in ranking.rows), ranking.similarity.double())
    return select(candidates, _BUDGET, scores=ranking.scores(), alignment=alignment)


def _compared(
    model: DiffusionModel,
    data: Portraits,
    split: Split,
    listed: Inventory,
    ranking: Ranking,
    chosen: Selection,
    size: _Size,
    run: Run,
) -> list[SetScore]:
    """Measures the chosen set beside others, and draws some of its matches."""
    maps = maps_of(model, torch.stack(list(data.images.values())), listed.features, t=_T)
    rms = {row.name: row.rms for row in ranking.rows}
    best = next(iter(ranking.scores()))
    sets = {
        "chosen without labels": chosen.names,
        "its best activation alone": (best,),
        "legacy": legacy_like(listed.features),
    }
    rows = [measured_set(name, names, maps, rms, data, split) for name, names in sets.items()]
    generator = torch.Generator().manual_seed(0)
    names = [row.name for row in ranking.rows]
    random = [
        measured_set(
            "random",
            [names[i] for i in torch.randperm(len(names), generator=generator)[: len(chosen.names)]],
            maps,
            rms,
            data,
            split,
        )
        for _ in range(size.random_sets)
    ]
    _draw(data, maps, chosen, rms, run)
    table = [_row(row) for row in rows] + _random_rows(random)
    same = _share(data, [pair.source_points for pair in data.pairs])
    table.append({"set": "same position, no features", "activations": 0, "num_channels": 0, "pck": same, "miou": None})
    run.save(
        "choice",
        {},
        rows=table,
        caption=f"Sets of activations on {len(data.pairs)} pairs and {len(split.test)} test images. Random sets have "
        f"as many activations as the chosen one; {size.random_sets} were drawn.",
    )
    return [*rows, *random]


def _row(row: SetScore) -> dict[str, Any]:
    return {
        "set": row.name,
        "activations": len(row.names),
        "num_channels": row.num_channels,
        "pck": row.pck,
        "miou": row.miou,
    }


def _random_rows(rows: Sequence[SetScore]) -> list[dict[str, Any]]:
    shared = {"activations": len(rows[0].names), "num_channels": round(median(row.num_channels for row in rows))}
    pck, miou = [row.pck for row in rows], [row.miou for row in rows]
    return [
        {"set": "random, median", **shared, "pck": median(pck), "miou": median(miou)},
        {"set": "random, best", **shared, "pck": max(pck), "miou": max(miou)},
    ]


def _draw(data: Portraits, maps: Mapping[str, Tensor], chosen: Selection, rms: Mapping[str, float], run: Run) -> None:
    """Keeps the matches of some pairs for the report."""
    rows = {image: row for row, image in enumerate(data.images)}
    strips = []
    for pair in data.pairs[:_STRIPS]:
        sides = [
            {name: maps[name][rows[image] : rows[image] + 1] for name in chosen.names}
            for image in (pair.source, pair.target)
        ]
        weights = {name: 1 / rms[name] for name in chosen.names}
        points, size = pair.source_points[pair.counted], pair.source_size
        found = match_points(
            sides[0], sides[1], points[None], source_size=size, target_size=size, weights=weights, center="pair"
        )
        matched = found.points[0]
        true = pair.target_points[pair.counted]
        strips.append(
            {
                "source": data.images[pair.source],
                "target": data.images[pair.target],
                "points": points,
                "found": matched,
                "correct": ((matched - true).square().sum(1).sqrt() <= 0.1 * max(pair.box)).float(),
            }
        )
    save_strips(
        run,
        strips,
        f"Key points of portraits, found in other, warped ones with {len(chosen.names)} activations that were "
        "chosen without labels. Blue: within a tenth of the head; orange: wrong.",
    )


def _share(data: Portraits, points: Sequence[Tensor]) -> float:
    return keypoint_scores(data.pairs, points, num_resamples=1).share("box", "points").value


def _agreement(names: Sequence[str], scores: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Returns how well two orders agree, by Spearman's rank correlation."""
    result: Any = spearmanr([scores[name] for name in names], [truth[name] for name in names])
    return float(result.statistic)


def _summary(
    ranking: Ranking,
    filtered: Filtered,
    pck: Mapping[str, float],
    miou: Mapping[str, float],
    chosen: Selection,
    rows: Sequence[SetScore],
    data: Portraits,
    listed: Inventory,
) -> dict[str, Any]:
    scores = ranking.scores()
    names = list(scores)
    rho = {task: _agreement(names, scores, truth) for task, truth in (("pck", pck), ("miou", miou))}
    best = {"pck": max(pck, key=lambda n: pck[n]), "miou": max(miou, key=lambda n: miou[n])}
    regret = {
        task: truth[best[task]] - max(truth[name] for name in names[:5])
        for task, truth in (("pck", pck), ("miou", miou))
    }
    ours = rows[0]
    random = sorted(row.pck for row in rows if row.name == "random")
    return {
        "answer": (
            f"{len(listed.features)} activations ranked without a single label: the order agrees with true "
            f"correspondence by {rho['pck']:.2f} and with segmentation by {rho['miou']:.2f} (Spearman). The best of "
            f"its first five finds {max(pck[n] for n in names[:5]):.0%} of the points, the best of all "
            f"{pck[best['pck']]:.0%}; {len(chosen.names)} chosen together find {ours.pck:.0%}, random sets "
            f"{median(random):.0%} in the median."
        ),
        "activations": len(listed.features),
        "dropped": len(filtered.dropped),
        "images": ranking.num_images,
        "pairs": len(data.pairs),
        "spearman": rho,
        "regret": regret,
        "best": best,
        "best_value": {"pck": pck[best["pck"]], "miou": miou[best["miou"]]},
        "chosen": list(chosen.names),
        "sets": [_row(row) for row in rows if row.name != "random"],
        "random_pck": random,
    }
