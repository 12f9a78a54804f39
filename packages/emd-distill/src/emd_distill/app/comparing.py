"""Training one generator by several losses, and measuring all alike: what compare does."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from diffcore.errors import MachineError
from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from emd_distill.app.training import Training, keep_reference, looks_of, train_generator
from emd_distill.distill import Settings
from emd_distill.quality import Scores, losing_modes

_LOG = logging.getLogger("diffcore.emd_distill")
_SHOWN = 10


def compare_losses(training: Training, arms: Mapping[str, Settings], run: Run) -> dict[str, Any]:
    """Trains by each loss in turn, and returns what was measured at equal iterations and at equal seconds.

    A loss that diverges is named and left out; finished ones are not trained again.

    Args:
        training: Teacher, conditions and options.
        arms: Settings of each training by the name of its loss.
        run: Run folder that keeps all of them.
    """
    keep_reference(training, run)
    failed = dict[str, str]()
    for name, told in arms.items():
        if run.has(f"arm-{name}"):
            continue
        folder = run.folder / "arms" / name
        try:
            result = train_generator(training, told, run, folder=folder, prefix=f"{name}-", facts={"loss": name})
        except MachineError as error:
            failed[name] = str(error)
            _LOG.warning("%s is left out: %s", name, error)
            continue
        run.save(f"arm-{name}", {}, name=name, **result)
    done = [name for name in arms if name not in failed]
    if not done:
        raise MachineError(f"no loss could be trained; the first: {next(iter(failed.values()))}")
    curves = {name: [look.fields for look in looks_of(run, f"{name}-")] for name in done}
    rows = tables(curves)
    for place, caption in (
        ("equal iterations", "after the same number of iterations"),
        ("equal seconds", "at their last look within the seconds that the fastest loss took for all iterations"),
    ):
        run.keep_table(place.replace(" ", "-"), rows[place], f"Averaged generators, {caption}.")
    run.save("curves", {}, curves=curves)
    warnings = {
        name: warning
        for name, looks in curves.items()
        if (warning := losing_modes([(one["step"], Scores(**one["scores"])) for one in looks]))
    }
    best = min(rows["equal iterations"], key=lambda row: row["distance"])
    recalls = ", ".join(f"{row['loss']} {row['recall']:.2f}" for row in rows["equal iterations"])
    return {
        "answer": f"At equal iterations {best['loss']} comes nearest to the teacher's samples (Fréchet distance "
        f"{best['distance']:.3g}); their recall, the share of them that is covered: {recalls}.",
        "at_equal_iterations": {row["loss"]: row for row in rows["equal iterations"]},
        "at_equal_seconds": {row["loss"]: row for row in rows["equal seconds"]},
        "warnings": warnings,
        "failed": failed,
    }


def tables(curves: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Returns a row of scores for each loss, at equal iterations and at equal seconds.

    Args:
        curves: Looks of each loss in order, each with step, seconds and scores.

    Example:
        >>> look = lambda step, seconds: {"step": step, "seconds": seconds, "scores": {"recall": step / 10}}
        >>> found = tables({"slow": [look(0, 0.0), look(1, 3.0), look(2, 6.0)], "fast": [look(0, 0.0), look(2, 4.0)]})
        >>> [row["iterations"] for row in found["equal seconds"]]
        [1, 2]
    """
    seconds = min(looks[-1]["seconds"] for looks in curves.values())
    found: dict[str, list[dict[str, Any]]] = {"equal iterations": [], "equal seconds": []}
    for name, looks in curves.items():
        within = [look for look in looks if look["seconds"] <= seconds]
        for place, look in (("equal iterations", looks[-1]), ("equal seconds", within[-1])):
            scores = {measure: round(value, 4) for measure, value in look["scores"].items()}
            told = {"loss": name, "iterations": look["step"], "seconds": round(look["seconds"], 2)}
            found[place].append({**told, **scores})
    return found


def add_comparison(report: Report, run: Run) -> None:
    """Adds tables, curves and samples of a comparison, where the run holds one.

    Args:
        report: Page that is added to.
        run: Run folder of a comparison.
    """
    if not run.has("curves"):
        return
    report.kept_table("equal-iterations", "At equal iterations")
    report.kept_table("equal-seconds", "At equal seconds on this machine")
    for name, warning in run.result.get("warnings", {}).items() if run.finished else ():
        report.text(f"Warning, {name}: {warning}. A generator that collapses looks better and better.")
    for name, why in run.result.get("failed", {}).items() if run.finished else ():
        report.text(f"{name} was left out: {why}.")
    curves: dict[str, list[dict[str, Any]]] = run.load("curves").fields["curves"]
    report.section("While they train")
    for measure, label in (("distance", "Fréchet distance"), ("recall", "recall"), ("precision", "precision")):
        for against, axis in (("step", "iteration"), ("seconds", "seconds of training on this machine")):
            series = [
                Series(name, [look[against] for look in looks], [look["scores"][measure] for look in looks])
                for name, looks in curves.items()
            ]
            figure = lines_with_band(series, x_label=axis, y_label=label, log_y=measure == "distance")
            report.plot(f"{measure}-{against}", figure, f"Against the teacher's samples: {label} by {axis}.")
    last = [looks_of(run, f"{name}-")[-1].tensors["pictures"][:_SHOWN] for name in curves]
    report.section("Samples").images(
        torch.cat(last),
        "The last generator of each loss, from the same latents and conditions in each row.",
        columns=len(last[0]),
        row_labels=list(curves),
    )
