"""The figures of the reports: a map of the network, scores against each other, curves over budgets."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diffcore.report.style import COLOR_MAP, FAINT, INK, RULE, color, drawing
from diffusion_featsel.activation import Activation

_KINDS = (
    *("in", "after-conv-in", "out"),
    *("res-in", "res-inner", "res-increment", "res-out"),
    *("norm-out", "self-q", "self-k", "self-v", "q", "k", "v", "self-out", "attn-out"),
    *("cross-q", "cross-out", "ffn-inner", "ffn-out", "vit-out", "downsampler-out", "upsampler-out"),
)
_CELL = 0.27  # inches


def network_map(
    activations: Sequence[Activation], values: Mapping[str, float], dropped: Mapping[str, str], *, label: str
) -> Figure:
    """Draws the network as a table: a row per module in the order of execution, a column per kind of activation.

    Args:
        activations: All activations that were looked at, in the order of execution.
        values: Value of each activation, by name; those without are left empty.
        dropped: Names that a filter drops; they are crossed out.
        label: Name of the values, below the colors.
    """
    modules = list(dict.fromkeys(module_of(activation) for activation in activations))
    found = dict.fromkeys(activation.kind for activation in activations)
    kinds = [*(kind for kind in _KINDS if kind in found), *(kind for kind in found if kind not in _KINDS)]
    known = [values[a.name] for a in activations if a.name in values]
    scale = Normalize(min(known, default=0), max(known, default=1))
    width, height = 2.0 + _CELL * len(kinds), 1.5 + _CELL * 0.8 * len(modules)
    with drawing(max(width, 4.5), height) as (figure, axes):
        grid = np.full((len(modules), len(kinds)), np.nan)
        for activation in activations:
            row, column = modules.index(module_of(activation)), kinds.index(activation.kind)
            if activation.name in values:
                grid[row, column] = values[activation.name]
            else:
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=RULE, edgecolor="none"))
            if activation.name in dropped:
                axes.plot([column - 0.3, column + 0.3], [row + 0.3, row - 0.3], color="white", linewidth=2.2)
                axes.plot([column - 0.3, column + 0.3], [row + 0.3, row - 0.3], color=INK, linewidth=1)
        picture = axes.imshow(grid, cmap=COLOR_MAP, norm=scale, aspect="auto", interpolation="nearest")
        stages = [activation_stage(name) for name in modules]
        for row in range(1, len(modules)):
            if stages[row] != stages[row - 1]:
                axes.axhline(row - 0.5, color=FAINT, linewidth=0.8)
        axes.set_yticks(range(len(modules)), modules)
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        bar = figure.colorbar(picture, ax=axes, orientation="horizontal", shrink=0.5, aspect=30, pad=0.01)
        bar.set_label(label)
    return figure


def module_of(activation: Activation) -> str:
    """Returns the part of the network that an activation belongs to, in short.

    Args:
        activation: An activation of the network.
    """
    name = activation.name
    short = name[: -len(activation.kind) - 1] if name.endswith("-" + activation.kind) else name
    return re.sub(r"level|repeat|block", "", short).replace("-", " ") or name


def activation_stage(module: str) -> str:
    """Returns the stage of the network in a name that `module_of` made.

    Args:
        module: Short name of a part of the network.
    """
    return " ".join(module.split()[:2])


def scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    marked: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draws points of several groups, with the names of a few.

    Args:
        points: Positions (x, y) of the points of each group, by its name.
        x_label: Meaning of the horizontal axis.
        y_label: Meaning of the vertical axis.
        marked: Positions of points that are named in the figure.
    """
    with drawing(5.4, 3.8) as (figure, axes):
        axes.grid(visible=True)
        for index, (name, (x, y)) in enumerate(points.items()):
            axes.scatter(x, y, s=22, color=color(index), alpha=0.8, linewidths=0, label=name)
        for name, (x, y) in (marked or {}).items():
            axes.annotate(name, (x, y), xytext=(5, -2), textcoords="offset points", fontsize=7, color=FAINT)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(points) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(points), 4))
    return figure
