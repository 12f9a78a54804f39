"""Naming the rows of a site table: each tensor that has a name of the paper becomes an `Activation`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from diffcore.hooks import Site, SiteRow, SiteTable
from diffcore.hooks.layout import grid_of
from diffusion_featsel.activation import Activation
from diffusion_featsel.backbones import BACKBONES, TEXT_KINDS, Place
from diffusion_featsel.fused import PARTS

_SKIP = re.compile(r"down_blocks\.\d+:output\[1\]\[\d+\]")
_UP_CROSS_SIDES = range(32, 65)


def named_rows(backbone: nn.Module, table: SiteTable, size: tuple[int, int]) -> list[Activation]:
    """Returns the activations of a backbone in the order of execution; other names of the same tensors come last.

    Args:
        backbone: A backbone of a class in `BACKBONES`.
        table: Every tensor inside the backbone.
        size: Height and width of x_t in the forward pass of the table.
    """
    known = BACKBONES[type(backbone).__name__]
    lengths = {name: len(child) for name, child in backbone.named_children() if isinstance(child, nn.ModuleList)}
    fired = [row for row in table if row.calls]
    names = {row.name for row in fired}
    num_text = max((row.num_text for row in fired), default=0)
    found: list[Activation] = []
    owners: dict[str, Activation] = {}
    skips: list[SiteRow] = []
    for row in (part for whole in fired for part in _parts(backbone, whole)):
        if _SKIP.fullmatch(row.name):
            skips.append(row)
        places = known.places(row.site, lengths)
        if row.site.at == "output" and f"{row.site.module}:output[1]" not in names:
            # The last block of SD3 returns no text, which leaves its image as the first tensor.
            places += known.places(Site(row.site.module, "output[1]", f"{row.site.module}:output[1]"), lengths)
        for place in places:
            if not place.derived:
                found.append(_tensor(place, row, size))
                owners.setdefault(row.same_as or row.name, found[-1])
            elif hasattr(backbone.get_submodule(place.site.module), "to_q"):
                found.append(_map(backbone, place, row, size, num_text))
    found += _up_cross(found)
    return found + list(_skips(skips, owners))


def _parts(backbone: nn.Module, row: SiteRow) -> list[SiteRow]:
    """Returns a row itself, or the rows of the projections that run as one under its name."""
    parent, _, last = row.site.module.rpartition(".")
    found: list[SiteRow] = []
    for part in PARTS.get(last, ()):
        name = f"{parent}.{part}"
        tokens, width = row.shape or (0, 0)
        if row.site.at == "output":
            width = int(cast(Any, backbone.get_submodule(name)).out_features)
        site = Site(name, row.site.at, row.site.name and row.site.name.replace(row.site.module, name))
        found.append(replace(row, site=site, shape=(tokens, width), channels=width))
    return found or [row]


def _tensor(place: Place, row: SiteRow, size: tuple[int, int]) -> Activation:
    """Returns the activation that a module is given, or returns."""
    grid, num_text, shape = row.grid, row.num_text, row.shape or ()
    if place.name.kind in TEXT_KINDS:
        grid = None
    elif grid is None and "tokens" in row.axes:
        # There are as many image places as text tokens, and the table took them for text.
        grid, num_text = grid_of(size, shape[row.axes.split().index("tokens")]), 0
    made = Activation(str(place.name), place.site, place.name.kind, place.name.stage, axes=row.axes, shape=shape)
    return _placed(made, place, row, channels=row.channels or 0, grid=grid, num_text=num_text)


def _map(backbone: nn.Module, place: Place, row: SiteRow, size: tuple[int, int], num_text: int) -> Activation:
    """Returns the attention map of a module: heads x queries x keys."""
    kind = place.name.kind
    grid = _tensor(place, row, size).grid or (0, 0)
    count = grid[0] * grid[1]
    queries, keys = {
        "self-map": (count, count),
        "cross-map": (count, num_text),
        "map": (count + num_text, count + num_text),
    }[kind]
    heads = int(cast(Any, backbone.get_submodule(place.site.module)).heads)
    site = Site(place.site.module, "output", f"{place.site.module}:map")
    made = Activation(
        str(place.name), site, kind, place.name.stage, axes="", shape=(heads, queries, keys), derived=True
    )
    return _placed(made, place, row, channels=count if kind == "self-map" else num_text, grid=grid)


def _placed(made: Activation, place: Place, row: SiteRow, **changes: Any) -> Activation:
    name = place.name
    numbers = {"level": name.level, "repeat": name.repeat, "block": name.block}
    return replace(made, **numbers, **changes, flops=row.flops, cost=row.cost, paper=place.paper)


def _up_cross(found: Sequence[Activation]) -> list[Activation]:
    """Returns the paper's attention feature: the mean maps of the up stage's cross-attention, one per resolution."""
    maps = [
        row
        for row in found
        if row.kind == "cross-map" and row.stage == "up" and row.grid and max(row.grid) in _UP_CROSS_SIDES
    ]
    if not maps:
        return []
    last = max(maps, key=lambda row: row.flops)
    grids = {row.grid for row in maps}
    channels = sum(next(row.channels for row in maps if row.grid == grid) for grid in grids)
    largest = max((row.grid for row in maps if row.grid), key=lambda grid: grid[0] * grid[1])
    return [
        replace(
            last,
            name="up-cross-map",
            kind="up-cross-map",
            site=Site(last.site.module, "output", "up-cross-map"),
            level=None,
            repeat=None,
            block=None,
            shape=(channels, *largest),
            axes="channels height width",
            channels=channels,
            grid=largest,
            paper=False,
            modules=tuple(row.site.module for row in maps),
        )
    ]


def _skips(rows: Sequence[SiteRow], owners: Mapping[str, Activation]) -> Iterator[Activation]:
    """Yields what the down stage pushes for the up stage: the first convolution's result, then these tensors."""
    if "conv_in" not in owners:
        return
    originals = [owners["conv_in"], *(owners[row.same_as] for row in rows if row.same_as and row.same_as in owners)]
    for number, original in enumerate(originals):
        yield replace(original, name=f"skip{number}", kind="skip", paper=False, same_as=original.name)
