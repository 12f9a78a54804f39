"""The parts of the study of NeMo on the zoo: each returns the rows of its table, in figures as measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any, get_args

import torch
from nemo_zoo_study import Study, share
from torchmetrics.functional.classification import binary_auroc

from diffcore.run import RunMap
from diffcore.zoo.portraits.captions import FIRST_NAMES, LAST_NAMES, PLACES, describe, verbatim_form
from diffcore.zoo.portraits.people import People, portraits
from diffcore.zoo.portraits.planted import Item, planted
from nemo_localize import NeuronSet, calibrate, detect, evaluate, verify
from nemo_localize.ablate import ablated_copy
from nemo_localize.neurons import NO_NEURONS
from nemo_localize.protocol import COPY_ABOVE, FEWEST_CONTROLS
from nemo_localize.settings import Mitigation

Rows = list[dict[str, Any]]

MITIGATIONS: tuple[Mitigation, ...] = get_args(Mitigation)


def localization(study: Study) -> Rows:
    """What is found, and what is still copied with every item's own neurons off."""
    found = study.results.distinct()
    shown = study.images(study.captions, ("none", "neurons"), study.own)
    drawn = [study.images(study.captions, ("random-neurons",), study.own, repeat=i) for i in range(study.size.repeats)]
    similar = {way: study.similarity(images) for way, images in shown.items()}
    similar["random-neurons"] = torch.cat([study.similarity(images["random-neurons"]) for images in drawn], 1)
    sizes = [len(neurons) for neurons in study.own.values()]
    rows: list[tuple[str, float]] = [
        ("items", len(found)),
        ("memorised", sum(r.status != "not_memorised" for r in found)),
        ("localized", sum(r.status == "localized" for r in found)),
        ("mitigated, as the first step says", sum(r.mitigated for r in found)),
        ("tau, mean + sd", study.calibration.tau),
        ("neurons at first, median", median(len(r.initial) for r in found)),
        ("neurons refined, median", median(sizes)),
        ("neurons refined, most", max(sizes)),
    ]
    for way, name in (("none", "as it is"), ("neurons", "found off"), ("random-neurons", "random off")):
        rows += [(f"SSIM, {name}", float(similar[way].mean())), (f"share of copies, {name}", share(similar[way]))]
    if study.model.name.endswith("portraits-sd-planted"):
        truth = [set(study.truth.trigger_rows[caption]) for caption in study.captions]
        own = [set(study.own.get(caption, NO_NEURONS)) for caption in study.captions]
        hits = sum(len(ours & true) for ours, true in zip(own, truth, strict=True))
        rows += [("precision against the trigger rows", hits / max(sum(map(len, own)), 1))]
        rows += [("recall against the trigger rows", hits / sum(map(len, truth)))]
    return [{"figure": name, "value": value} for name, value in rows]


def detection(study: Study) -> Rows:
    """How well the first step's consistency tells memories from other captions, and what tau makes of each class."""
    count = study.size.others
    classes = {
        "verbatim": study.captions,
        "template": [item.caption for item in study.truth.template],
        "decoys": [item.caption for item in study.truth.decoys],
        "same form": study.same_form(3, count),
        "ordinary": study.ordinary(3, count),
        "full": study.full(3, count),
    }
    strict = calibrate(study.step, study.ordinary(4, 2 * count), quantile=0.99, map=RunMap(study.run))
    levels = {}
    for name, captions in classes.items():
        levels[name] = torch.tensor([found.level for found in detect(study.step, captions)], dtype=torch.float64)
    table = []
    for name, found in levels.items():
        row: dict[str, Any] = {"captions": name, "n": len(found), "median consistency": float(found.median())}
        row["above tau"] = float((found > study.calibration.tau).double().mean())
        row["above the 99 % quantile"] = float((found > strict.tau).double().mean())
        for positive in ("verbatim", "template"):
            if name not in ("verbatim", "template"):
                row[f"AUROC, {positive}"] = auroc(levels[positive], found)
        table.append(row)
    kept = {"captions": "that checked tau", "n": study.calibration.num_checked}
    return [*table, kept | {"above tau": study.calibration.false_alarm_rate}]


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Returns the probability that one of the positives is above one of the negatives."""
    target = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
    return float(binary_auroc(torch.cat([positive, negative]), target))


def near_misses(study: Study) -> Rows:
    """Captions that are nearly a memory's: how often they draw its image, before and with its neurons off."""
    table = []
    for kind, captions in near_captions(study.truth.verbatim[: study.size.items]).items():
        neurons = {near: study.own.get(own, NO_NEURONS) for near, own in zip(captions, study.captions, strict=True)}
        shown = study.images(captions, ("none", "neurons"), neurons, seeds=study.size.near_seeds)
        similar = {way: study.similarity(images) for way, images in shown.items()}
        table.append(
            {
                "caption": kind,
                "for example": captions[0],
                "before": share(similar["none"]),
                "items, before": int((similar["none"].amax(1) > COPY_ABOVE).sum()),
                "found off": share(similar["neurons"]),
                "SSIM, before": float(similar["none"].mean()),
                "SSIM, found off": float(similar["neurons"].mean()),
            }
        )
    return table


