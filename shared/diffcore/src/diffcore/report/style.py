"""The style of every figure: a palette that colour-blind readers can tell apart, a colour map, a resolution."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 150
COLOR_MAP = "cividis"
INK, FAINT, RULE = "#1f2430", "#667085", "#d9dde5"
# Okabe and Ito's palette without its yellow, which white paper swallows; ordered so that neighbours differ most.
PALETTE = ("#0b6bab", "#d1570a", "#5b6472", "#0a8f6c", "#b45c93", "#c98a00", "#4aa3d6")
DASHES: Sequence[Any] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4)))

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.edgecolor": "#98a1b0",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": "#98a1b0",
    "ytick.color": "#98a1b0",
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "image.cmap": COLOR_MAP,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def drawing(width: float = 5.4, height: float = 3.4) -> Iterator[tuple[Figure, Axes]]:
    """Yields an empty figure (inches) with one pair of axes, drawn in our style and never known to pyplot.

    A telephone shows it at about two thirds of its width; text in wider figures would be too small there.
    """
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        yield figure, figure.subplots()
        figure.draw_without_rendering()  # settles the layout while the settings still hold


def color(index: int) -> str:
    """Returns a colour of the palette, which repeats."""
    return PALETTE[index % len(PALETTE)]
