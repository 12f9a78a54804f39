"""The report of a comparison of two image sets: numbers with intervals, images of both sides, nearest neighbours."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.data.files import UnreadableFileError
from diffcore.data.images import resize
from diffcore.data.source import ImageSource
from diffcore.errors import printable
from diffcore.metrics.compare import ImageComparison, Measure, as_rows, nearest_real
from diffcore.metrics.prompt_fit import ScoredPrompts
from diffcore.report import Report, bar_with_interval
from diffcore.run import Run

_SIDE = 96  # pixels of an image in the report
_COLUMNS = 12
_NEIGHBOURS, _PAIRS = 4, 6
_SHARES = ("precision", "recall", "density", "coverage", "share of copies")
_RANDOM = (
    "Features of random weights see colour, texture and layout. They compare runs with one another; they are not "
    "comparable with published numbers."
)


def write_page(
    compared: ImageComparison,
    real: ImageSource | None,
    fake: ImageSource,
    run: Run,
    prompts: ScoredPrompts | None = None,
) -> Path:
    """Writes `report.html`, its figures, and the tables `metrics` and `images`.

    Args:
        compared: The metrics and the features they rest on.
        real: The real images, to show some; None where there are only statistics.
        fake: The generated images, to show some.
        run: The run folder that gets the report.
        prompts: Prompts of the generated images, if they were scored.
    """
    run.table("metrics", as_rows(compared.measures))
    report = Report("Generated images against real ones", run)
    report.answer(sentence(compared.measures))
    for name in dict.fromkeys(measure.features for measure in compared.measures):
        _add_features(report, run, name, [m for m in compared.measures if m.features == name])
    report.section("Images")
    sides = [("generated", fake, compared.fake.indices)]
    if real is not None and compared.real is not None:
        sides.append(("real", real, compared.real.indices))
    for name, source, indices in sides:
        pictures = _pictures(source, _spread(indices, 2 * _COLUMNS))
        report.images(pictures, f"{len(pictures)} {name} images at even distances in order of name.", columns=_COLUMNS)
    _add_neighbours(report, run, compared, real, fake, prompts)
    _add_left_out(report, compared)
    return report.save(run.folder / "report.html")


def sentence(measures: Sequence[Measure]) -> str:
    """Returns the report's answer: the first Fréchet distance, and the real-versus-real value to compare it with."""
    first = measures[0]
    floor = next((m for m in measures if m.features == first.features and m.metric.endswith("against real")), None)
    beside = f"; real against real {floor.value:.3g} at {floor.n:,} images" if floor else ""
    return f"Fréchet distance {first.value:.3g}{_interval(first)} in features of {first.features}{beside}."


def summary(compared: ImageComparison) -> dict[str, Any]:
    """Returns the content of `result.json`: counts, and each metric with its interval."""
    sides = {"real": compared.real, "fake": compared.fake}
    counts = {f"{side}_images": len(found.names) for side, found in sides.items() if found}
    skipped = {f"{side}_skipped": len(found.skipped) for side, found in sides.items() if found}
    return {**counts, **skipped, "metrics": as_rows(compared.measures)}


def _add_features(report: Report, run: Run, name: str, measures: Sequence[Measure]) -> None:
    report.section(f"In features of {name}")
    distances = [m for m in measures if m.metric.startswith("Fréchet")]
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())[:40]
    for kind, label, chosen in (
        ("distances", "Fréchet distance, lower is better", distances),
        ("shares", "share of images (density may exceed 1)", [m for m in measures if m.metric in _SHARES]),
    ):
        if not chosen:
            continue
        bars = bar_with_interval(
            [m.metric for m in chosen],
            [m.value for m in chosen],
            [m.low if math.isfinite(m.low) else m.value for m in chosen],
            [m.high if math.isfinite(m.high) else m.value for m in chosen],
            x_label=label,
        )
        counts = ", ".join(f"{m.metric} n = {m.n:,}" for m in chosen)
        report.figure(run.figure(f"{stem}-{kind}", bars), f"Whiskers are 95 % intervals; {counts}.")
    report.table([{"measure": m.metric, "value": m.value, "95 % interval": _range(m), "images": m.n} for m in measures])
    for sentence in remarks(measures):
        report.text(sentence)
    if name.startswith("random:"):
        report.text(_RANDOM)


