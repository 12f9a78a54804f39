"""One assignment over two ranks on this machine: processor time and memory of each rank, beside one process's.

Both hold half of the images and assign them together, joined by gloo; then each assigns all of them by itself, in turn,
so that both are measured on a machine that is as busy. A rank's processor time counts what it computes, the noise of
all images included, and not its wait for the other. Memory is what torch holds at most above the images. Writes
`immiscible-ranks.json` and `.md` in benchmarks/results.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
import torch.distributed as dist
from cyclopts import App

from diffcore.bench import peak_megabytes
from diffcore.io.jsonfile import write_json, write_text
from diffcore.testing.distributed import run_forked
from immiscible_noise import assign_across_ranks, assign_noise
from immiscible_noise.app.bench import synthetic_images

RESULTS = Path(__file__).resolve().parent / "results"
GOAL = 1.2


def run(repeats: int = 9, smoke: bool = False) -> int:
    """Measures pools of images and of latents, and returns 1 where a goal was missed.

    Args:
        repeats: Number of times that both are measured, in turn.
        smoke: Tiny sizes, agreement of results only; writes nothing.
    """
    sizes = [(16, (3, 8, 8))] if smoke else [(1024, (3, 32, 32)), (1024, (4, 64, 64)), (2048, (3, 32, 32))]
    rows = [measured(count, shape, 1 if smoke else repeats) for count, shape in sizes]
    if smoke:
        return 0
    report(rows, repeats)
    return int(any(row["ratio"] > GOAL or row["megabytes"] > row["limit_megabytes"] for row in rows))


def measured(count: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Returns what two ranks and one process take for the same pool.

    Args:
        count: Number of images on both ranks together.
        shape: Shape of an image.
        repeats: Number of times that both are measured, in turn.
    """
    images = synthetic_images(count, shape)

    def work(rank: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        share = images[: count // 2] if rank == 0 else images[count // 2 :]

        def together() -> torch.Tensor:
            return assign_across_ranks(share, seed=0, step=0)

        def by_itself() -> torch.Tensor:
            return assign_noise(images, torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))

        noise = together()
        spent: dict[str, list[tuple[float, float]]] = {"together": [], "alone": []}
        for _ in range(repeats):
            dist.barrier()
            spent["together"].append(seconds(together))
            dist.barrier()
            spent["alone"].append(seconds(by_itself))
        dist.barrier()
        # The least: gloo's thread now and then holds what it has sent until after the solver is done.
        return {"noise": noise, "megabytes": min(peak_megabytes(together) for _ in range(3)), **spent}

    ranks = run_forked(work)
    alone = assign_across_ranks(images, seed=0, step=0)
    assert torch.equal(torch.cat([rank["noise"] for rank in ranks]), alone)
    slowest, single = (
        [[max(a[i], b[i]) for a, b in zip(ranks[0][name], ranks[1][name], strict=True)] for i in (0, 1)]
        for name in ("together", "alone")
    )
    ratios = [ours / one for ours, one in zip(slowest[0], single[0], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
    return {
        "images": count,
        "data": "x".join(map(str, shape)),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "wall_ratio": statistics.median(ours / one for ours, one in zip(slowest[1], single[1], strict=True)),
        "rank_ms": 1e3 * statistics.median(slowest[0]),
        "single_ms": 1e3 * statistics.median(single[0]),
        "megabytes": max(rank["megabytes"] for rank in ranks),
        "limit_megabytes": 4e-6 * (images[0].numel() * (count // 2) + count**2 + 16 * count),
        "noise_megabytes": 4e-6 * images.numel(),
    }


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Returns the processor and the wall-clock seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    spent = time.process_time() - processor, time.perf_counter() - wall
    del result
    return spent


def report(rows: list[dict[str, Any]], repeats: int) -> None:
    """Writes what was measured as a table.

    Args:
        rows: What was measured, by pool.
        repeats: Number of times that both were measured.
    """
    lines = [
        "# One assignment over two ranks",
        "",
        f"Written by `benchmarks/immiscible_ranks.py`: two gloo ranks on one machine, one thread each, {repeats} times "
        "in turn with two processes that each draw and assign the whole pool by themselves, so that both meet the same "
        "load. Medians of the slower rank's processor time over the slower single process's, with quartiles; the "
        "machine has two cores; wall-clock ratios are for orientation. Memory is what torch "
        "holds at most above the images; the limit is a rank's rows of noise and one cost matrix. Both find the same "
        "noise.",
        "",
        "| images | data | rank / single process | by wall clock | rank, ms | single, ms | rank, MB | limit, MB | "
        "noise of all, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['images']} | {row['data']} | {row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}) | "
        f"{row['wall_ratio']:.2f} | {row['rank_ms']:.0f} | {row['single_ms']:.0f} | {row['megabytes']:.1f} | "
        f"{row['limit_megabytes']:.1f} | {row['noise_megabytes']:.1f} |"
        for row in rows
    ]
    write_json(RESULTS / "immiscible-ranks.json", {"rows": rows})
    write_text(RESULTS / "immiscible-ranks.md", "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(App(help=__doc__, result_action="return_value", default_command=run)())
