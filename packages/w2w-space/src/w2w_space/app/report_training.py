"""What the reports of train and invert show: losses, where subjects lie, and what their adapters draw."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from w2w_space.app.inputs import ranked

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel
    from w2w_space.draw import Drawing
    from w2w_space.instance import Instance
    from w2w_space.invert import Inversion, InversionSettings
    from w2w_space.layout import Layout
    from w2w_space.locate import Located
    from w2w_space.train_population import Trained

TITLES = {
    "train": "How well was each member learned?",
    "invert": "Which adapter of the space draws these pictures?",
}
_POINTS = 60  # of a curve over the steps
_LINES = 5  # curves in one figure
SHOWN = 6
"""Largest number of subjects whose pictures are shown."""
_TRAINING_LIMITS = (
    "The loss is measured on the pictures that the member was trained on, with noise that it did not see: it says that "
    "something was learned, and not that new pictures of the subject are drawn well.",
    "A member that removes no more of the loss than chance would is noise in a space; see which are named above.",
)
_INVERSION_LIMITS = (
    "A space holds what its members have in common. What is the subject's own is lost, and a subject of another kind "
    "becomes the nearest member of this kind.",
    "Percentiles count members that were held out of the fit, as far out as a search would find them, or else the "
    "members themselves; near 0 and 100 they say little more than beyond most.",
)


def save_training_parts(
    run: Run, trained: "Sequence[Trained]", skipped: Sequence[tuple[str, str]], notes: Sequence[str]
) -> None:
    """Keeps the losses of all members for the report.

    Args:
        run: Run that the report is about.
        trained: Members, failed ones among them.
        skipped: Name and reason of each file and folder that was left out.
        notes: Sentences about conversions of pictures.
    """
    histories = torch.stack([member.history for member in trained]).float()
    # NaN of a failed member would hide the others.
    bins = [
        histories[:, part].nanmean(1) for part in np.array_split(np.arange(histories.shape[1]), _POINTS) if len(part)
    ]
    curve = torch.stack(bins, 1)
    ends = np.linspace(0, histories.shape[1], len(bins) + 1)[1:]
    again = any(member.rate < 1 for member in trained)
    rows = [
        {
            "member": member.name,
            "loss of the base": _finite(member.base_loss),
            "with the adapter": _finite(member.loss),
            "removed": _finite(member.gain),
            "error": _finite(member.noise),
            **({"learning rate times": member.rate} if again else {}),
            "state": "failed" if member.failed else "kept" if member.beats_base else "no better than the base",
        }
        for member in trained
    ]
    run.save(
        "training",
        {"quartiles": torch.nanquantile(curve, torch.tensor([0.25, 0.5, 0.75]), 0)},
        steps=ends.tolist(),
        gains=sorted(member.gain for member in trained if not member.failed),
        failed=[member.name for member in trained if member.failed],
        weak=[member.name for member in trained if not member.failed and not member.beats_base],
        again=[member.name for member in trained if member.rate < 1 and not member.failed],
        notes=list(notes),
    )
    run.keep_table(
        "members",
        rows,
        "Mean denoising loss of each member's pictures on pairs of timestep and noise that training did not see, the "
        "share of the base model's loss that the adapter removes, and the standard error of the difference of both "
        "losses. A member whose difference is below twice that is called no better than the base.",
    )
    _keep_skipped(run, skipped)


def save_drawn_members(
    run: Run,
    model: "DiffusionModel",
    layout: "Layout",
    members: "Sequence[Trained]",
    instances: "Sequence[Instance]",
    drawing: "Drawing",
) -> None:
    """Keeps what some members draw, beside their pictures and what the base model draws.

    Args:
        run: Run that the report is about.
        model: Base model of the members.
        layout: Table of the members' vectors.
        members: Members that are shown.
        instances: Subjects that they were trained on.
        drawing: Prompts or classes, seeds and steps.
    """
    from w2w_space.draw import draw

    drawn = draw(model, layout, [None, *(member.vector.float() for member in members)], drawing)
    columns = drawn.shape[1]
    rows, labels = [drawn[0]], ["the base model"]
    for member, instance, pictures in zip(members, instances, drawn[1:], strict=True):
        rows += [_decoded(model, instance, columns), pictures]
        labels += [f"{member.name}: pictures", f"{member.name}: drawn"]
    run.save(
        "drawn",
        {"pictures": torch.cat(rows)},
        labels=labels,
        columns=columns,
        heading="What members draw",
        caption=f"The first {len(members)} members: pictures that they were trained on, and what they draw from the "
        f"same noise as the base model in the first row. {_about(drawing)}",
    )


def save_inversion_parts(
    run: Run,
    names: Sequence[str],
    found: "Inversion",
    located: "Sequence[Located]",
    base_losses: Tensor,
    settings: "InversionSettings",
    *,
    free_losses: Tensor | None = None,
    refined_losses: Tensor | None = None,
    departures: Tensor | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Keeps losses, curves and places of what an inversion found for the report.

    Args:
        run: Run that the report is about.
        names: Names of the subjects.
        found: Points that were found, with their losses.
        located: Where each point lies.
        base_losses: Loss of the base model alone on the fixed pairs.
        settings: Settings of the search.
        free_losses: Loss of the free adapters on the same pairs; None without them.
        refined_losses: Loss of the refined adapters; None without them.
        departures: How far the refined adapters are outside the space, in standard deviations.
        skipped: Name and reason of each picture that was left out.
        notes: Sentences for people, such as that a subject lies outside.
    """
    losses = [
        {
            "subject": name,
            "base": float(base_losses[i]),
            "mean": float(found.start_losses[i]),
            "found": float(found.losses[i]),
            **({} if refined_losses is None else {"refined": float(refined_losses[i])}),
            **({} if free_losses is None else {"free": float(free_losses[i])}),
            "removed by the mean": float(1 - found.start_losses[i] / base_losses[i]),
            "removed": float(1 - found.losses[i] / base_losses[i]),
        }
        for i, name in enumerate(names)
    ]
    run.keep_table(
        "losses",
        losses,
        f"Mean denoising loss of the base model, the space's mean and the found adapters on {settings.num_pairs} fixed "
        "pairs of timestep and noise, and the share of the base model's loss that is removed. The pairs are those by "
        "which the best point was chosen; a free adapter removes much, as it learns the pictures by heart.",
    )
    places = [
        {
            "subject": name,
            "distance from the mean": where.length,
            "usual": _finite(where.usual),
            "percentile": _finite(where.percentile),
            "on a bound": where.at_bound,
            "found at step": int(found.steps[i]),
            **({} if departures is None else {"refined, outside": float(departures[i])}),
            "nearest members": ", ".join(f"{near} ({distance:.1f})" for near, distance in where.nearest),
        }
        for i, (name, where) in enumerate(zip(names, located, strict=True))
    ]
    run.keep_table(
        "places",
        places,
        "Distances in standard deviations along the components that moved; usual: median of the members, held out of "
        "the fit where that is known; percentile: share of these that are nearer to the mean.",
    )
    if located[0].places:
        rows = [
            {
                "subject": name,
                **{
                    attribute: f"{place.std:+.1f} sd{ranked(place.percentile)}"
                    for attribute, place in where.places.items()
                },
            }
            for name, where in zip(names, located, strict=True)
        ]
        run.keep_table("attributes", rows, "Place of each subject on the axis of each attribute.")
    words = [f"{name}: {where.words}." for name, where in zip(names, located, strict=True) if where.words]
    checks = found.history.shape[1]
    run.save(
        "search",
        {"history": found.history[:_LINES].float()},
        names=list(names)[:_LINES],
        steps=[min(place * settings.check_every, settings.steps) for place in range(checks)],
        count=len(names),
        words=words,
        notes=list(notes),
    )
    _keep_skipped(run, skipped)


