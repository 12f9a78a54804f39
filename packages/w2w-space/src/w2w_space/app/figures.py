"""The figures of the reports: the spectrum beside chance, a map of the members, matrices of directions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import ArrayLike
from torch import Tensor

from diffcore.report.style import DASHES, FAINT, INK, color, drawing

_SIGNED = "PuOr"  # diverging, and told apart by colour-blind readers
_WRITTEN = 12  # columns up to which a matrix has its numbers written
_NAMED, _PICTURED = 25, 28  # members of a map that can be told apart
_THUMBNAIL = 26  # points, the side of a picture on the map


def scree(shares: ArrayLike, *, kept: int, chance: ArrayLike | None = None) -> Figure:
    """Draws the share of the variance of each component, and what permuted numbers reach at each place.

    Args:
        shares: Share of the variance of each component, the largest first.
        kept: Number of leading components that the space keeps.
        chance: Largest share that permuted numbers have at each place; None where they were not permuted.
    """
    shares = np.asarray(shares, dtype=float)
    x = np.arange(1, len(shares) + 1)
    with drawing() as (figure, axes):
        mark = "o" if len(shares) <= 60 else None
        axes.plot(x, shares, color=color(0), marker=mark, markersize=3, label="members")
        if chance is not None:
            limits = np.asarray(chance, dtype=float)[: len(shares)]
            axes.fill_between(x, 0, limits, color=color(2), alpha=0.16, linewidth=0, label="chance")
            axes.plot(x, limits, color=color(2), linewidth=1)
        if kept < len(shares):
            axes.axvline(kept + 0.5, color=INK, linewidth=1, linestyle=DASHES[1], label=f"{kept} are kept")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("component")
        axes.set_ylabel("share of the variance")
        if chance is not None or kept < len(shares):
            figure.legend(loc="outside upper left", ncols=3)
    return figure


def members_map(
    places: ArrayLike, names: Sequence[str], shares: Sequence[float], pictures: Sequence[Tensor | None] = ()
) -> Figure:
    """Draws the members in the plane of the two leading components, as pictures where there are some, else as points.

    Few members are all named; of many, those that lie farthest out.

    Args:
        places: Coordinates of the members in standard deviations, a row of two for each.
        names: Name of each member.
        shares: Share of the variance of the two components.
        pictures: Picture in [0, 1] of each member, 1 or 3 channels; None for members without.
    """
    z = np.asarray(places, dtype=float)
    with drawing(5.4, 5.0) as (figure, axes):
        axes.scatter(z[:, 0], z[:, 1], s=14, color=color(0), alpha=0.75, linewidths=0)
        pictured = [place for place, picture in enumerate(pictures) if picture is not None]
        for place in _spread(z, pictured, _PICTURED):
            picture = pictures[place]
            assert picture is not None
            pixels = picture.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()
            zoom = _THUMBNAIL / max(pixels.shape[:2])
            image = OffsetImage(pixels, zoom=zoom, interpolation="nearest" if zoom > 1 else "antialiased")
            axes.add_artist(AnnotationBbox(image, tuple(z[place]), frameon=False, pad=0))
        if not pictured:
            order = np.argsort(-np.hypot(z[:, 0], z[:, 1]))
            for place in order if len(z) <= _NAMED else _spread(z, order[: 2 * _NAMED].tolist(), _NAMED // 2):
                name = names[place] if len(names[place]) <= 18 else names[place][:17] + "…"
                axes.annotate(name, tuple(z[place]), xytext=(4, 3), textcoords="offset points", fontsize=7, color=FAINT)
        axes.axhline(0, color=FAINT, linewidth=0.6)
        axes.axvline(0, color=FAINT, linewidth=0.6)
        axes.margins(0.1)
        for number, label in enumerate((axes.set_xlabel, axes.set_ylabel)):
            label(f"component {number + 1} ({shares[number]:.1%} of the variance), sd")
    return figure


def _spread(z: np.ndarray, places: Sequence[int], count: int) -> list[int]:
    """Returns so many of the places, each the farthest from those before it, so that few cover one another."""
    if not len(places):
        return []
    chosen, left = [places[0]], np.asarray(places)
    gaps = np.hypot(*(z[left] - z[places[0]]).T)
    while len(chosen) < min(count, len(left)):
        chosen.append(int(left[gaps.argmax()]))
        gaps = np.minimum(gaps, np.hypot(*(z[left] - z[chosen[-1]]).T))
    return chosen


def turned_signs(shares: Sequence[float]) -> Figure:
    """Draws the share of signs that the gauge turned, a point for each module, on the scale from none to half.

    Args:
        shares: Share of each module, between 0 and a half.
    """
    with drawing(height=2.4) as (figure, axes):
        axes.plot(range(1, len(shares) + 1), shares, linestyle="", marker="o", markersize=4, color=color(0))
        axes.set_ylim(-0.02, 0.52)
        axes.grid(axis="y")
        axes.set_xlabel("module, in the order of the table")
        axes.set_ylabel("share of signs turned")
    return figure


def signed_matrix(names: Sequence[str], matrix: ArrayLike, *, x_label: str, y_label: str) -> Figure:
    """Draws a square matrix of numbers about -1 to 1, one colour for each sign; numbers beyond have the last colour.

    Args:
        names: Name of each row, and of the column of the same place.
        matrix: Numbers, row by row.
        x_label: Meaning of the columns.
        y_label: Meaning of the rows.
    """
    values = np.asarray(matrix, dtype=float)
    side = min(max(0.42 * len(names), 1.6), 7.5)
    with drawing(max(side + 2.2, 3.6), side + 1.6) as (figure, axes):
        picture = axes.imshow(values, cmap=_SIGNED, vmin=-1, vmax=1, interpolation="nearest")
        if len(names) <= _WRITTEN:
            for (row, column), value in np.ndenumerate(values):
                shade = "white" if abs(value) > 0.6 else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
        axes.set_xticks(range(len(names)), list(names), rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), list(names))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.colorbar(picture, ax=axes, shrink=0.8, aspect=24)
    return figure
