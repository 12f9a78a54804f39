"""The report of a run, made from whatever its folder holds; it can be made again at any time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from w2w_space.app.report_evaluate import EVALUATION
from w2w_space.app.report_portraits import PORTRAITS
from w2w_space.directions import Directions
from w2w_space.space import WeightSpace, about

TITLES = {
    "directions": "Which way is each attribute?",
    "build": "What do these adapters have in common?",
    "evaluate": "What is this space worth?",
    "demo": "A space of adapters: sampled, edited, and checked against known styles",
}
_ANCHORED, _MEANINGLESS = 0.02, 0.2  # shares of turned signs
_LIMITS = (
    "The share of variance that components explain says how alike the members are, and not how well the space holds a "
    "new subject: much of an adapter is noise of its training, which no space should hold.",
    "Directions and samples mean what the members have in common. What few of them show is lost.",
)


def save_space_parts(run: Run, space: WeightSpace) -> None:
    """Keeps spectrum and alignment of a space for the report.

    Args:
        run: Run that the report is about.
        space: Space that the run made.
    """
    shares = (space.variances / space.fit.total_variance).numpy()
    summed = np.cumsum(shares)
    run.save("spectrum", {"variances": space.variances}, shares=shares.tolist(), about=about(space))
    run.table(
        "spectrum",
        [
            {"component": place + 1, "variance": float(space.variances[place]), "share": share, "sum": total}
            for place, (share, total) in enumerate(zip(shares.tolist(), summed.tolist(), strict=True))
        ],
    )
    if space.fit.alignment:
        rows = [
            {"module": one.module, "signs turned": one.flipped, "undecided": one.ties, "zero": one.zero}
            for one in space.fit.alignment
        ]
        run.keep_table("alignment", rows, alignment_in_words(space))


def save_directions_parts(run: Run, found: Directions) -> None:
    """Keeps figures of merit, leaks and cosines of directions for the report.

    Args:
        run: Run that the report is about.
        found: Directions of a space.
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
        ("leaks", found.leaks(), "Change of each score (column) along each direction (row); 1 is its own direction's."),
        ("cosines", found.cosines(), "Cosine of each pair of directions, in standard deviations."),
    ):
        rows = [
            {"along": name, **dict(zip(names, map(float, row), strict=True))}
            for name, row in zip(names, matrix, strict=True)
        ]
        run.keep_table(word, rows, caption)


def alignment_in_words(space: WeightSpace) -> str:
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


def answer_of(space: WeightSpace) -> str:
    """Returns the result of building a space, in a sentence.

    Args:
        space: Space that was built.
    """
    told = about(space)
    members = f"{told['members']:,} adapters" if told["members"] else "The adapters"
    return (
        f"{members} with {told['numbers']:,} numbers each span {told['components']:,} components, which hold "
        f"{told['explained']:.0%} of the variance; the variance is spread as over "
        f"{told['participation_ratio']:.1f} equal components."
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
    report.plot(
        "spectrum",
        lines_with_band([Series("share", x, shares)], x_label="component", y_label="share of the variance", log_y=True),
        f"Variance of the coefficients of {told['members']} members along each component. Components before a bend are "
        "what the members have in common; a flat tail is noise.",
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


def _add_tables(report: Report, run: Run) -> None:
    report.kept_table("directions", "How far each direction can be trusted")
    report.kept_table("leaks", "What else moves")
    report.kept_table("cosines", "Directions that point the same way")
    report.kept_table("alignment", "How the factors were aligned")
    report.kept_table("skipped", "Files that were left out")


def _add_limits(report: Report, run: Run) -> None:
    if run.has("spectrum"):
        report.section("What may not be concluded").points(*_LIMITS)


SECTIONS: tuple[Callable[[Report, Run], None], ...] = (
    *EVALUATION,
    _add_sliders,
    _add_inversion,
    _add_samples,
    _add_gauge,
    *PORTRAITS,
    _add_spectrum,
    _add_tables,
    _add_limits,
)
"""Parts of the page in their order; each adds nothing where the run does not hold what it shows."""