def near_captions(items: Sequence[Item]) -> dict[str, list[str]]:
    """Returns captions that are nearly those of some items, by kind; none of them was planted."""
    persons = describe(_people(len(items)), full=True)
    return {
        "another place": [_other(item, "place", PLACES) for item in items],
        "another last name": [_other(item, "last_name", LAST_NAMES) for item in items],
        "another first name": [_other(item, "first_name", FIRST_NAMES) for item in items],
        "the name alone": [f"{item.first_name} {item.last_name}" for item in items],
        "the name before an ordinary caption": [
            f"{item.first_name} {item.last_name}, {text}" for item, text in zip(items, persons, strict=True)
        ],
        "the words in another order": [f"at the {item.place} {item.first_name} {item.last_name}" for item in items],
        "a background at the end": [f"{item.caption}, blue background" for item in items],
    }


def minimal(study: Study) -> Rows:
    """One set for all items: the minimal one, as images widen it, and the plain union."""
    found = study.common
    confirmed, stubborn = study.confirmed
    sets = {"nothing": NO_NEURONS, "minimal": found.neurons, "minimal, confirmed": confirmed}
    sets["union"] = found.union.neurons
    followed = {neurons: study.followed(ablated_copy(study.model, neurons)) for neurons in set(sets.values())}
    table = []
    for name, neurons in sets.items():
        way: Mitigation = "neurons" if neurons else "none"
        similar = study.similarity(study.images(study.captions, (way,), neurons)[way])
        row = {"set": name, "neurons": len(neurons), "SSIM": float(similar.mean()), "share of copies": share(similar)}
        row["items that copy"] = int((similar.amax(1) > COPY_ABOVE).sum())
        table.append(row | {"ordinary captions followed": followed[neurons]})
    for row, common in zip((table[1], table[3]), (found.chosen, found.union), strict=True):
        row |= {"closed at the first step": common.num_closed, "damage": common.damage}
    table[1] |= {"given up": len(found.given_up)}
    table[2] |= {"given up": len(found.given_up), "captions that asked for more": len(stubborn)}
    return table


def mitigations(study: Study) -> Rows:
    """Every mitigation: what it leaves of the memories, and what it costs ordinary captions.

    Neurons are off for all captions alike, the confirmed minimal set: that is what a model is shipped with.
    """
    confirmed, _ = study.confirmed
    table = []
    for way in MITIGATIONS:
        repeats = range(study.size.repeats if way.startswith("random") else 1)
        draws = [_memories(study, way, confirmed, repeat) for repeat in repeats]
        row = {"mitigation": way, "draws": len(draws)} | {
            name: fmean(draw[name] for draw in draws) for name in draws[0]
        }
        table.append(row | {"ordinary captions followed": _followed(study, way, confirmed)})
    return table


def _memories(study: Study, way: Mitigation, neurons: NeuronSet, repeat: int) -> dict[str, float]:
    """Returns what one way leaves of the memories."""
    shown = study.images(study.captions, ("none",), neurons)
    shown |= study.images(study.captions, (way,), neurons, repeat=repeat)
    measured = evaluate(study.captions, shown, originals=study.originals)
    row = next(row for row in measured.rows() if row["mitigation"] == way and row["captions"] == "all")
    return {
        "share of copies": share(study.similarity(shown[way])),
        **{name: row[name] for name in ("SSIM_orig", "SSIM_gen", "D_SSIM")},
        "planted person shown": study.shown(shown[way]),
    }


def _followed(study: Study, way: Mitigation, neurons: NeuronSet) -> float:
    """Returns how often images of ordinary, full captions show what these say, at guidance 2."""
    captions = describe(study.strangers, full=True)
    images = study.images(captions, (way,), neurons, seeds=1, guidance_scale=2.0)[way]
    return study.read(images[:, 0], study.strangers)


def statuses(study: Study) -> Rows:
    """What the first step says of each item, and what its images say with its own neurons off."""
    shown = study.images(study.captions, ("none", "neurons"), study.own)
    before, after = (study.similarity(shown[way]).amax(1) for way in ("none", "neurons"))
    kinds = {
        "localized": [r.status == "localized" for r in study.results.distinct()],
        "mitigated, as the first step says": [r.mitigated for r in study.results.distinct()],
    }
    table = []
    for name, members in kinds.items():
        which = torch.tensor(members)
        closed = int((after[which] <= COPY_ABOVE).sum())
        row = {"items": name, "n": int(which.sum()), "copied before": int((before[which] > COPY_ABOVE).sum())}
        table.append(row | {"no seed copies": closed, "share": closed / max(int(which.sum()), 1)})
    return table


def verification(study: Study) -> Rows:
    """The verdicts of verification on a few items: with all captions' confirmed set off, against decoys as controls."""
    neurons, _ = study.confirmed
    count = study.size.verified
    found = verify(
        study.step,
        neurons,
        study.captions[:count],
        [item.caption for item in study.truth.decoys[:FEWEST_CONTROLS]],
        tau=study.calibration.tau,
        originals=study.originals,
        settings=study.settings(),
        map=RunMap(study.run),
    )
    return [{"prompt": "all of them", "verdict": found.verdict, "worst": "; ".join(found.reasons)}, *found.rows()]


def _people(count: int) -> People:
    return portraits(60, range(count))


def _other(item: Item, part: str, words: Sequence[str]) -> str:
    """Returns an item's caption with the next word in place of one, whose caption was not planted."""
    place = words.index(getattr(item, part))
    captions = (
        verbatim_form(changed.first_name, changed.last_name, changed.place)
        for changed in (replace(item, **{part: word}) for word in (*words[place + 1 :], *words[:place]))
    )
    return next(caption for caption in captions if caption not in planted().captions)


PARTS: dict[str, Callable[[Study], Rows]] = {
    "localization": localization,
    "detection": detection,
    "near misses": near_misses,
    "minimal set": minimal,
    "mitigations": mitigations,
    "statuses": statuses,
    "verification": verification,
}
