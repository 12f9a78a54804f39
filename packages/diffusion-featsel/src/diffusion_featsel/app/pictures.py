"""Pictures of activations: principal components as colors, and matched points between two images."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from diffcore.report.style import DPI, FAINT, INK, PALETTE

_TILE = 0.72  # inches
_WIDE = 10


def principal_colors(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Returns the first three principal components of maps, over all images together, as colors in [0, 1].

    Each component is stretched between its 2nd and 98th percentile.

    Args:
        maps: Maps of one activation.

    Example:
        >>> tuple(principal_colors(torch.randn(2, 16, 8, 8)).shape)
        (2, 3, 8, 8)
    """
    rows = maps.detach().float().cpu().transpose(0, 1).flatten(1).T
    rows = rows - rows.mean(0)
    _, _, directions = torch.linalg.svd(rows.T @ rows)
    values = rows @ directions[: min(3, rows.shape[1])].T
    # The sign of a component means nothing: its largest loading is made positive, so that pictures repeat.
    largest = directions[: values.shape[1]].abs().argmax(1)
    values = values * torch.sign(directions[torch.arange(values.shape[1]), largest])
    values = torch.nn.functional.pad(values, (0, 3 - values.shape[1]))
    low, high = values.quantile(0.02, 0), values.quantile(0.98, 0)
    shown = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return shown.T.unflatten(1, (len(maps), *maps.shape[2:])).transpose(0, 1).contiguous()


def component_sheet(
    image: Float[Tensor, "3 height width"], colors: Mapping[str, Float[Tensor, "3 _ _"]], grey: Sequence[str] = ()
) -> Figure:
    """Draws one image beside the principal components of its activations, in the order of execution.

    Args:
        image: The image in [0, 1].
        colors: Colors of each activation's map, by the name that is written above it.
        grey: Names that are written in grey, as those of dropped activations.
    """
    columns = min(_WIDE, len(colors) + 1)
    rows = -(-(len(colors) + 1) // columns)
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        scale = 1.8 if len(colors) < 5 else 1.0  # a few tiles may be larger
        side = scale * _TILE
        figure = Figure(figsize=(columns * (side + 0.28), rows * (side + 0.3)), dpi=DPI, facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False)
        for place in axes.flat:
            place.set_axis_off()
        for place, (name, picture) in zip(axes.flat, [("image", image), *colors.items()], strict=False):
            place.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="equal")
            place.set_title(name, fontsize=4.6 * scale**0.7, color=FAINT if name in grey else INK, pad=2)
        figure.subplots_adjust(
            left=0.01, right=0.99, bottom=0.01, top=1 - 0.16 * scale / (rows * (side + 0.3)), hspace=0.34
        )
        figure.draw_without_rendering()
    return figure


def match_strips(strips: Sequence[Mapping[str, Tensor]]) -> Figure:
    """Draws pairs of images side by side, with lines from points in the first to where they were found in the second.

    Args:
        strips: For each pair the images `source` and `target` in [0, 1], positions (x, y) in pixels of both as `points`
            and `found`, and where it is known whether each position is right as `correct`: wrong ones are dashed.
    """
    columns = 1 if len(strips) == 1 else 2
    rows = -(-len(strips) // columns)
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(5.4, 2.6 * rows / columns + 0.1), dpi=DPI, facecolor="white")
        axes = figure.subplots(rows, 2 * columns, squeeze=False)
        for place in axes.flat:
            place.set_axis_off()
        for index, strip in enumerate(strips):
            row, column = divmod(index, columns)
            _draw_pair(figure, axes[row][2 * column], axes[row][2 * column + 1], strip)
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99, wspace=0.06, hspace=0.06)
        figure.draw_without_rendering()
    return figure


def _draw_pair(figure: Figure, left: Axes, right: Axes, strip: Mapping[str, Tensor]) -> None:
    for axes, image in ((left, strip["source"]), (right, strip["target"])):
        axes.imshow(image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    correct = strip.get("correct")
    for index, (start, end) in enumerate(zip(strip["points"].tolist(), strip["found"].tolist(), strict=True)):
        good = correct is None or bool(correct[index])
        color = PALETTE[index % len(PALETTE)] if correct is None else PALETTE[0 if good else 1]
        line = ConnectionPatch(start, end, "data", "data", axesA=left, axesB=right, color=color, linewidth=0.9)
        line.set_linestyle("-" if good else (0, (3, 2)))
        figure.add_artist(line)
        for axes, (x, y) in ((left, start), (right, end)):
            axes.plot(x, y, "o", markersize=3, color=color, markeredgecolor="white", markeredgewidth=0.4)