def save_drawn_subjects(
    run: Run,
    model: "DiffusionModel",
    layout: "Layout",
    subjects: "Sequence[Instance]",
    adapters: "Mapping[str, Sequence[Tensor]]",
    mean: Tensor,
    drawing: "Drawing",
) -> None:
    """Keeps each subject's pictures beside what its adapters draw.

    Args:
        run: Run that the report is about.
        model: Base model of the space.
        layout: Table of the vectors.
        subjects: Subjects with their encoded pictures.
        adapters: Vectors of each kind of adapter, such as "found" and "free", one for each subject.
        mean: Vector of the space's mean.
        drawing: Prompts or classes, seeds and steps.
    """
    from w2w_space.draw import draw

    shown = list(subjects)[:SHOWN]
    vectors = [vectors[i] for i in range(len(shown)) for vectors in adapters.values()]
    mean_drawn, *drawn = draw(model, layout, [mean, *vectors], drawing)
    columns = mean_drawn.shape[0]
    rows, labels = [mean_drawn], ["mean of the space"]
    for i, subject in enumerate(shown):
        rows.append(_decoded(model, subject, columns))
        labels.append(f"{subject.name}: given")
        for place, kind in enumerate(adapters):
            rows.append(drawn[i * len(adapters) + place])
            labels.append(f"{subject.name}: {kind}")
    run.save(
        "drawn",
        {"pictures": torch.cat(rows)},
        labels=labels,
        columns=columns,
        heading="What the found adapters draw",
        caption="The pictures that were given, and what each adapter draws, all from the same noise. "
        + _about(drawing),
    )


