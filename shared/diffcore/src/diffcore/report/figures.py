"""The figures of reports: lines over seeds, bars with intervals, distributions, grids of images.

Each function returns a `matplotlib.figure.Figure`; nothing touches pyplot or its global state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike
from torch import Tensor

from diffcore.report.style import DASHES, DPI, FAINT, INK, PALETTE, RULE, color, drawing

_TILE_PIXELS = 96  # tiny images are enlarged to about this side
_GAP_PIXELS = 6
_FEW = 30  # samples below it are drawn one by one
_POINTS = 65  # that fit a figure's width side by side
_LEGEND_INCHES = 0.5  # of two rows, for which there is room
_LEGEND_LETTERS = 60  # of a name in a legend, to begin with where it is too wide


@dataclass(frozen=True)
class Series:
    """One line with its band.

    Attributes:
        label: Name in the legend.
        x: Horizontal position of each point.
        middle: Height of the line at each position.
        low: Lower edge of the band.
        high: Upper edge of the band.
        color: Index in the palette; by default the line's place in the figure. Lines of one method share it.
        dash: Index of the dash pattern, 0 is solid. Lines of one step count share it. Where the palette repeats, lines
            have the next one.
    """

    label: str
    x: ArrayLike
    middle: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    color: int | None = None
    dash: int = 0

    @classmethod
    def over_seeds(
        cls, label: str, x: ArrayLike, values: ArrayLike, *, color: int | None = None, dash: int = 0
    ) -> "Series":
        """Returns the mean over seeds with a band from the least to the greatest; `values` has a row per seed."""
        rows = np.asarray(values, dtype=float)
        return cls(label, x, rows.mean(0), rows.min(0), rows.max(0), color, dash)


def lines_with_band(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Draws lines, each with its band; points are marked where there are few."""
    with drawing() as (figure, axes):
        for place, line in enumerate(series):
            shade = color(place if line.color is None else line.color)
            again = place // len(PALETTE) if line.color is None else 0  # where the palette repeats, dashes tell apart
            x = np.asarray(line.x, dtype=float)
            if line.low is not None and line.high is not None:
                low, high = np.asarray(line.low, dtype=float), np.asarray(line.high, dtype=float)
                axes.fill_between(x, low, high, color=shade, alpha=0.14, linewidth=0)
            axes.plot(
                x,
                np.asarray(line.middle, dtype=float),
                color=shade,
                linestyle=DASHES[(line.dash + again) % len(DASHES)],
                marker="o" if len(x) <= 12 else None,
                markersize=3.6,
                label=line.label,
            )
        _scale(axes, "x", log_x, [v for line in series for v in np.atleast_1d(np.asarray(line.x, dtype=float))])
        _scale(axes, "y", log_y, None)
        axes.grid(axis="y")
        _label(axes, x_label, y_label, title)
        _legend(figure, [line.label for line in series])
    return figure


def bar_with_interval(
    labels: Sequence[str],
    values: Sequence[float],
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    *,
    x_label: str,
    title: str = "",
    reference: float | None = None,
    reference_label: str = "",
    colors: Sequence[int] | None = None,
) -> Figure:
    """Draws one horizontal bar per label, its value beside it, and its interval as a whisker.

    Args:
        labels: Names of the bars, from top to bottom.
        values: Length of each bar.
        low: Lower ends of the intervals.
        high: Upper ends of the intervals.
        x_label: Name of the values, with their unit.
        title: Text above the figure.
        reference: A value to compare with, drawn as a line.
        reference_label: Text beside that line.
        colors: Palette index of each bar.
    """
    shades = [color(i) for i in (colors if colors is not None else [0] * len(labels))]
    with drawing(height=0.95 + 0.42 * max(len(labels), 2)) as (figure, axes):
        rows = np.arange(len(labels))
        axes.barh(rows, values, height=0.58, color=shades)
        ends = np.asarray(values, dtype=float)
        if low is not None and high is not None:
            ends = np.maximum(ends, np.asarray(high, dtype=float))
            for row, lower, upper in zip(rows, low, high, strict=True):
                axes.plot([lower, upper], [row, row], color=INK, linewidth=1.1, solid_capstyle="butt")
                axes.plot([lower, upper], [row, row], color=INK, linewidth=0, marker="|", markersize=6)
        for row, end, value in zip(rows, ends, values, strict=True):
            axes.annotate(
                f"{value:.3g}", (max(end, 0), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
            )
        if reference is not None:
            axes.axvline(reference, color=FAINT, linewidth=1, linestyle=DASHES[1])
            axes.annotate(
                reference_label,
                (reference, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, 3),
                textcoords="offset points",
                color=FAINT,
                fontsize=8,
                annotation_clip=False,
            )
        axes.set_yticks(rows, list(labels))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines["left"].set_color(RULE)
        axes.grid(axis="x")
        _label(axes, x_label, "", title)
    return figure


def histogram(
    distributions: Mapping[str, ArrayLike],
    *,
    x_label: str,
    title: str = "",
    bins: int = 60,
    threshold: float | None = None,
    threshold_label: str = "",
) -> Figure:
    """Draws distributions over the same bins, as densities, with an optional threshold.

    A distribution of few samples is drawn as points, one for each, stacked where they would cover one another.

    Args:
        distributions: Samples by name; each that is not drawn as points integrates to one.
        x_label: Name of the samples, with their unit.
        title: Text above the figure.
        bins: Number of bins over the range of all samples.
        threshold: A value drawn as a line.
        threshold_label: Name of that line in the legend.
    """
    samples = {name: np.asarray(values, dtype=float).ravel() for name, values in distributions.items()}
    few = [name for name, values in samples.items() if len(values) < _FEW]
    everything = np.concatenate(list(samples.values()))
    ends = everything if threshold is None else np.append(everything, threshold)
    with drawing(height=1.2 + 0.5 * len(few) if len(few) == len(samples) else 3.2) as (figure, axes):
        edges = np.histogram_bin_edges(everything, bins=bins)
        for place, (name, values) in enumerate(samples.items()):
            if name in few:
                _points(axes, values, ends, color(place), name, base=0.08 + few.index(name) / max(len(few), 1))
                continue
            density, _ = np.histogram(values, bins=edges, density=True)
            axes.stairs(density, edges, fill=True, color=color(place), alpha=0.16)
            axes.stairs(density, edges, color=color(place), linewidth=1.5, label=name)
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=1, linestyle=DASHES[1], label=threshold_label or None)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.01 if len(few) < len(samples) else 0.06)
        axes.set_ylim(bottom=0)
        _label(axes, x_label, "", title)
        _legend(figure, [*samples, *([threshold_label] if threshold_label else [])])
    return figure


