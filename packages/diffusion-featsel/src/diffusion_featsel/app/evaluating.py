"""What the commands `evaluate` and `probe` do beside the method: data, tables, and the choice of what is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffcore.cli import Job, settings
from diffcore.digests import digest_of
from diffcore.errors import UserError, printable
from diffcore.io.files import sha256
from diffcore.models import DiffusionModel
from diffcore.run import Run, RunMap
from diffusion_featsel.activation import Activation
from diffusion_featsel.app.inputs import (
    MaskData,
    PairData,
    Task,
    check_training,
    digest_of_data,
    features_named,
    inventory_at,
    make_extractor,
    protocol_of,
    read_mask_data,
    read_pair_data,
)
from diffusion_featsel.app.options import Extraction
from diffusion_featsel.app.scoring import tell_paper
from diffusion_featsel.app.work import Work
from diffusion_featsel.baselines import rescale, same_positions
from diffusion_featsel.correspond import match_pairs
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.files.features import StoredFeatures
from diffusion_featsel.files.masks import list_masked, masks_alone
from diffusion_featsel.judge import find_points, segment
from diffusion_featsel.keypoints import KeypointScores, keypoint_scores
from diffusion_featsel.match import MatchSettings
from diffusion_featsel.names import canonical
from diffusion_featsel.pairs import Pair
from diffusion_featsel.presets import preset
from diffusion_featsel.probe import Kind, ProbeResult, ProbeSettings, probe
from diffusion_featsel.protocol import Conditions
from diffusion_featsel.published import PublishedModel, published
from diffusion_featsel.selection import Selection
from diffusion_featsel.splits import image_splits

Matcher = Literal["argmax", "soft", "window"]
_GRID = (64, 64)


@dataclass(frozen=True, eq=False)
class Plan:
    """An evaluation whose data was read, and nothing computed.

    Attributes:
        model: Diffusion model that is looked into.
        task: Kind of labels, key points or masks.
        data: Pairs with key points, or images with masks.
        extraction: Options of the command line.
        extractor: Extractor that computes the features; None where every activation is measured alone.
        activations: Activations that are measured alone.
        against: Model of the paper that the order is compared with.
        facts: Figures that a dry run prints.
        digest: Digest of the labelled data.
    """

    model: DiffusionModel
    task: Task
    data: PairData | MaskData
    extraction: Extraction
    extractor: FeatureExtractor | None
    activations: tuple[Activation, ...]
    against: PublishedModel | None
    facts: Mapping[str, Any]
    digest: str


def plan_of(
    model: DiffusionModel,
    data: str,
    task: Task,
    features: Sequence[str],
    against: PublishedModel | None,
    extraction: Extraction,
    split: str,
    layout: Literal["large", "small"],
    num_classes: int | None,
) -> Plan:
    """Reads the data, and checks everything before the first step that takes long.

    Raises:
        UserError: The data cannot be read, or features are unknown.
    """
    read: PairData | MaskData
    if task == "correspondence":
        read = read_pair_data(data, split=split, layout=layout)
        count = len(read.pairs)
    else:
        read = read_mask_data(data, _GRID, num_classes)
        count = len(read.pictures)
    alone: tuple[Activation, ...] = ()
    extractor = None
    if against is not None or list(features) == ["all"]:
        listed = _inventory(model, extraction)
        protocol_of(extraction).timesteps(model, extraction.timestep)
        names = {row.name for row in published(against)} if against is not None else None
        alone = tuple(row for row in listed.features if names is None or row.name in names)
        if len(alone) < 3 and against is not None:
            raise UserError(f"`against_paper` is {against}, whose names this {listed.model_class} does not have")
    else:
        extractor = make_extractor(model, features_named(features), extraction)
    facts = {
        "data": read.name,
        "pairs" if task == "correspondence" else "images": count,
        "activations": len(alone) if extractor is None else len(extractor.names),
        "measured": "each alone" if extractor is None else "together",
    }
    return Plan(model, task, read, extraction, extractor, alone, against, facts, digest_of_data(read))


def _inventory(model: DiffusionModel, extraction: Extraction) -> Any:
    size = protocol_of(extraction).size
    if size is None:
        from diffusion_featsel.inventory import inventory

        return inventory(model)
    return inventory_at(model, (size, size) if isinstance(size, int) else size)


def evaluated(run: Run, plan: Plan, *, kind: Kind, matcher: Matcher, num_train: int | None) -> dict[str, Any]:
    """Measures, keeps tables for the report, and returns the summary.

    Args:
        run: Run that keeps the results.
        plan: The evaluation, with its data read.
        kind: Probe that reads the classes of masks.
        matcher: How points are matched.
        num_train: Number of training images for masks.
    """
    if isinstance(plan.data, PairData):
        return (
            _alone_by_points(run, plan, plan.data, matcher)
            if plan.extractor is None
            else _together_by_points(run, plan, plan.data, plan.extractor, matcher)
        )
    if plan.extractor is None:
        return _alone_by_masks(run, plan, plan.data, num_train)
    return _together_by_masks(run, plan.data, plan.extractor, kind, num_train)


def _together_by_points(
    run: Run, plan: Plan, data: PairData, extractor: FeatureExtractor, matcher: Matcher
) -> dict[str, Any]:
    first = list(dict.fromkeys(name for pair in data.pairs for name in (pair.source, pair.target)))[:32]
    if extractor.balance == "rms" and not extractor.statistics:
        extractor.calibrate([data.picture(name) for name in first])
    paper = plan.extraction.protocol == "paper"
    weights = None if paper else {n: 1 / max(extractor.statistics[n].rms, 1e-12) for n in extractor.names}
    found = match_pairs(
        data.pairs,
        data.reader(extractor),
        extractor.usual_size,
        settings=MatchSettings(matcher=matcher, protocol="paper" if paper else "exact"),
        weights=weights,
        center=None if paper else "pair",
    )
    scores = keypoint_scores(data.pairs, found)
    run.keep_table("tasks", _forms(scores), _pck_caption(data, scores))
    by_category = _categories(scores)
    if len(by_category) > 1:
        run.keep_table("scores", by_category, "PCK@0.1 per point, relative to the image and to the object's box.")
    same = keypoint_scores(data.pairs, same_positions(data.pairs), num_resamples=1).share("image").value
    share = scores.share("image", "points")
    return {
        "answer": f"{share.value:.1%} of {scores.num_points} key points are found within a tenth of the image (95 % "
        f"interval {share.low:.1%} to {share.high:.1%}); answering with the same position finds {same:.1%}.",
        "figure": share.value,
        "same_position": same,
        "pck": _forms(scores),
        "by_category": by_category,
        "left_out": {
            "invisible_points": scores.num_invisible,
            "points_outside": scores.num_outside,
            "pairs_without_box": scores.num_without_box,
            "pairs_without_points": scores.num_without_points,
        },
        "activations": list(extractor.names),
    }


def _forms(scores: KeypointScores) -> list[dict[str, Any]]:
    rows = []
    for form in scores.forms:
        row: dict[str, Any] = {"relative to": form.relative_to, "mean over": form.mean_over}
        for alpha, found, mean in zip(scores.thresholds, form.overall, form.category_mean, strict=True):
            row[f"PCK@{alpha:g}"] = found.value
            if alpha == 0.1:
                row["95 % interval"] = f"{found.low:.3f} to {found.high:.3f}"
                row["mean of categories"] = mean.value
        rows.append(row)
    return rows


def _categories(scores: KeypointScores) -> list[dict[str, Any]]:
    index = scores.thresholds.index(0.1)
    image, box = scores.form("image", "points").by_category, scores.form("box", "points").by_category
    return [{"category": name, "image": image[name][index], "box": box[name][index]} for name in image]


def _pck_caption(data: PairData, scores: KeypointScores) -> str:
    return (
        f"{data.name}: {scores.num_pairs} pairs, {scores.num_points} points. The four forms differ on the same "
        "predictions; intervals are from resampling the pairs. Compare like with like: published numbers are mostly "
        "per point, and some of 360 validation pairs."
    )


def _together_by_masks(
    run: Run, data: MaskData, extractor: FeatureExtractor, kind: Kind, num_train: int | None
) -> dict[str, Any]:
    parts: dict[str, list[Tensor]] = {name: [] for name in extractor.names}
    for start in range(0, len(data.pictures), 16):
        for name, maps in extractor(list(data.pictures[start : start + 16])).items():
            parts[name].append(maps.float().cpu())
    features = {name: torch.cat(tensors) for name, tensors in parts.items()}
    result = probe(
        features,
        data.labels,
        kind,
        num_classes=data.num_classes,
        settings=ProbeSettings(grid=_GRID, num_train=num_train),
    )
    return _told_probe(run, result, data.name, list(extractor.names))


def _told_probe(run: Run, result: ProbeResult, name: str, activations: list[str]) -> dict[str, Any]:
    rows = [
        {"figure": word, "mean": spread.mean, "standard deviation": spread.sd}
        for word, spread in (
            ("mean IoU", result.miou),
            ("pixel accuracy", result.pixel_accuracy),
            ("boundary IoU", result.boundary_iou),
        )
    ]
    split = result.splits[0]
    run.keep_table(
        "tasks",
        rows,
        f"{name}: {result.kind} over {len(result.splits)} random splits, {len(split.train)} training and "
        f"{len(split.test)} test images; classes that no test image has do not count.",
    )
    classes = [{"class": number, "IoU": value} for number, value in enumerate(result.per_class)]
    run.keep_table("scores", classes, "Intersection over union of each class, mean over the splits.")
    return {
        "answer": f"Mean IoU is {result.miou.mean:.3f} (standard deviation {result.miou.sd:.3f} over "
        f"{len(result.splits)} splits), by {result.kind}.",
        "figure": result.miou.mean,
        **result.to_json(),
        "activations": activations,
    }


def _prepared_pairs(plan: Plan, data: PairData) -> tuple[dict[str, Tensor], list[Pair], dict[str, Any]]:
    """Returns all images of the pairs as the network takes them, the pairs in their pixels, and how they are run."""
    names = list(dict.fromkeys(name for pair in data.pairs for name in (pair.source, pair.target)))
    protocol = protocol_of(plan.extraction)
    prepared = protocol.prepare(plan.model, [data.picture(name) for name in names]).images
    size = (prepared.shape[2], prepared.shape[3])
    pairs = [
        Pair(
            pair.source,
            pair.target,
            rescale(pair.source_points, pair.source_size, size),
            rescale(pair.target_points, pair.target_size, size),
            size,
            size,
        )
        for pair in data.pairs
    ]
    return dict(zip(names, prepared, strict=True)), pairs, _how(plan, size)


def _how(plan: Plan, size: tuple[int, int]) -> dict[str, Any]:
    protocol, extraction = protocol_of(plan.extraction), plan.extraction
    return {
        "t": protocol.timesteps(plan.model, extraction.timestep)[0],
        "condition": Conditions(plan.model)(extraction.prompt or "", size=size),
        "seed": extraction.seed,
        "batch_size": extraction.rows(),
    }


def _alone_by_points(run: Run, plan: Plan, data: PairData, matcher: Matcher) -> dict[str, Any]:
    images, pairs, how = _prepared_pairs(plan, data)
    found = find_points(plan.model, images, pairs, plan.activations, settings=MatchSettings(matcher=matcher), **how)
    scores = {}
    for name, points in found.items():
        back = [
            rescale(rows, pair.target_size, own.target_size)
            for rows, pair, own in zip(points, pairs, data.pairs, strict=True)
        ]
        scores[name] = keypoint_scores(data.pairs, back, num_resamples=200).share("image", "points")
    same = keypoint_scores(data.pairs, same_positions(data.pairs), num_resamples=1).share("image").value
    values = {name: interval.value for name, interval in scores.items()}
    rows = [
        {"activation": name, "PCK@0.1": scores[name].value, "low": scores[name].low, "high": scores[name].high}
        for name in sorted(values, key=lambda name: -values[name])
    ]
    caption = (
        f"{data.name}: each activation alone, per point, relative to the image, with 95 % intervals over "
        f"{len(pairs)} pairs; answering with the same position finds {same:.3f}."
    )
    return _told_alone(run, plan, values, rows, caption) | {"same_position": same}


def _alone_by_masks(run: Run, plan: Plan, data: MaskData, num_train: int | None) -> dict[str, Any]:
    prepared = protocol_of(plan.extraction).prepare(plan.model, list(data.pictures)).images
    split = image_splits(data.labels, data.num_classes, num_train=num_train, num_splits=1, seed=plan.extraction.seed)[0]
    found = segment(
        plan.model,
        prepared,
        data.labels,
        split,
        plan.activations,
        num_classes=data.num_classes,
        grid=_GRID,
        **_how(plan, (prepared.shape[2], prepared.shape[3])),
    )
    values = {name: scores.miou for name, scores in found.items()}
    rows = [
        {"activation": name, "miou": values[name], "pixel accuracy": found[name].pixel_accuracy}
        for name in sorted(values, key=lambda name: -values[name])
    ]
    caption = (
        f"{data.name}: ridge regression on each activation alone, {len(split.train)} training and {len(split.test)} "
        "test images."
    )
    return _told_alone(run, plan, values, rows, caption)


def _told_alone(
    run: Run, plan: Plan, values: Mapping[str, float], rows: list[dict[str, Any]], caption: str
) -> dict[str, Any]:
    run.keep_table("tasks", rows, caption)
    best = rows[0]["activation"]
    compared = tell_paper(run, values, plan.against) if plan.against is not None else {}
    told = compared.get("against_paper")
    agrees = (
        f"; their order agrees with the paper's by {told['simple']:.2f} on simple and {told['complex']:.2f} on complex "
        "scenes (Spearman)"
        if told
        else ""
    )
    return {
        "answer": f"Of {len(values)} activations, each alone, {best} is best with {values[best]:.3f}{agrees}.",
        "figure": values[best],
        "best": best,
        "activations": dict(values),
        **compared,
    }


def probed(
    extracted: Path,
    labels: Path,
    *,
    kind: Kind,
    features: Sequence[str],
    grid: int,
    num_splits: int,
    num_train: int | None,
    num_classes: int | None,
    work: Work,
    report: Callable[[Run], Any],
) -> int:
    """Probes stored features, and returns the exit code; arguments are the options of `probe`."""
    if not (extracted / "features.json").is_file():
        raise UserError(f"{printable(extracted, 300)} has no features; give the run folder of `extract`")
    if grid < 1 or num_splits < 1:
        raise UserError("`grid` and `num_splits` are at least 1")
    stored = StoredFeatures.open(extracted)
    names = _stored_names(features, stored)
    classes, images = _masks_for(labels, stored, (grid, grid), num_classes)
    check_training(num_train, len(images))
    options = {
        **{"run": extracted, "labels": labels, "kind": kind, "features": list(features), "grid": grid},
        **{"num_splits": num_splits, "num_train": num_train, "num_classes": num_classes},
    }

    def compute(run: Run, map: RunMap) -> dict[str, Any]:
        maps = {name: stored.maps(name, images).float() for name in names}
        chosen = ProbeSettings(grid=(grid, grid), num_splits=num_splits, num_train=num_train, seed=work.runtime.seed)
        result = probe(maps, classes, kind, num_classes=num_classes, settings=chosen)
        return _told_probe(run, result, extracted.name, names)

    job = Job(
        "diffusion-featsel probe",
        work.output.out or Path("runs") / f"probe-{extracted.resolve().name}",
        work.output,
        settings(**options, loading=work.loading, runtime=work.runtime),
        {"features": sha256(extracted / "features.json"), "labels": digest_of(repr(classes.tolist()))},
        (),
        work.runtime,
    )
    plan = {"images": len(images), "activations": len(names), "splits": num_splits, "probe": kind}
    return job(compute, plan=plan, report=report, shown=_shown)


def _shown(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("per_class", "strengths", "missing")}


def _stored_names(features: Sequence[str], stored: StoredFeatures) -> list[str]:
    """Returns the stored activations that a command line names; all of them where it names none."""
    if not features:
        return list(stored.names)
    named = features_named(features)
    if isinstance(named, str):
        named = preset(named).selection
    wanted = named.names if isinstance(named, Selection) else named
    names = list(dict.fromkeys(name if name in stored.names else canonical(name) for name in wanted))
    if unknown := [name for name in names if name not in stored.names]:
        raise UserError(f"{printable(unknown[0])} was not extracted; there are {', '.join(stored.names)}")
    return names


def _masks_for(
    labels: Path, stored: StoredFeatures, grid: tuple[int, int], num_classes: int | None
) -> tuple[Tensor, list[str]]:
    """Returns the masks on a grid, and the names of the stored images that have one."""
    masked = masks_alone(labels) or list_masked(labels)
    by_stem = {Path(name).stem: place for place, name in enumerate(masked.names)}
    images = [name for name in stored.images if Path(name).stem in by_stem]
    if len(images) < 2:
        raise UserError(f"{printable(labels)} has masks for {len(images)} of the extracted images; at least 2 need one")
    one_of_each = {row["shard"]: row["image"] for row in stored.index if row["image"] in set(images)}
    if len({stored.read(stored.names[0], name).shape for name in one_of_each.values()}) > 1:
        raise UserError(
            f"{printable(stored.folder, 300)} has features of images of several sizes; extract them again in another "
            "mode than native"
        )
    every = masked.labels(grid, num_classes)
    return every[[by_stem[Path(name).stem] for name in images]], images
