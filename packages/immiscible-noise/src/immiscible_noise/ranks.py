"""One assignment over the batches of all ranks, without moving noise between them.

Every rank draws the noise of the whole global batch from the same seed, computes the costs of its own images with it,
and receives the costs of the others: 4 G^2 bytes for G images in all, whatever the size of an image. All ranks then
solve the same problem and find the same permutation, of which each takes its own rows. No rank waits for another's
solver, and nothing is sent back.

The authors' code gathers noise and distances and lets the first rank solve. Multisample flow matching reported no
benefit of assigning across ranks over assigning inside each: measure it.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from .assign import solve_costs
from .batch import check_images
from .cost import Cost, Precision, cost_matrix
from .solvers import Solver


def assign_across_ranks(
    x: Float[Tensor, "b *data"],
    *,
    seed: int,
    step: int,
    labels: Int[Tensor, " b"] | None = None,
    cost: Cost = "sq",
    solver: Solver = "auto",
    precision: Precision = "float32",
    group: Any = None,
) -> Float[Tensor, "b *data"]:
    """Draws noise for the batches of all ranks together, assigns it, and returns this rank's share.

    Ranks may hold different numbers of images, and none. Without a process group it is the assignment of one batch.
    Gradient accumulation: give the micro-batches of one optimizer step together, and split what comes back.

    Args:
        x: Clean batch of this rank as the diffusion sees it.
        seed: Number that all ranks share, which fixes the noise together with `step`.
        step: Number of the training step.
        labels: Labels of this rank's images, as integers that mean the same on all ranks; noise is exchanged inside a
            label only.
        cost: Distance that is made least, as for `assign_noise`.
        solver: Exact solver, as for `assign_noise`.
        precision: Number format of the factors of the costs, as for `assign_noise`.
        group: Process group of the ranks that hold different data; None takes all. Under tensor or pipeline
            parallelism that is the data-parallel group.

    Raises:
        ValueError: The images are no batch of floating type, hold NaN or infinity on any rank, or the labels do not fit
            them. All ranks raise together.

    Example:
        >>> x = torch.randn(8, 3, 8, 8)
        >>> assign_across_ranks(x, seed=0, step=0).shape
        torch.Size([8, 3, 8, 8])
    """
    check_images(x)
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"labels has {len(labels)} rows, x has {len(x)}; give one label for each image")
    alone = not (dist.is_available() and dist.is_initialized())
    rank, sizes = (0, [len(x)]) if alone else _sizes(x, group)
    total, first = sum(sizes), sum(sizes[:rank])
    generator = torch.Generator(x.device).manual_seed(_mixed(seed, step))
    noise = torch.randn((total, *x.shape[1:]), generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
    with torch.no_grad():
        own = cost_matrix(x.detach().flatten(1), noise.flatten(1), cost=cost, precision=precision)
        table = None if labels is None else labels.to(x.device, torch.int64)[:, None]
        if not alone:
            own = _gathered(own, sizes, group)
            table = None if table is None else _gathered(table, sizes, group)
        columns = solve_costs(own, table, solver)
        return noise[columns[first : first + len(x)].to(x.device)]


def _sizes(x: Tensor, group: Any) -> tuple[int, list[int]]:
    """Returns this rank's place and the number of images on each rank."""
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group=group)
    return dist.get_rank(group), [int(count) for count in counts]


def _gathered(rows: Tensor, sizes: list[int], group: Any) -> Tensor:
    """Returns the rows of all ranks, one rank's after another's; shorter shares are padded on the way."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _mixed(seed: int, step: int) -> int:
    """Returns a seed that differs between any two steps (Weyl's sequence of the golden ratio)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1) % 2**63
