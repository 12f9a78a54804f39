"""How well scores without labels rank all activations of the zoo's models, against exact labels.

    python benchmarks/featsel_zoo.py [--smoke]

For two models, two timesteps and three seeds (of strangers, warps and noise): PCK on warped targets and mean IoU of
every activation, and of every score and quantity without labels the Spearman correlation with both, and the regret: how
far the best of its first five lies below the best of all. Portraits are aligned, so the share of points that are right
by answering with the same position stands beside each PCK. Writes results/featsel-zoo.json and .md.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from scipy.stats import spearmanr

from diffcore.io.jsonfile import write_json, write_text
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from diffusion_featsel.app.portraits import portraits
from diffusion_featsel.inventory import inventory
from diffusion_featsel.judge import find_points, segment
from diffusion_featsel.keypoints import keypoint_scores
from diffusion_featsel.rank import score
from diffusion_featsel.ranking import Ranking
from diffusion_featsel.splits import image_splits

RESULTS = Path(__file__).resolve().parent / "results" / "featsel-zoo.json"
MODELS = ("zoo:portraits-sd", "zoo:portraits-sd-memorised")
TIMESTEPS = (50.0, 200.0)
SEEDS = (0, 1, 2)
NUM_CLASSES = 11
NOT_SCORES = ("rms", "massive", "t_dependence")


def measured(model: DiffusionModel, t: float, seed: int, *, images: int, pairs: int, ranked: int) -> dict[str, Any]:
    """Returns true and label-free measurements of all activations, and how well they agree."""
    data = portraits(images, pairs, seed=seed)
    activations = inventory(model).features
    found = find_points(model, data.images, data.pairs, activations, t=t, seed=seed)
    pck = {name: share_of(data.pairs, points) for name, points in found.items()}
    labels = data.labels.long()
    split = image_splits(labels, NUM_CLASSES, num_train=2 * images // 3, num_splits=1, seed=seed)[0]
    scored = segment(
        model, data.plain, labels, split, activations, num_classes=NUM_CLASSES, grid=(32, 32), t=t, seed=seed
    )
    miou = {name: scores.miou for name, scores in scored.items()}
    ranking = score(model, data.plain[:ranked], activations, t=t, seed=seed, batch_size=96)
    return {
        "model": model.name,
        "t": t,
        "seed": seed,
        "same position": share_of(data.pairs, [pair.source_points for pair in data.pairs]),
        "best": {"pck": max(pck, key=lambda name: pck[name]), "miou": max(miou, key=lambda name: miou[name])},
        "activations": [
            {
                "name": row.name,
                "kind": row.activation.kind,
                "grid": list(row.activation.grid or ()),
                "pck": pck[row.name],
                "miou": miou[row.name],
                **row.numbers(),
                "fisher_rank": row.fisher_rank,
            }
            for row in ranking.rows
        ],
        "twins": twins(ranking, pck, miou),
    }


def share_of(pairs: Sequence[Any], points: Sequence[torch.Tensor]) -> float:
    """Returns the share of points within a tenth of the head's box, over all points."""
    return keypoint_scores(pairs, points, num_resamples=1).share("box", "points").value


def twins(ranking: Ranking, pck: Mapping[str, float], miou: Mapping[str, float]) -> list[dict[str, float]]:
    """Returns, for each pair of activations with a CKA above 0.9, by how much their true scores differ."""
    names = [row.name for row in ranking.rows]
    similarity = ranking.similarity
    assert similarity is not None
    return [
        {"cka": float(similarity[a, b]), "pck": abs(pck[x] - pck[y]), "miou": abs(miou[x] - miou[y])}
        for a, x in enumerate(names)
        for b, y in enumerate(names[:a])
        if float(similarity[a, b]) > 0.9
    ]


