"""The demo: adapters with a few things in common, written with factors of their own, in both gauges.

Each adapter is B A per module, where B and A are affine functions of six latent numbers (specification, section 3.2),
and is then written with random factors B G^-1 and G A: the same changes, other vectors. Spaces of raw vectors and of
vectors in the canonical gauge are fitted to most of them, and the others are projected.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.run import Run
from diffcore.runtime import Runtime
from w2w_space.app.report import save_space_parts, write_page
from w2w_space.gauge import GaugeKind
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.products import relative_distance
from w2w_space.space import WeightSpace

_LATENTS, _NOISE, _HELD_OUT = 6, 0.02, 40
_COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 20)
_GAUGES: tuple[GaugeKind, ...] = ("raw", "canonical")


@dataclass(frozen=True)
class _Size:
    members: int
    modules: int
    rank: int


_SHORT, _FULL = _Size(200, 3, 1), _Size(600, 12, 2)


def run_demo(out: Path, *, full: bool = False) -> dict[str, Any]:
    """Fits both spaces and projects what they have not seen; returns the result, which `result.json` repeats.

    Args:
        out: Run folder; a finished demo is only read.
        full: Take more adapters and modules, and rank 2.
    """
    Runtime(device="cpu").apply_threads()
    with Run.open(out, command="w2w-space demo", config={"full": full, "seed": 0}, inputs={}) as run:
        if run.finished:
            return run.result
        result = _compared(run, _FULL if full else _SHORT)
        run.finish(result)
        write_page(run)
        return result


def planted(layout: Layout, members: int, *, seed: int = 0) -> Tensor:
    """Returns vectors of adapters whose factors are affine functions of latent numbers, each in a gauge of its own.

    Args:
        layout: Table of the vectors.
        members: Number of adapters that are drawn.
        seed: Seed of all random numbers.
    """
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(members, _LATENTS, generator=g)
    center, slopes = torch.randn(layout.size, generator=g), torch.randn(_LATENTS, layout.size, generator=g)
    vectors = center + 0.3 * latents @ slopes + _NOISE * torch.randn(members, layout.size, generator=g)
    for module, span in enumerate(layout.spans):
        down, up = layout.split(vectors[:, span], module)
        # Far from singular, of either orientation.
        turn = torch.linalg.qr(torch.randn(members, layout.rank, layout.rank, generator=g)).Q
        turn = turn * (1 + torch.rand(members, 1, 1, generator=g)) * torch.randn(members, 1, 1, generator=g).sign()
        parts = [(turn @ down).flatten(1), (up @ torch.linalg.inv(turn)).flatten(1)]
        vectors[:, span] = torch.cat(parts, 1)
    return vectors


def _compared(run: Run, size: _Size) -> dict[str, Any]:
    layout = Layout.of({f"block.{i}.attn.to_q": (64, 48) for i in range(size.modules)}, rank=size.rank)
    vectors = planted(layout, size.members + _HELD_OUT)
    names = tuple(f"adapter {place}" for place in range(size.members))
    population = Population(layout, names, Stacked(vectors[: size.members]))
    new = vectors[size.members :]
    spaces = {gauge: WeightSpace.build(population, gauge=gauge) for gauge in _GAUGES}
    errors = {gauge: [_error(space.truncated(m), new) for m in _COMPONENTS] for gauge, space in spaces.items()}
    run.save(
        "gauge",
        {},
        components=list(_COMPONENTS),
        errors={f"{gauge} factors": values for gauge, values in errors.items()},
        caption=f"{size.members} adapters of rank {size.rank} with {size.modules} modules, made from {_LATENTS} latent "
        f"numbers and written with random factors; mean over {_HELD_OUT} adapters that were not in the fit.",
    )
    rows = [
        {"components": m, **{gauge: round(errors[gauge][place], 3) for gauge in _GAUGES}}
        for place, m in enumerate(_COMPONENTS)
    ]
    run.keep_table("gauge", rows, "Error of the projected change, relative to the change.")
    save_space_parts(run, spaces["canonical"])
    place = _COMPONENTS.index(_LATENTS)
    raw, canonical = errors["raw"][place], errors["canonical"][place]
    return {
        "answer": f"With {_LATENTS} components, the canonical gauge gives new adapters back to within {canonical:.0%}; "
        f"without it, {raw:.0%} of each is lost.",
        "components": _LATENTS,
        "error_canonical": canonical,
        "error_raw": raw,
        "held": canonical < 0.2 < 0.5 < raw,
    }


def _error(space: WeightSpace, vectors: Tensor) -> float:
    back = space.vectors(space.coordinates(vectors))
    apart = [relative_distance(space.layout, one, other) for one, other in zip(vectors, back, strict=True)]
    return sum(apart) / len(apart)
