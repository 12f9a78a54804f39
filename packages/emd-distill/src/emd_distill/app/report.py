"""The report of a run, made from whatever its folder holds; it can be made again at any time."""

from collections.abc import Callable
from pathlib import Path

from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from emd_distill.app import checking, correcting
from emd_distill.app.comparing import add_comparison
from emd_distill.app.report_training import add_training

TITLES = {
    "demo": "Digits in one step: Diff-Instruct and EM Distillation from the same teacher",
    "compare": "Losses on the same teacher and draws",
    "evaluate": "A one-step generator against its teacher",
    "sample": "Images of a one-step generator",
    "train": "A one-step generator from a many-step teacher",
    "doctor": "Before training: what the teacher and its settings are worth",
    "correct": "Samples of a generator, corrected by a chain",
}
_LIMITS = (
    "Precision and accuracy rise while modes are lost: they say that what is drawn is good, not that all is drawn. "
    "Recall falls when modes are lost, and is what to watch.",
    "A single seed's recall moves by about .03.",
)


def write_page(run: Run) -> Path:
    """Writes `report.html` and its figures from the parts of a run, whichever there are.

    Args:
        run: Run that the report is about.
    """
    verb = str(run.record["command"]).split()[-1]
    report = Report(TITLES.get(verb, "emd-distill"), run)
    if run.finished:
        report.answer(str(run.result.get("answer", "")))
    for add in SECTIONS:
        add(report, run)
    return report.save()


def _add_grids(report: Report, run: Run) -> None:
    if not run.has("grids"):
        return
    part = run.load("grids")
    pictures = part.tensors["pictures"]
    report.section("Side by side").images(
        pictures.flatten(0, 1),
        part.fields["caption"],
        columns=pictures.shape[1],
        row_labels=part.fields["labels"],
    )


def _add_quality(report: Report, run: Run) -> None:
    if run.has("correction"):
        return
    report.kept_table("quality", "How near to the real digits")
    report.kept_table("scores", "How near the images are")


def _add_curves(report: Report, run: Run) -> None:
    arms = [run.load(name).fields for name in ("arm-0", "arm-1", "arm-2") if run.has(name)]
    if not arms:
        return
    report.section("While it trains")
    if run.finished and "bought" in run.result:
        report.text(str(run.result["bought"]))
    for measure, label, caption in (
        ("distance", "Fréchet distance", "Fréchet distance to the real digits; lower is better."),
        ("recall", "recall", "Share of the real digits that lie near a generated one; it falls when modes are lost."),
    ):
        series = [Series(arm["name"], arm["seconds"], [one[measure] for one in arm["quality"]]) for arm in arms]
        figure = lines_with_band(series, x_label="seconds of training on this machine", y_label=label)
        report.plot(f"curve-{measure}", figure, caption)
    series = [Series(arm["name"], arm["drift_steps"], arm["drift"]) for arm in arms]
    figure = lines_with_band(series, x_label="iteration", y_label="size of the drift")
    report.plot(
        "curve-drift",
        figure,
        "Root mean square of the difference of the two noise predictions, averaged over fifty iterations. It is how "
        "far the generator's samples are from the teacher's; the loss itself does not tell.",
    )


def _add_limits(report: Report, run: Run) -> None:
    if run.has("arm-0"):
        report.section("What may not be concluded").points(*_LIMITS)


SECTIONS: tuple[Callable[[Report, Run], None], ...] = (
    _add_grids,
    _add_quality,
    _add_curves,
    _add_limits,
    add_training,
    add_comparison,
    correcting.add_sections,
    checking.add_sections,
)
"""Parts of the page in their order; each adds nothing where the run does not hold what it shows."""