def agreement(run: Mapping[str, Any], task: str, quantity: str, grid: list[int] | None = None) -> tuple[float, float]:
    """Returns Spearman's correlation and the regret of a quantity for a task, on all activations or on one grid."""
    rows = [r for r in run["activations"] if r[quantity] is not None and (grid is None or r["grid"] == grid)]
    best = max(row[task] for row in run["activations"] if grid is None or row["grid"] == grid)
    first = sorted(rows, key=lambda row: -row[quantity])[:5]
    found: Any = spearmanr([row[quantity] for row in rows], [row[task] for row in rows])
    correlation = float(found.statistic)
    return correlation, best - max(row[task] for row in first)


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per quantity: means over all runs, with the least correlation of any run."""
    quantities = [key for key in runs[0]["activations"][0] if key not in ("name", "kind", "grid", "pck", "miou")]
    rows = []
    for quantity in (name for name in quantities if name not in NOT_SCORES):
        row: dict[str, Any] = {"quantity": quantity}
        for task in ("pck", "miou"):
            pairs = [agreement(run, task, quantity) for run in runs]
            inside = [agreement(run, task, quantity, grid)[0] for run in runs for grid in ([8, 8], [16, 16])]
            row[f"{task} correlation"] = fmean(rho for rho, _ in pairs)
            row[f"{task} least"] = min(rho for rho, _ in pairs)
            row[f"{task} regret"] = fmean(regret for _, regret in pairs)
            row[f"{task} inside a grid"] = fmean(rho for rho in inside if not math.isnan(rho))
        rows.append(row)
    return sorted(rows, key=lambda row: -row["pck correlation"] - row["miou correlation"])


def thresholds(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns what the filter's thresholds would drop: how many activations, and how good the best of them is."""
    rows = []
    for limit in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98):
        dropped = [
            [row for row in run["activations"] if row["reliability"] is not None and row["reliability"] < limit]
            for run in runs
        ]
        row: dict[str, Any] = {"rule": f"reliability below {limit:g}", "dropped": fmean(map(len, dropped))}
        for task in ("pck", "miou"):
            shares = [
                max(r[task] for r in rows_) / max(r[task] for r in run["activations"])
                for rows_, run in zip(dropped, runs, strict=True)
                if rows_
            ]
            row[f"best dropped {task} over best"] = max(shares, default=None)
        rows.append(row)
    for limit in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        pairs = [pair for run in runs for pair in run["twins"] if pair["cka"] > limit]
        row = {"rule": f"CKA above {limit:g}", "dropped": len(pairs) / len(runs)}
        rows.append(
            row
            | {f"largest difference in {task}": max((p[task] for p in pairs), default=None) for task in ("pck", "miou")}
        )
    return rows


def shortened(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run with the true scores and the default score of each activation alone, as one line of text each."""
    kept = [f"{a['name']} {a['pck']:.4f} {a['miou']:.4f} {a['self_match']:.4f}" for a in run["activations"]]
    return {key: value for key, value in run.items() if key not in ("activations", "twins")} | {
        "name, PCK, mean IoU, points found again": kept
    }


def carried_over(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns how well the order on the first model agrees with true scores on the second, over settings of both."""
    found: dict[str, list[float]] = {"pck": [], "miou": []}
    for run in runs:
        for other in runs:
            if run["model"] < other["model"] and (run["t"], run["seed"]) == (other["t"], other["seed"]):
                ours = {a["name"]: a["self_match"] for a in run["activations"]}
                for task, values in found.items():
                    result: Any = spearmanr(
                        [ours[a["name"]] for a in other["activations"]], [a[task] for a in other["activations"]]
                    )
                    values.append(float(result.statistic))
    return {task: fmean(values) for task, values in found.items() if values}


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> int:
    """Runs the study and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small configuration; writes nothing")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    size = {"images": 24, "pairs": 12, "ranked": 16} if smoke else {"images": 120, "pairs": 200, "ranked": 64}
    runs = []
    for name in MODELS[:1] if smoke else MODELS:
        model = load(name, Runtime(device="cpu"))
        for t in TIMESTEPS[:1] if smoke else TIMESTEPS:
            for seed in SEEDS[:1] if smoke else SEEDS:
                runs.append(measured(model, t, seed, **size))
                print({key: runs[-1][key] for key in ("model", "t", "seed", "same position", "best")}, flush=True)
    rows, rules = table(runs), thresholds(runs)
    best = [{"model": r["model"], "t": r["t"], "seed": r["seed"], "same position": r["same position"]}
            | {f"best {k}": max(a[k] for a in r["activations"]) for k in ("pck", "miou")}
            | {f"median {k}": median(a[k] for a in r["activations"]) for k in ("pck", "miou")}
            | {f"best by {k}": r["best"][k] for k in ("pck", "miou")} for r in runs]  # fmt: skip
    page = "\n\n".join(
        [
            "# Scores without labels, against exact labels",
            f"Means over {len(runs)} runs; {size['ranked']} images ranked, {size['pairs']} warped pairs, "
            f"{size['images']} images for segmentation at 32x32.",
            text(rows),
            f"The order by points found again on the first model, against truth on the second: {carried_over(runs)}.",
            "## Each run",
            text(best),
            "## What thresholds of the filter would drop",
            text(rules),
        ]
    )
    print(page)
    if not smoke:
        write_json(RESULTS, {"runs": [shortened(run) for run in runs], "table": rows, "thresholds": rules})
        write_text(RESULTS.with_suffix(".md"), page + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
