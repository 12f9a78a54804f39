"""The part of the demo's report about persons that a text-to-image model draws."""

from collections.abc import Callable

from diffcore.report import Report
from diffcore.run import Run

_SHEETS = (
    ("portraits-injection", "Edits that keep the picture's layout"),
    ("portraits-inversion", "One portrait becomes an adapter"),
    ("portraits-samples", "New persons"),
)


def add_portraits(report: Report, run: Run) -> None:
    """Adds sliders, delayed injection, inversion, samples and gates of the portraits, where a run holds them.

    Args:
        report: Report of the demo.
        run: Run of the demo.
    """
    if not run.has("portraits-sliders"):
        return
    part = run.load("portraits-sliders")
    strengths = part.fields["strengths"]
    report.section("Persons: sliders").images(
        part.tensors["pictures"].clamp(0, 1),
        part.fields["caption"],
        columns=len(strengths),
        row_labels=part.fields["names"],
        column_labels=[f"{strength:+g} sd" if strength else "0" for strength in strengths],
    )
    report.kept_table("portraits-sliders", "Persons: effect, leak and identity")
    for name, heading in _SHEETS:
        if not run.has(name):
            continue
        part = run.load(name)
        report.section(heading).images(
            part.tensors["pictures"].clamp(0, 1),
            part.fields["caption"],
            columns=part.fields["columns"],
            row_labels=part.fields["labels"],
        )
    report.kept_table("portraits-gates", "Persons: gates")


PORTRAITS: tuple[Callable[[Report, Run], None], ...] = (add_portraits,)
"""Parts of the page in their order."""
