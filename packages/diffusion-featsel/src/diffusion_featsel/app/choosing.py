"""What the command `select` does beside the method: reading the ranking and labels, and comparing sets."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from diffcore.cli import Job, settings
from diffcore.errors import UserError, printable
from diffcore.io.files import sha256
from diffcore.io.jsonfile import write_json
from diffcore.run import Run, RunMap
from diffusion_featsel.activation import Activation
from diffusion_featsel.alignment import Alignment
from diffusion_featsel.app.inputs import (
    MaskData,
    PairData,
    Task,
    digest_of_data,
    make_extractor,
    read_mask_data,
    read_pair_data,
)
from diffusion_featsel.app.options import Extraction
from diffusion_featsel.app.work import Work
from diffusion_featsel.baselines import rescale
from diffusion_featsel.budget import Budget
from diffusion_featsel.files.ranking import FILE, read_ranking
from diffusion_featsel.labelled import LabelledPairs, LabelledPixels, LabelledPixelsAccumulator
from diffusion_featsel.presets import PRESETS, preset
from diffusion_featsel.ranking import Ranking
from diffusion_featsel.search import SelectSettings
from diffusion_featsel.select import select
from diffusion_featsel.selection import Selection

_GRID, _BATCH = (32, 32), 16
_FIGURES = {"score": "mean score", "information": "information", "pixels": "mean IoU", "pairs": "PCK@0.1"}


def choose(
    scored: Path,
    budget: str,
    *,
    labels: str | None,
    task: Task,
    candidates: int,
    max_size: int,
    ladder: bool,
    beam: int,
    num_classes: int | None,
    work: Work,
    report: Callable[[Run], Any],
) -> int:
    """Chooses a set, writes it to a run, and returns the exit code; arguments are the options of `select`."""
    path = scored / FILE if scored.is_dir() else scored
    if not path.is_file():
        raise UserError(f"{printable(scored)} has no {FILE}; give the run folder of `score`")
    ranking, filtered, details = read_ranking(path)
    kept = set(filtered.kept) if filtered is not None else {row.name for row in ranking.rows}
    scores = {name: value for name, value in ranking.scores(ranking.default).items() if name in kept}
    activations = {row.name: row.activation for row in ranking.rows if row.name in scores}
    extraction = Extraction(**details["extraction"])
    choice = SelectSettings(max_size=max_size, ladder=ladder, beam=beam)
    candidates = len(activations) if labels is None else min(candidates, len(activations))
    first = {name: activations[name] for name in list(scores)[:candidates]}
    if not first:
        raise UserError(
            f"the filter of {printable(scored, 300)} keeps no activation, or none has a score; run score again with "
            "--filter none, or --keep PATTERN"
        )
    Budget.of(budget).require_one(first)
    data = _labelled(labels, task, num_classes)

    def compute(run: Run, map: RunMap) -> dict[str, Any]:
        presets = {
            name: names
            for name in PRESETS
            if len(preset(name).parts) == 1 and set(names := preset(name).selection.names) <= set(activations)
        }
        if data is None:
            alignment = None
            if ranking.similarity is not None:
                alignment = Alignment(tuple(row.name for row in ranking.rows), ranking.similarity)
            chosen = select(activations, budget, scores=scores, alignment=alignment, presets=presets, settings=choice)
        else:
            evidence = _evidence(details, first, extraction, data, ranking, work)
            chosen = select(first, budget, presets=presets, settings=choice, **evidence)
        if not run.leading:
            return {}
        chosen = _complete(chosen, ranking, extraction, details)
        write_json(run.folder / "selection.json", chosen.to_json())
        _keep(run, chosen, ranking)
        steps = chosen.details["steps"]
        return {
            "answer": f"{len(chosen.names)} activations of {len(activations)} for "
            f"{_in_words(chosen.details['cost'])}: {', '.join(chosen.names)}.",
            "names": list(chosen.names),
            "cost": chosen.details["cost"],
            "costs": chosen.details["costs"],
            "method": chosen.details["method"],
            "steps": steps,
            "selection": run.folder / "selection.json",
        }

    options = {
        **{"run": scored, "budget": budget, "labels": labels, "task": task, "candidates": candidates},
        **{"max_size": max_size, "ladder": ladder, "beam": beam, "num_classes": num_classes},
    }
    job = Job(
        "diffusion-featsel select",
        work.output.out or Path("runs") / f"select-{path.resolve().parent.name}",
        work.output,
        settings(**options, loading=work.loading, runtime=work.runtime),
        {"ranking": sha256(path)} | ({} if data is None else {"labels": digest_of_data(data)}),
        (),
        work.runtime,
    )
    plan = {"candidates": candidates, "budget": budget} | ({} if data is None else {"labels": data.name})
    return job(compute, plan=plan, report=report, shown=_shown)


def _labelled(labels: str | None, task: Task, num_classes: int | None) -> PairData | MaskData | None:
    if labels is None:
        return None
    return read_mask_data(labels, _GRID, num_classes) if task == "segmentation" else read_pair_data(labels)


def _in_words(cost: str) -> str:
    return f"{float(cost.removeprefix('flops:')):.0%} of a forward pass" if cost.startswith("flops:") else cost


def _shown(result: Any) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("steps", "costs")}


def _complete(chosen: Selection, ranking: Ranking, extraction: Extraction, details: dict[str, Any]) -> Selection:
    """Returns the selection with the protocol that its ranking was made by, and the scale of each activation."""
    return Selection(
        chosen.names,
        rms={name: ranking[name].rms for name in chosen.names},
        t=ranking.t,
        prompt=extraction.prompt or "",
        draws=extraction.draws or 1,
        model=str(details.get("fingerprint", "")),
        details={
            **chosen.details,
            "scores": {name: ranking[name].numbers() for name in chosen.names},
            "modules": {name: ranking[name].activation.site.key for name in chosen.names},
            "exit": max(chosen.names, key=lambda name: ranking[name].activation.cost),
        },
    )


def _evidence(
    details: Mapping[str, Any],
    first: dict[str, Activation],
    extraction: Extraction,
    data: PairData | MaskData,
    ranking: Ranking,
    work: Work,
) -> dict[str, Any]:
    loaded = work.load(details["model"])
    if loaded.fingerprint != details["fingerprint"]:
        raise UserError(
            f"{printable(details['model'], 300)} is no longer the model that was scored; run `score` on it again"
        )
    extractor = make_extractor(loaded, list(first), extraction)
    if isinstance(data, MaskData):
        return {"pixels": _pixels(extractor, first, data)}
    features = data.reader(extractor)
    weights = {name: 1 / max(ranking[name].rms, 1e-12) for name in first}
    side = max(max(activation.grid or (1, 1)) for activation in first.values())
    kept = LabelledPairs((max(side, 64), max(side, 64)), weights)
    size = extractor.usual_size
    for start in range(0, len(data.pairs), _BATCH):
        some = list(data.pairs[start : start + _BATCH])
        points = pad_sequence([rescale(pair.source_points, pair.source_size, size) for pair in some], batch_first=True)
        true = pad_sequence([rescale(pair.target_points, pair.target_size, size) for pair in some], batch_first=True)
        # Where images are stretched, a circle becomes an ellipse: its mean radius stands for it.
        scales = [(size[0] / pair.target_size[0] + size[1] / pair.target_size[1]) / 2 for pair in some]
        radius = [0.1 * max(pair.box) * scale for pair, scale in zip(some, scales, strict=True)]
        kept.update(
            {name: maps.cpu() for name, maps in features([pair.source for pair in some]).items()},
            {name: maps.cpu() for name, maps in features([pair.target for pair in some]).items()},
            points,
            true,
            size=size,
            radius=torch.tensor(radius),
            counted=pad_sequence([pair.counted for pair in some], batch_first=True),
        )
    return {"pairs": kept}


def _pixels(extractor: Any, first: dict[str, Activation], data: MaskData) -> LabelledPixels:
    channels = {name: activation.channels for name, activation in first.items()}
    sums = LabelledPixelsAccumulator(channels, data.num_classes, _GRID)
    for start in range(0, len(data.pictures), _BATCH):
        rows = slice(start, start + _BATCH)
        maps = {name: tensor.float().cpu() for name, tensor in extractor(list(data.pictures[rows])).items()}
        sums.update(maps, data.labels[rows])
    return sums.compute()


def _keep(run: Run, chosen: Selection, ranking: Ranking) -> None:
    """Keeps the choice for the report: its steps, its members, and the sets that it was compared with."""
    details, figure = chosen.details, _FIGURES[chosen.details["method"]]
    unlabelled = details["method"] == "score"
    rows = []
    for step in details["steps"]:
        row = ranking[step["name"]]
        told = {"score": getattr(row, ranking.default)} if unlabelled else {figure: step["value"], "gain": step["gain"]}
        activation = row.activation
        shape = {"channels": activation.channels, "grid": "x".join(map(str, activation.grid or ()))}
        rows.append({"activation": step["name"], **told, **shape, "cost": activation.cost})
    caption = (
        "In the order of choice: the best score first, then the best that is no near copy of those before it, with a "
        "coarse and a fine one where both fit."
        if unlabelled
        else f"In the order of choice; {figure} is that of the set so far, cross-validated."
    )
    total, curve = 0.0, []
    for step in details["steps"]:
        total += step["cost"]
        curve.append({"cost": total, "value": step["value"]})
    run.save(
        "choice",
        {},
        rows=rows,
        caption=caption,
        curve=[] if unlabelled else curve,
        cost_label=f"cost, of a budget of {_in_words(details['budget'])}",
        value_label=f"{figure} of the set",
        curve_caption=f"How {figure} grows with what the set costs.",
    )
    # The best activation alone always has the largest mean score.
    left = {"best single"} if unlabelled else set()
    baselines = {name: entry for name, entry in dict(details["baselines"]).items() if name not in left}
    if baselines:
        caption = "Random is the mean of 20 draws within the budget; a preset is taken whole, whatever it costs."
        if unlabelled:
            caption += " The mean score says how good members are alone, not how well they complete each other."
        run.save("table-sets", {}, rows=_sets(chosen, baselines, figure), caption=caption)
    if details["left_out"]:
        copies = [{"activation": name, "like": e["like"], "CKA": e["cka"]} for name, e in details["left_out"].items()]
        run.save(
            "table-copies",
            {},
            rows=copies[:20],
            caption="Left out as near copies of a chosen activation; the first 20.",
        )


def _sets(chosen: Selection, baselines: Mapping[str, Any], figure: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"set": "chosen", figure: chosen.details["value"]}]
    for name, entry in baselines.items():
        value = entry.get("value", entry.get("mean")) if isinstance(entry, dict) else entry
        rows.append({"set": name.replace("_", " "), figure: value})
    return rows