def _decoded(model: "DiffusionModel", instance: "Instance", columns: int) -> Tensor:
    """Returns the first pictures of a subject as the model holds them, in white where there are fewer."""
    pictures = model.codec.decode(instance.x0[:columns].to(model.device)).float().cpu()
    room = torch.ones(columns, *pictures.shape[1:])
    room[: len(pictures)] = pictures
    return room


def _about(drawing: "Drawing") -> str:
    if drawing.prompts:
        told = "Prompts: " + "; ".join(f'"{prompt}"' for prompt in drawing.prompts)
        return f"{told}. Guidance {drawing.guidance_scale:g}, {drawing.steps} steps, seeds {_listed(drawing.seeds)}."
    if drawing.labels:
        return f"Classes {_listed(drawing.labels)}. {drawing.steps} steps, seeds {_listed(drawing.seeds)}."
    return f"{drawing.steps} steps, seeds {_listed(drawing.seeds)}."


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _keep_skipped(run: Run, skipped: Sequence[tuple[str, str]]) -> None:
    if skipped:
        rows = [{"file": name, "reason": reason} for name, reason in skipped]
        run.keep_table("skipped", rows, "Pictures and folders that were not used.")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def add_drawn(report: Report, run: Run) -> None:
    """Adds pictures of subjects beside what their adapters draw.

    Args:
        report: Report to add to.
        run: Run that holds the parts.
    """
    if not run.has("drawn"):
        return
    part = run.load("drawn")
    report.section(part.fields["heading"]).images(
        part.tensors["pictures"].clamp(0, 1),
        part.fields["caption"],
        columns=part.fields["columns"],
        row_labels=part.fields["labels"],
    )


def add_training(report: Report, run: Run) -> None:
    """Adds the losses of a population's members.

    Args:
        report: Report to add to.
        run: Run that holds the parts.
    """
    if not run.has("training"):
        return
    part = run.load("training")
    told, (low, middle, high) = part.fields, part.tensors["quartiles"].numpy()
    gains = np.asarray(told["gains"], dtype=float)
    numbers: dict[str, float | str] = {"members": f"{len(gains):,}", "failed": f"{len(told['failed']):,}"}
    if len(gains):
        numbers |= {"median share removed": f"{np.median(gains):.1%}", "least": f"{gains[0]:.1%}"}
    report.section("How well the members learned").numbers(numbers)
    if told["failed"]:
        report.points(f"Failed, and left out of the population: {', '.join(told['failed'])}.")
    if told["weak"]:
        report.points(
            f"No better than the base model: {', '.join(told['weak'])}. Such members are noise in a space; look at "
            "their pictures, or train longer."
        )
    if told["again"]:
        report.points(f"Trained again at half the learning rate, after they diverged: {', '.join(told['again'])}.")
    line = Series("median", told["steps"], middle, low, high)
    figure = lines_with_band([line], x_label="step", y_label="training loss")
    report.plot("training-loss", figure, "Training loss, median and quartiles over the members, mean over short spans.")
    if len(gains) > 1:
        figure = lines_with_band(
            [Series("members", np.arange(1, len(gains) + 1), gains)],
            x_label="member, least first",
            y_label="share of the base model's loss removed",
        )
        report.plot("gains", figure, f"Share of the base model's loss that each of {len(gains)} adapters removes.")
    report.kept_table("members", "Every member")
    if told["notes"]:
        report.section("Notes on pictures").points(*told["notes"][:50])
    report.section("What may not be concluded").points(*_TRAINING_LIMITS)


def add_inversion(report: Report, run: Run) -> None:
    """Adds what an inversion found.

    Args:
        report: Report to add to.
        run: Run that holds the parts.
    """
    if not run.has("search"):
        return
    part = run.load("search")
    told, history = part.fields, part.tensors["history"].numpy()
    if told["words"] or told["notes"]:
        report.section("In words").points(*told["words"], *told["notes"])
    report.kept_table("attributes", "Attributes")
    report.kept_table("losses", "How much is explained")
    steps = np.asarray(told["steps"], dtype=float)
    lines = [
        Series(name, steps[np.isfinite(row)], row[np.isfinite(row)])
        for name, row in zip(told["names"], history, strict=True)
    ]
    figure = lines_with_band(lines, x_label="step", y_label="loss on the fixed pairs")
    more = f" The first {len(lines)} of {told['count']} subjects." if told["count"] > len(lines) else ""
    report.plot("search", figure, f"Loss on the fixed pairs during the search, from the mean on.{more}")
    report.kept_table("places", "Where the subjects lie")
    report.section("What may not be concluded").points(*_INVERSION_LIMITS)
