"""The report of a run, made from whatever its folder holds; it can be made again at any time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from w2w_space.app import report_training
from w2w_space.app.figures import members_map, scree, signed_matrix, turned_signs
from w2w_space.app.report_evaluate import EVALUATION
from w2w_space.app.report_portraits import PORTRAITS
from w2w_space.coordinates import Space, about
from w2w_space.directions import Directions

TITLES = {
    "directions": "Which way is each attribute?",
    "build": "What do these adapters have in common?",
    "evaluate": "What is this space worth?",
    "demo": "A space of adapters: sampled, edited, and checked against known styles",
    **report_training.TITLES,
}
_ANCHORED, _MEANINGLESS = 0.02, 0.2  # shares of turned signs
_PERCENTILES = (1, 5, 50, 95, 99)
_OF_MATRIX = {
    "leaks": "The table above as colours: a column with more than its own cell marked moves along with others.",
    "cosines": "The table above as colours: directions of one colour move the same members.",
}
_LIMITS = (
    "The share of variance that components explain says how alike the members are, and not how well the space holds a "
    "new subject: much of an adapter is noise of its training, which no space should hold.",
    "Directions and samples mean what the members have in common. What few of them show is lost.",
)


def save_space_parts(
    run: Run,
    space: Space,
    *,
    variances: Tensor | None = None,
    limits: Tensor | None = None,
) -> None:
    """Keeps spectrum and alignment of a space for the report.

    Args:
        run: Run that the report is about.
        space: Space that the run made.
        variances: Variances of all components that the members span; by default those that the space keeps.
        limits: Largest variances of permuted numbers, at each place; None where chance was not looked at.
    """
    variances = space.variances if variances is None else variances
    shares = (variances / space.fit.total_variance).tolist()
    chance = None if limits is None else (limits / space.fit.total_variance).tolist()[: len(shares)]
    run.save("spectrum", {"variances": variances}, shares=shares, chance=chance, about=about(space))
    rows = [
        {"component": place + 1, "variance": float(variances[place]), "share": share, "sum": float(total)}
        for place, (share, total) in enumerate(zip(shares, np.cumsum(shares), strict=True))
    ]
    if chance is not None:
        rows = [row | {"share of chance": limit} for row, limit in zip(rows, chance, strict=True)]
    run.table("spectrum", rows)
    if space.fit.alignment:
        rows = [
            {"module": one.module, "signs turned": one.flipped, "undecided": one.ties, "zero": one.zero}
            for one in space.fit.alignment
        ]
        run.keep_table("alignment", rows, alignment_in_words(space))


def save_map_parts(run: Run, space: Space, pictures: Mapping[str, Tensor] | None = None) -> None:
    """Keeps where the members lie along the two leading components, with their pictures where there are some.

    Args:
        run: Run that the report is about.
        space: Space with its members; of one without, or of one component, nothing is kept.
        pictures: Picture in [0, 1] of each member that has one, by its name.
    """
    if not space.names or space.num_components < 2:
        return
    shares = (space.variances[:2] / space.fit.total_variance).tolist()
    tensors = {f"picture.{space.names.index(name)}": picture for name, picture in (pictures or {}).items()}
    run.save("map", {"places": space.members[:, :2].contiguous(), **tensors}, names=list(space.names), shares=shares)


def save_directions_parts(run: Run, found: Directions, space: Space, leaks: Tensor) -> None:
    """Keeps figures of merit, leaks, cosines and percentiles of directions for the report.

    Args:
        run: Run that the report is about.
        found: Directions of a space.
        space: Space that they belong to.
        leaks: Change of each score along each direction, in members that the directions were not found from.
    """
    rows = [
        {
            "attribute": row.name,
            "held out": row.auc,
            "above": row.counts[0],
            "not above": row.counts[1],
            "1 sd": row.std,
            "largest member, sd": row.largest / row.std,
        }
        for row in found.rows
    ]
    notes = " ".join(f"{note[:1].upper()}{note[1:]}." for note in found.notes)
    run.keep_table(
        "directions",
        rows,
        "Held out: area under the ROC curve of members that were left out of the fit (correlation for continuous "
        f"labels). {notes}".strip(),
    )
    names = [row.name for row in found.rows]
    for word, matrix, caption in (
        (
            "leaks",
            leaks,
            "Change of each score (column) along each direction (row); 1 is its own direction's. Directions are from "
            "one half of the members and scores from the other, mean over random halves.",
        ),
        ("cosines", found.cosines(), "Cosine of each pair of directions, in standard deviations."),
    ):
        rows = [
            {"along": name, **dict(zip(names, map(float, row), strict=True))}
            for name, row in zip(names, matrix, strict=True)
        ]
        run.keep_table(word, rows, caption)
    run.save("matrices", {"leaks": leaks, "cosines": found.cosines()}, names=names)
    run.keep_table(
        "percentiles",
        percentiles_of(found, space),
        "Places of the members on each axis, in standard deviations. A place beyond the first and last column is one "
        "that hardly any of what the space was made of has.",
    )


def percentiles_of(found: Directions, space: Space) -> list[dict[str, Any]]:
    """Returns where members lie along each direction, as percentiles in standard deviations.

    Args:
        found: Directions of a space.
        space: Space that they belong to, with its members.
    """
    shares = torch.tensor([share / 100 for share in _PERCENTILES], dtype=torch.float64)
    return [
        {
            "attribute": row.name,
            **dict(zip(map(_ordinal, _PERCENTILES), row.place(space.members).quantile(shares).tolist(), strict=True)),
        }
        for row in found.rows
    ]


def _ordinal(number: int) -> str:
    return f"{number}{'st' if number == 1 else 'th'}"


def alignment_in_words(space: Space) -> str:
    """Returns what the gauge found, in a sentence.

    Args:
        space: Space in the canonical gauge.
    """
    if space.layout.rank > 1:
        return "The factors of rank above 1 were turned by orthogonal matrices onto their common reference."
    turned = float(np.median([one.flipped for one in space.fit.alignment]))
    if turned <= _ANCHORED:
        return "Hardly a sign had to be turned: the members were trained from one initial A."
    found = f"In the median module {turned:.0%} of the signs were turned"
    if turned >= _MEANINGLESS:
        return f"{found}: the members have initial factors of their own, and components of raw factors mean nothing."
    return f"{found}: most members, and not all, share their initial A."


def answer_of(space: Space, spanned: int) -> str:
    """Returns the result of building a space, in a sentence.

    Args:
        space: Space that was built.
        spanned: Number of components that its members span, kept or not.
    """
    told = about(space)
    members = f"{told['members']:,} adapters" if told["members"] else "The adapters"
    kept = told["components"]
    words = f"all {kept:,} components" if kept >= spanned else f"{kept:,} of {spanned:,} components"
    return (
        f"{members} with {told['numbers']:,} numbers each: {words} are kept, which hold {told['explained']:.0%} of the "
        f"variance, spread as over {told['participation_ratio']:.1f} equal ones."
    )


def write_page(run: Run) -> Path:
    """Writes `report.html` and its figures from the parts of a run, whichever there are.

    Args:
        run: Run that the report is about.
    """
    verb = str(run.record["command"]).split()[-1]
    report = Report(TITLES.get(verb, "w2w-space"), run)
    if run.finished:
        report.answer(str(run.result.get("answer", "")))
    for add in SECTIONS:
        add(report, run)
    return report.save()


def _add_gauge(report: Report, run: Run) -> None:
    if not run.has("gauge"):
        return
    part = run.load("gauge").fields
    series = [Series(label, part["components"], errors) for label, errors in part["errors"].items()]
    report.section("What the gauge is for")
    figure = lines_with_band(series, x_label="components", y_label=part["y_label"], log_x=True)
    report.plot("gauge", figure, part["caption"])
    report.kept_table("gauge", "In numbers")


def _add_samples(report: Report, run: Run) -> None:
    if not run.has("samples"):
        return
    part = run.load("samples")
    pictures = part.tensors["pictures"]
    report.section("New adapters").images(
        pictures.flatten(0, 1).clamp(0, 1),
        part.fields["caption"],
        columns=pictures.shape[1],
        row_labels=part.fields["labels"],
    )


def _add_inversion(report: Report, run: Run) -> None:
    if not run.has("inversion"):
        return
    part = run.load("inversion")
    report.section("One picture becomes an adapter").images(
        part.tensors["pictures"].clamp(0, 1),
        part.fields["caption"],
        columns=part.fields["columns"],
        row_labels=part.fields["labels"],
    )


def _add_sliders(report: Report, run: Run) -> None:
    if not run.has("sliders"):
        return
    part = run.load("sliders")
    names, strengths = part.fields["names"], part.fields["strengths"]
    report.section("Sliders").images(
        part.tensors["pictures"].clamp(0, 1),
        part.fields["caption"],
        columns=len(strengths),
        row_labels=names,
        column_labels=[f"{strength:+g} sd" if strength else "0" for strength in strengths],
    )
    for name in names:
        curves = part.fields["curves"][name]
        series = [Series(other, strengths, values) for other, values in zip(names, curves, strict=True)]
        figure = lines_with_band(series, x_label=f"strength of {name}, sd", y_label="style that the oracle reads")
        report.plot(f"slider-{name}", figure, f"Style numbers of the pictures along the direction of {name}.")
    report.kept_table("sliders", "Effects and leaks")


def _add_spectrum(report: Report, run: Run) -> None:
    if not run.has("spectrum"):
        return
    part = run.load("spectrum").fields
    shares = np.asarray(part["shares"])
    x = np.arange(1, len(shares) + 1)
    told = part["about"]
    report.section("The space").numbers(
        {
            "members": f"{told['members']:,}",
            "components": f"{told['components']:,}",
            "share of the variance": round(told["explained"], 3),
            "participation ratio": round(told["participation_ratio"], 1),
        }
    )
    chance = part.get("chance")
    beside = (
        " Below the grey edge are variances that numbers have which were permuted among the members: what reaches them "
        "is chance."
        if chance
        else ""
    )
    report.plot(
        "spectrum",
        scree(shares, kept=told["components"], chance=chance),
        f"Variance of the coefficients of {told['members'] or 'the'} members along each component. Components before "
        f"a bend are what the members have in common; a flat tail is noise.{beside}",
    )
    report.plot(
        "cumulative",
        lines_with_band([Series("sum", x, np.cumsum(shares))], x_label="components", y_label="share of the variance"),
        "Variance that the first components hold together, of the members themselves.",
    )
    if told["scale_ratio"] > 1e4:
        report.points(
            f"The largest standard deviation of a number is {told['scale_ratio']:.1g} times the smallest: dividing by "
            "them blows up numbers that hold noise alone; compare with another scaling."
        )
    if told["constant_numbers"]:
        report.points(f"{told['constant_numbers']:,} numbers are the same in all members and were left as they are.")


def _add_map(report: Report, run: Run) -> None:
    if not run.has("map"):
        return
    part = run.load("map")
    names = part.fields["names"]
    pictures = [part.tensors.get(f"picture.{place}") for place in range(len(names))]
    count = sum(picture is not None for picture in pictures)
    shown = f", {count} of them with pictures" if count else ""
    report.section("Where the members lie").plot(
        "map",
        members_map(part.tensors["places"].numpy(), names, part.fields["shares"], pictures if count else ()),
        f"{len(names)} members along the two leading components{shown}. Neighbours are alike in what differs most "
        "among all; members far from the others may be outliers.",
    )


def _add_directions(report: Report, run: Run) -> None:
    report.kept_table("directions", "How far each direction can be trusted")
    matrices = run.load("matrices") if run.has("matrices") else None
    for name, heading, labels in (
        ("leaks", "What else moves", {"x_label": "score", "y_label": "moved along"}),
        ("cosines", "Directions that point the same way", {"x_label": "", "y_label": ""}),
    ):
        report.kept_table(name, heading)
        if matrices is not None:
            matrix = signed_matrix(matrices.fields["names"], matrices.tensors[name].numpy(), **labels)
            report.plot(name, matrix, _OF_MATRIX[name])
    report.kept_table("percentiles", "Where members lie on each axis")


def _add_alignment(report: Report, run: Run) -> None:
    if not run.has("table-alignment"):
        return
    report.kept_table("alignment", "How the factors were aligned")
    rows: Sequence[dict[str, Any]] = run.load("table-alignment").fields["rows"]
    turned = [row["signs turned"] for row in rows]
    if not any(turned):
        return
    report.plot(
        "alignment",
        turned_signs(turned),
        "Share of the members whose sign was turned, module by module: near 0 where all share an initial A, near .5 "
        "where each has one of its own.",
    )


def _add_files(report: Report, run: Run) -> None:
    report.kept_table("skipped", "Files that were left out")


def _add_limits(report: Report, run: Run) -> None:
    if run.has("spectrum"):
        report.section("What may not be concluded").points(*_LIMITS)


SECTIONS: tuple[Callable[[Report, Run], None], ...] = (
    report_training.add_drawn,
    report_training.add_training,
    report_training.add_inversion,
    *EVALUATION,
    _add_sliders,
    _add_inversion,
    _add_samples,
    _add_gauge,
    *PORTRAITS,
    _add_spectrum,
    _add_map,
    _add_directions,
    _add_alignment,
    _add_files,
    _add_limits,
)
"""Parts of the page in their order; each adds nothing where the run does not hold what it shows."""
