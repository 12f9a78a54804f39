"""The parts of reports that judge a space: edits, samples, projections, and the number of members."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from diffcore.report import Report, Series, histogram, lines_with_band
from diffcore.run import Run
from w2w_space.evaluate import EditScores, SampleScores
from w2w_space.held_out import Kept
from w2w_space.scaling import Scale


def keep_edits(run: Run, found: EditScores, pictures: Tensor, names: Sequence[str]) -> None:
    """Keeps scores and pictures of edits for the report.

    Args:
        run: Run that the report is about.
        found: Scores of the edits.
        pictures: One picture of each subject, before and after each edit, by edit and subject.
        names: Name of each row of the pictures.
    """
    run.save(
        "edits",
        {"pictures": pictures.transpose(0, 1)},
        names=list(names),
        caption=f"Each subject before and after each edit, by {found.rows[0].strength:+g} standard deviations, from "
        "the same noise.",
    )
    rows = [
        {
            "edit": row.name,
            "score before": row.before,
            "after": row.after,
            "effect": row.effect,
            "largest leak": row.leak,
            "into": row.leaked,
            "identity": row.identity,
            "identity kept": found.kept(row),
            "change of pictures": row.difference,
            "of the background": row.background,
        }
        for row in found.rows
    ]
    levels = ""
    if found.same == found.same:
        levels = (
            " Identity: cosine of features before and after, from different noise; of one subject it is "
            f"{found.same:.2f}, of two {found.different:.2f}, and identity kept is 1 and 0 there."
        )
    run.keep_table(
        "edits",
        rows,
        "Scores are probabilities from the judge. Leak: mean absolute change of the attribute that changed most, apart "
        f"from the edited one.{levels} Changes of pictures are mean absolute differences of values from 0 to 1.",
    )


def keep_sample_scores(run: Run, found: SampleScores) -> None:
    """Keeps where samples lie for the report.

    Args:
        run: Run that the report is about.
        found: Distances and diversity of the samples.
    """
    run.save(
        "sample-scores",
        {
            "nearest": found.nearest,
            "members_nearest": found.members_nearest,
            "lengths": found.lengths,
            "reference_lengths": found.reference_lengths,
        },
        diversity=found.diversity,
        members_diversity=found.members_diversity,
    )


def keep_gains(run: Run, found: Kept) -> None:
    """Keeps how much of new adapters' gain their projections keep.

    Args:
        run: Run that the report is about.
        found: Losses of new adapters and of their projections.
    """
    run.save(
        "gains",
        {"gain_kept": found.gain_kept},
        components=list(found.components),
        factors=list(found.factors),
        of_mean=found.gain_of_mean,
        subjects=len(found.base),
        own=found.gain,
    )


def keep_sizes(run: Run, attributes: Sequence[str], rows: Sequence[Scale], identities: Mapping[int, float]) -> None:
    """Keeps what spaces of several numbers of members are worth.

    Args:
        run: Run that the report is about.
        attributes: Names of the labels.
        rows: Results of each size.
        identities: Likeness of inverted subjects by the number of members; empty where none were inverted.
    """
    tensors = {f"r2-{row.members}": row.r2 for row in rows} | {f"cosines-{row.members}": row.cosines for row in rows}
    run.save(
        "sizes",
        tensors,
        attributes=list(attributes),
        sizes=[row.members for row in rows],
        identities={str(size): value for size, value in identities.items()},
    )
    run.keep_table(
        "sizes",
        [
            {
                "members": row.members,
                "components": row.components,
                "R², mean": float(row.r2.mean()),
                **dict(zip(attributes, row.r2.mean(0).tolist(), strict=True)),
                "mean |cosine|": float(row.cosines.nanmean()),
            }
            for row in rows
        ],
        f"R² of the labels of held-out members, and mean absolute cosine of the directions, mean of {len(rows[0].r2)} "
        "random parts of each size.",
    )


def add_edits(report: Report, run: Run) -> None:
    """Adds the pictures and scores of edits, where a run holds them."""
    if not run.has("edits"):
        return
    part = run.load("edits")
    pictures, names = part.tensors["pictures"], part.fields["names"]
    report.section("What edits do").images(
        pictures.flatten(0, 1).clamp(0, 1), part.fields["caption"], columns=len(names), column_labels=names
    )
    report.kept_table("edits", "Effect, leak and identity")


def add_sample_scores(report: Report, run: Run) -> None:
    """Adds where samples lie among the members, where a run holds it."""
    if not run.has("sample-scores"):
        return
    part = run.load("sample-scores")
    report.section("Samples among the members")
    figure = histogram(
        {"samples": part.tensors["nearest"].numpy(), "members": part.tensors["members_nearest"].numpy()},
        x_label="distance to the nearest member, standard deviations",
    )
    report.plot(
        "nearest", figure, "Samples that are nearer to a member than nearly all members to one another are copies."
    )
    if part.fields["diversity"] is not None:  # where pictures were drawn
        report.points(
            f"Two samples' pictures from the same noise are {part.fields['diversity']:.3f} apart (1 - cosine of their "
            f"features), two members' {part.fields['members_diversity']:.3f}."
        )


def add_gains(report: Report, run: Run) -> None:
    """Adds the gain that projections keep, where a run holds it."""
    if not run.has("gains"):
        return
    part = run.load("gains")
    fields, kept = part.fields, part.tensors["gain_kept"]
    if fields["own"] <= 0:
        report.section("How much of a new subject the space holds").text(
            f"The adapters of {fields['subjects']} members that were left out do not denoise their own pictures better "
            "than the base model by more than chance, so that there is no gain that a projection could keep. Give the "
            "prompt of their training."
        )
        return
    series = [
        Series(f"lengthened {factor:g} times", fields["components"], kept[:, place])
        for place, factor in enumerate(fields["factors"])
    ]
    report.section("How much of a new subject the space holds")
    report.plot(
        "gain-kept",
        lines_with_band(series, x_label="components", y_label="share of the gain kept", log_x=True),
        f"Share of the denoising gain of {fields['subjects']} new adapters that is left after projection; the mean of "
        f"the population has {fields['of_mean']:.0%} of it. The adapters gain {fields['own']:.1%} of the base model's "
        "loss, on pictures that they drew themselves.",
    )


def add_sizes(report: Report, run: Run) -> None:
    """Adds what more members bring, where a run holds it."""
    if not run.has("sizes"):
        return
    part = run.load("sizes")
    sizes, names = part.fields["sizes"], part.fields["attributes"]
    report.section("What more members bring")
    mean = Series.over_seeds(
        "mean",
        sizes,
        [[float(v) for v in row] for row in zip(*(part.tensors[f"r2-{size}"].mean(1) for size in sizes), strict=True)],
        color=0,
    )
    each = [
        Series(
            name, sizes, [float(part.tensors[f"r2-{size}"].mean(0)[place]) for size in sizes], color=place + 1, dash=1
        )
        for place, name in enumerate(names[:5])
    ]
    report.plot(
        "members",
        lines_with_band([mean, *each], x_label="members", y_label="R² of held-out labels", log_x=True),
        "How well labels of held-out members are read from coordinates; band: least and greatest of the random parts.",
    )
    cosines = [
        [float(v) for v in row] for row in zip(*(part.tensors[f"cosines-{size}"] for size in sizes), strict=True)
    ]
    if any(value == value for row in cosines for value in row):
        figure = lines_with_band(
            [Series.over_seeds("all pairs", sizes, cosines)], x_label="members", y_label="mean |cosine|", log_x=True
        )
        report.plot(
            "cosines", figure, "Directions of different attributes come apart as members grow (paper, figure 9)."
        )
    if found := part.fields["identities"]:
        figure = lines_with_band(
            [Series("one picture", [int(size) for size in found], list(found.values()))],
            x_label="members",
            y_label="cosine of features",
            log_x=True,
        )
        report.plot(
            "identity",
            figure,
            "Held-out subjects found from one picture, beside what their own adapters draw (paper, figure 10).",
        )
    report.kept_table("sizes", "In numbers")


EVALUATION: tuple[Callable[[Report, Run], None], ...] = (add_edits, add_sizes, add_gains, add_sample_scores)
"""Parts of the page in their order; each adds nothing where the run does not hold what it shows."""
