"""What the page of a training shows: convergence by the drift, samples along the way, and whether modes are lost."""

import json
from pathlib import Path
from typing import Any

import torch

from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from emd_distill.app.training import looks_of, scored
from emd_distill.module import BINS
from emd_distill.quality import losing_modes

_COLUMNS = 10
_PER_LOOK = 10


def add_training(report: Report, run: Run) -> None:
    """Adds convergence, samples and scores of a training, where the run holds them.

    Args:
        report: Page that is added to.
        run: Run folder of a training.
    """
    if run.has("warm-up"):
        _add_warm_up(report, run.load("warm-up").fields["losses"])
    lines = log_lines(run.folder / "log.jsonl")
    if lines:
        _add_drift(report, run, lines)
    if run.has("look-00000000"):
        _add_samples(report, run)
        _add_scores(report, run)


def log_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a training's log; none where there is no log.

    Args:
        path: File that the training has written.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _add_warm_up(report: Report, losses: list[float]) -> None:
    figure = lines_with_band(
        [Series("loss", list(range(1, len(losses) + 1)), losses)], x_label="step", y_label="mean square", log_y=True
    )
    report.section("Warming up").plot(
        "warm-up",
        figure,
        "Mean square between the smaller generator and the teacher in one call, from the same latents, in steps before "
        "the first iteration. Samples need to be near the teacher's before a drift can say where to move them.",
    )


def _add_drift(report: Report, run: Run, lines: list[dict[str, Any]]) -> None:
    steps = [line["step"] + 1 for line in lines]
    edges = run.result["edges"] if run.finished else []
    series = []
    for place in range(BINS):
        values = [line.get(f"drift_{place + 1}") for line in lines]
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if known:
            series.append(Series(_bin(edges, place), [step for step, _ in known], [value for _, value in known]))
    report.section("Convergence")
    figure = lines_with_band(series, x_label="iteration", y_label="size of the drift", log_y=True)
    report.plot(
        "drift",
        figure,
        "Root mean square of the difference of the two noise predictions, for each fifth of the noise levels t, in the "
        "units of the teacher's schedule. It goes to 0 as the generator's samples come to be the teacher's. The losses "
        "do not tell this: that of the generator is a step length, that of the student score follows its data.",
    )
    norms = []
    for name, label in (("grad_norm_g", "generator"), ("grad_norm_phi", "student score")):
        known = [line for line in lines if line.get(name)]
        if known:
            norms.append(Series(label, [line["step"] + 1 for line in known], [line[name] for line in known]))
    if norms:
        report.plot(
            "gradients",
            lines_with_band(norms, x_label="iteration", y_label="norm of the gradient", log_y=True),
            "Norms of both networks' gradients before they are clipped. That of the generator falls with the drift "
            "where noise is cancelled; one that jumps wants a smaller step or a smaller learning rate.",
        )
    if run.finished and "learning_rate" in run.result:
        rates = run.result["learning_rate"], run.result["student_learning_rate"]
        report.text(f"Learning rates: {rates[0]:g} of the generator, {rates[1]:g} of the student score.")
    finite = min(line["finite"] for line in lines)
    if finite < 1:
        report.text(f"Not all chains stayed finite: in the worst stretch of the log {1 - finite:.2%} were left out.")


def _bin(edges: list[float], place: int) -> str:
    if not edges:
        return f"fifth {place + 1} of the noise levels"
    if place == 0:
        return f"t below {edges[0]:.3g}"
    if place == BINS - 1:
        return f"t above {edges[-1]:.3g}"
    return f"t {edges[place - 1]:.3g} to {edges[place]:.3g}"


def _add_samples(report: Report, run: Run) -> None:
    looks = looks_of(run)
    pictures = torch.cat([look.tensors["pictures"][:_PER_LOOK] for look in looks])
    labels = [f"iteration {look.fields['step']:,}" for look in looks]
    report.section("Samples along the way").images(
        pictures,
        "The averaged generator, in one step, from the same latents and conditions in each row.",
        columns=min(_COLUMNS, _PER_LOOK),
        row_labels=labels,
    )


def _add_scores(report: Report, run: Run) -> None:
    looks = scored(run)
    if not looks:
        return
    steps = [step for step, _ in looks]
    reference = run.load("reference").fields["features"]
    report.section("Against the teacher's samples")
    if warning := losing_modes(looks):
        report.text(
            f"Warning: {warning}. A generator that collapses looks better and better; take weights from before, a "
            "longer chain, wider noise levels, or smaller learning rates."
        )
    shares = [
        Series(name, steps, [getattr(one, name) for _, one in looks]) for name in ("precision", "recall", "coverage")
    ]
    report.plot(
        "shares",
        lines_with_band(shares, x_label="iteration", y_label="share"),
        f"In features of {reference}, with five neighbours. Precision: samples near one of the teacher's. Recall: "
        "samples of the teacher near one of the generator's; it falls when modes are lost. Coverage: samples of the "
        "teacher with one of the generator's among their neighbours. Of curves that coincide the last is seen.",
    )
    report.plot(
        "distance",
        lines_with_band(
            [Series("Fréchet distance", steps, [one.distance for _, one in looks])],
            x_label="iteration",
            y_label="Fréchet distance",
            log_y=True,
        ),
        f"Fréchet distance to the teacher's samples in features of {reference}.",
    )
    report.table(
        [{"iteration": step, **{name: round(v, 3) for name, v in one.to_json().items()}} for step, one in looks]
    )