def remarks(measures: Sequence[Measure]) -> list[str]:
    """Returns remarks on how to read the metrics in the features of one network."""
    by_name = {measure.metric: measure for measure in measures}
    told = []
    kernel, noise = by_name.get("kernel distance"), by_name.get("share that looks like noise")
    if kernel is not None and kernel.high < 0:
        told.append(
            f"The kernel distance is clearly below 0 ({kernel.value:.3g}, at most {kernel.high:.3g}): the generated "
            "images lie nearer to the real ones than real ones to each other. Images that were copied do."
        )
    if noise is not None and noise.value > 0:
        told.append(
            f"{noise.value:.0%} of the generated images look like noise. To features that find copies, noise is like "
            "any other noise; these images are counted as no copies."
        )
    return told


def _add_neighbours(
    report: Report,
    run: Run,
    compared: ImageComparison,
    real: ImageSource | None,
    fake: ImageSource,
    prompts: ScoredPrompts | None,
) -> None:
    """Shows the generated images nearest to a real one, and writes the table of all images."""
    rows: list[dict[str, Any]] = [{"file": name} for name in compared.fake.names]
    if real is not None and compared.real is not None:
        name = compared.measures[0].features
        distance, nearest = nearest_real(compared.real.features[name], compared.fake.features[name], _NEIGHBOURS)
        for row, apart, places in zip(rows, distance.tolist(), nearest.tolist(), strict=True):
            row |= {"nearest_real": compared.real.names[places[0]], "distance": apart}
        closest = distance.argsort(stable=True)[:_PAIRS].tolist()
        pictures = []
        for place in closest:
            pictures.append(_pictures(fake, [compared.fake.indices[place]]))
            pictures.append(_pictures(real, [compared.real.indices[i] for i in nearest[place].tolist()]))
        shown = nearest.shape[1]
        report.section("Nearest real images").images(
            torch.cat(pictures),
            f"The {len(closest)} generated images that lie nearest to a real one, each followed by its {shown} nearest "
            f"real images, in features of {name}. Copies of training images would show here.",
            columns=shown + 1,
            column_labels=["generated", "nearest", *[f"{place}." for place in range(2, shown + 1)]],
        )
    if compared.scored is not None and prompts is not None:
        scored = compared.scored
        for row, place, score in zip(rows, scored.places, scored.scores.tolist(), strict=True):
            if place >= 0:
                prompt = prompts.prompts.prompts[place]
                lost = scored.lost.get(prompt, "")
                row |= {"prompt": prompt, "line": prompts.prompts.lines[place], "clip_score": score}
                row |= {"truncated": bool(lost), "lost": lost}
        told = f"{scored.fit.num_truncated:,} of {scored.fit.n:,} images have a prompt that CLIP read in part only"
        report.text(f"CLIP score {scored.fit.value:.3g}; {told}; tables/images.csv says which.")
    run.table("images", rows)


def _add_left_out(report: Report, compared: ImageComparison) -> None:
    told = [("real", compared.real), ("generated", compared.fake)]
    rows = [
        {"side": side, "file": printable(name), "what": what}
        for side, found in told
        if found
        for name, what in (*((n, f"left out: {reason}") for n, reason in found.skipped), *found.notes)
    ]
    if rows:
        report.section("Files left out or changed").table(rows)


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Returns up to `count` indices at even distances."""
    count = min(count, len(indices))
    return [indices[place * len(indices) // count] for place in range(count)]


def _pictures(source: ImageSource, indices: Sequence[int]) -> Float[Tensor, "b 3 side side"]:
    """Returns the central squares of some images; a grey square for each that can no longer be read."""
    pictures = []
    for index in indices:
        try:
            pictures.append(resize(source.read(index), _SIDE).float() / 255)
        except UnreadableFileError:
            pictures.append(torch.full((3, _SIDE, _SIDE), 0.5))
    return torch.stack(pictures)


def _interval(measure: Measure) -> str:
    return f" (95 %: {_range(measure)})" if math.isfinite(measure.low) else ""


def _range(measure: Measure) -> str | None:
    return f"{measure.low:.3g} to {measure.high:.3g}" if math.isfinite(measure.low) else None
