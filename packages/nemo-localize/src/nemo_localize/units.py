"""Fixed units of work: the same captions always share batches, on any number of processes and after any interruption.

What is in a batch changes the low bits of every row in it. So a unit is a fixed slice of the distinct captions, never
what happens to be left, and a unit that was interrupted is computed again as a whole.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffcore.io.jsonfile import jsonable
from diffcore.run import Run

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Rows = list[dict[str, Any]]


def prompt_hash(prompt: str) -> str:
    """Returns what names a caption in files."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def in_units(
    prompts: Sequence[str],
    work: Callable[[list[str]], Rows],
    *,
    unit_size: int,
    run: Run | None = None,
    name: str = "captions",
    fabric: "Fabric | None" = None,
) -> Rows:
    """Returns one row of results per caption, in order; captions given twice are computed once.

    Args:
        prompts: Captions.
        work: Computes a unit: one row per caption, of plain values.
        unit_size: Captions per unit; part of what identifies a run.
        run: Where finished units are kept, and read from when the run is resumed.
        name: Of this kind of work in the run.
        fabric: Launched; its processes share the units. They need a run to meet in.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; pass a list of them")
    rank, processes = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    if processes > 1 and run is None:
        raise ValueError(f"{processes} processes share the work, but there is no run to keep its parts in; pass one")
    distinct = list(dict.fromkeys(prompts))
    units = {}
    for start in range(0, len(distinct), unit_size):
        unit = distinct[start : start + unit_size]
        units[f"{name}-{start // unit_size:05d}-{prompt_hash(' '.join(map(prompt_hash, unit)))}"] = unit
    done: dict[str, Rows] = {}
    if fabric is not None:
        fabric.barrier()  # the first process opens the run, and deletes what it takes for interrupted writes
    todo = set(run.missing(units)) if run else set(units)
    for key in list(units)[rank::processes]:
        if key in todo:
            rows = jsonable(work(units[key]))
            if run:
                run.save(key, {}, rows=rows)
            done[key] = rows
    if fabric is not None:
        fabric.barrier()
    for key in units:
        if run and key not in done:
            done[key] = run.load(key).fields["rows"]
    by_prompt = {prompt: row for key, unit in units.items() for prompt, row in zip(unit, done[key], strict=True)}
    return [by_prompt[prompt] for prompt in prompts]