def _points(axes: Axes, values: np.ndarray, ends: np.ndarray, shade: str, label: str, *, base: float) -> None:
    """Draws samples as points above `base`, which is a share of the height."""
    width = max(float(np.ptp(ends)) if len(ends) else 0.0, 1e-12) / _POINTS
    columns = np.round(values / width).astype(int)
    stacked = [int((columns[:index] == column).sum()) for index, column in enumerate(columns)]
    heights = base + 0.07 * np.asarray(stacked, dtype=float)
    across = axes.get_xaxis_transform()
    axes.plot(
        values,
        heights,
        linestyle="",
        marker="o",
        markersize=5.5,
        markeredgewidth=0,
        color=shade,
        alpha=0.8,
        transform=across,
        label=label,
    )


def image_grid(
    images: Float[Tensor, "b c h w"],
    *,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Figure:
    """Draws images, row after row, each pixel a whole number of pixels: small images are enlarged without blurring.

    Args:
        images: Images in [0, 1] with 1 or 3 channels; values outside are clamped, non-finite ones shown black.
        columns: Images per row; by default as many as there are column labels, or about as many as rows.
        row_labels: One label per row, at its left.
        column_labels: One label per column, above it.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels; a grid shows 1 or 3")
    per_row = columns or len(column_labels) or max(round(len(images) ** 0.5), 1)
    canvas, tile = _mosaic(images, per_row)
    left = 14 + 11 * max((len(label) for label in row_labels), default=0) if row_labels else 0
    top = 30 if column_labels else 0
    height, width = canvas.shape[:2]
    figure = Figure(figsize=((width + left) / DPI, (height + top) / DPI), dpi=DPI, facecolor="white")
    figure.figimage(canvas, xo=left, yo=0, origin="upper")
    step_y, step_x = tile[0] + _GAP_PIXELS, tile[1] + _GAP_PIXELS
    text = {"color": INK, "fontsize": 8, "family": "DejaVu Sans"}
    for row, label in enumerate(row_labels):
        y = height - row * step_y - tile[0] / 2
        figure.text((left - 12) / (width + left), y / (height + top), label, ha="right", va="center", **text)
    for column, label in enumerate(column_labels):
        x = left + column * step_x + tile[1] / 2
        figure.text(x / (width + left), (height + 9) / (height + top), label, ha="center", va="bottom", **text)
    return figure


def _mosaic(images: Tensor, columns: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the images as one white sheet of bytes, and the height and width of a tile on it."""
    scale = max(1, round(_TILE_PIXELS / max(images.shape[-2:])))
    values = images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1).mul(255).round()
    pixels = values.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width = pixels.shape[:3]
    rows = -(-count // columns)
    step_y, step_x = height + _GAP_PIXELS, width + _GAP_PIXELS
    sheet = np.full((max(rows * step_y - _GAP_PIXELS, 1), columns * step_x - _GAP_PIXELS, 3), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        y, x = divmod(index, columns)
        sheet[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = image
    return sheet, (height, width)


def _scale(axes: Axes, which: Literal["x", "y"], log: bool, ticks: Sequence[float] | None) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    distinct = sorted(set(ticks or ()))
    if 1 < len(distinct) <= 8:
        axis.set_ticks(distinct)


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """Puts the legend above the plot, in as many columns as fit the width; a name that alone is wider is wrapped."""
    if len(labels) < 2:
        return
    options: dict[str, Any] = {"loc": "outside upper left", "handlelength": 3.0, "columnspacing": 1.6}
    rows, legend = 1, figure.legend(ncols=len(labels), **options)
    while rows < len(labels) and legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        rows += 1
        legend = figure.legend(ncols=-(-len(labels) // rows), **options)
    texts = legend.get_texts()
    names = [text.get_text() for text in texts]
    for letters in range(_LEGEND_LETTERS, 10, -5):
        if legend.get_window_extent().width <= figure.bbox.width:
            break
        for text, name in zip(texts, names, strict=True):
            text.set_text(fill(name, letters))
    # The plot keeps its size below a high legend.
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + max(0.0, legend.get_window_extent().height / figure.dpi - _LEGEND_INCHES))


def _label(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title)
