"""One assignment over the batches of all ranks, without moving noise between them.

The noise of every row of the global batch follows from a seed, the step and its number. Every rank draws it a few rows
at a time, keeps the costs of its own images with it, and receives the costs of the others: 4 G^2 bytes for G images in
all, whatever the size of an image. All ranks then solve the same problem, find the same permutation, and draw the rows
that fall to them once more. So a rank holds one cost matrix and its own rows, never the noise of all. No rank waits for
another's solver, and nothing is sent back.

The authors' code gathers noise and distances and lets the first rank solve. Multisample flow matching reported no
benefit of assigning across ranks over assigning inside each: measure it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from .assign import solve_costs
from .batch import check_choice, check_images, check_strength, choose_rows, mixed_seed
from .cost import Cost, Precision, cost_matrix
from .solvers import Solver, check_solver

Draw = Callable[[Int[Tensor, " m"]], Tensor]
_WITH_ONE_SEED = 32  # rows of noise
_AT_A_TIME = 128  # rows of noise whose costs are computed together, a multiple of those with one seed


def assign_across_ranks(
    x: Float[Tensor, "b *data"],
    *,
    seed: int,
    step: int,
    labels: Int[Tensor, " b"] | None = None,
    cost: Cost = "sq",
    strength: float = 1.0,
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
        strength: Share of the images of all ranks, chosen at random, that are assigned among themselves.
        solver: Exact solver, as for `assign_noise`.
        precision: Number format of the factors of the costs, as for `assign_noise`.
        group: Process group of the ranks that hold different data; None takes all. Under tensor or pipeline
            parallelism that is the data-parallel group.

    Raises:
        ValueError: The images are no batch of floating type, or an option is unknown. Images hold NaN or infinity on
            any rank, labels do not fit them, or only some ranks give labels: all ranks raise together.

    Example:
        >>> x = torch.randn(8, 3, 8, 8)
        >>> assign_across_ranks(x, seed=0, step=0).shape
        torch.Size([8, 3, 8, 8])
    """
    check_images(x)
    return assign_drawn_across_ranks(
        x,
        _GlobalNoise(x, seed, step).rows,
        labels=labels,
        cost=cost,
        strength=strength,
        solver=solver,
        precision=precision,
        generator=torch.Generator().manual_seed(mixed_seed(seed, step, -1)),
        group=group,
    )


def assign_drawn_across_ranks(
    x: Float[Tensor, "b *data"],
    draw: Draw,
    *,
    labels: Int[Tensor, " b"] | None = None,
    cost: Cost = "sq",
    strength: float = 1.0,
    solver: Solver = "auto",
    precision: Precision = "float32",
    generator: torch.Generator | None = None,
    group: Any = None,
) -> Float[Tensor, "b *data"]:
    """Assigns noise of the caller's over the batches of all ranks, and returns this rank's share.

    Errors are those of `assign_across_ranks`.

    Args:
        x: Clean batch of this rank as the diffusion sees it.
        draw: Makes rows of the noise from their numbers in the batches of all ranks one after another; the numbers lie
            on the host, the rows on the device of `x`. It is asked for every row, and for this rank's rows again.
        labels: Labels of this rank's images, as for `assign_across_ranks`.
        cost: Distance that is made least, as for `assign_noise`.
        strength: Share of the images of all ranks, chosen at random, that are assigned among themselves.
        solver: Exact solver, as for `assign_noise`.
        precision: Number format of the factors of the costs, as for `assign_noise`.
        generator: Source of the choice of rows, for `strength` between 0 and 1, in the same state on all ranks.
        group: Process group of the ranks that hold different data; None takes all.

    Example:
        >>> from immiscible_noise import assign_noise
        >>> x, noise = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
        >>> torch.equal(assign_drawn_across_ranks(x, lambda rows: noise[rows]), assign_noise(x, noise))
        True
    """
    check_images(x)
    check_choice("cost", cost, Cost)
    check_choice("precision", precision, Precision)
    check_strength(strength)
    check_solver(solver)
    rank, sizes = _sizes(x, labels, group)
    total, first = sum(sizes), sum(sizes[:rank])
    rows, own = choose_rows(total, strength, generator).cpu(), slice(first, first + len(x))
    with torch.no_grad():
        flat, columns = x.detach().flatten(1), torch.arange(total)
        if len(rows) < total:
            ranks = torch.bucketize(rows, torch.tensor(sizes).cumsum(0), right=True)
            sizes = torch.bincount(ranks, minlength=len(sizes)).tolist()
            mine = rows.split(sizes)[rank] - first
            flat, labels = flat[mine.to(x.device)], None if labels is None else labels[mine.to(labels.device)]
        if len(rows) > 1:
            found = _columns(flat, draw, rows, labels, rank, sizes, (cost, precision), solver, group)
            columns[rows] = rows[found]
        return draw(columns[own])


def _columns(
    flat: Float[Tensor, "b d"],
    draw: Draw,
    rows: Int[Tensor, " m"],
    labels: Int[Tensor, " b"] | None,
    rank: int,
    sizes: list[int],
    how: tuple[Cost, Precision],
    solver: Solver,
    group: Any,
) -> Int[Tensor, " m"]:
    """Returns, on the host, which noise each of the images that take part gets, as places among them.

    The costs are freed on return, before the noise is drawn again.
    """
    total, first, (cost, precision) = len(rows), sum(sizes[:rank]), how
    own = slice(first, first + len(flat))
    costs = flat.new_empty((total, total), dtype=torch.promote_types(flat.dtype, torch.float32))
    for numbers, part in zip(rows.split(_AT_A_TIME), costs[own].split(_AT_A_TIME, dim=1), strict=True):
        drawn = draw(numbers)
        part.copy_(cost_matrix(flat, drawn.flatten(1), cost=cost, precision=precision))
        del drawn  # before the next are drawn
    table = None
    if labels is not None:
        table = torch.empty((total, 1), dtype=torch.int64, device=flat.device)
        table[own, 0] = labels.to(table)
    if len(sizes) > 1:
        for part in (costs, *(() if table is None else (table,))):
            _share(part, sizes, group)
    return solve_costs(costs, table, solver, rows=rows)


@dataclass(frozen=True, eq=False)
class _GlobalNoise:
    """The noise of a global batch, drawn whenever rows are asked for: `_WITH_ONE_SEED` rows have a seed together.

    Attributes:
        like: Batch whose type, device and shape of a row the noise takes.
        seed: Number that all ranks share.
        step: Number of the training step.
    """

    like: Tensor
    seed: int
    step: int

    def rows(self, numbers: Int[Tensor, "m"]) -> Tensor:
        """Returns rows of the noise by their numbers in the global batch.

        Args:
            numbers: Row numbers on the host, in any order.
        """
        found, generator = self.like.new_empty((len(numbers), *self.like.shape[1:])), torch.Generator(self.like.device)
        room = torch.empty((_WITH_ONE_SEED, *found.shape[1:]), dtype=torch.float32, device=found.device)
        order = numbers.argsort(stable=True)
        groups, counts = (numbers[order] // _WITH_ONE_SEED).unique_consecutive(return_counts=True)
        for number, places in zip(groups.tolist(), order.split(counts.tolist()), strict=True):
            room.normal_(generator=generator.manual_seed(mixed_seed(self.seed, self.step, number)))
            inside = numbers[places] - number * _WITH_ONE_SEED
            first = int(places[0])
            if len(places) == _WITH_ONE_SEED and bool((places - first == inside).all()):  # all of them, in order
                found[first : first + _WITH_ONE_SEED] = room
            else:
                taken = room[inside.to(found.device, non_blocking=True)].to(found.dtype)
                found[places.to(found.device, non_blocking=True)] = taken
                del taken  # before the next are taken
        return found


def _sizes(x: Tensor, labels: Tensor | None, group: Any) -> tuple[int, list[int]]:
    """Returns this rank's place and the number of images on each rank.

    Raises:
        ValueError: Labels of some rank do not fit, on all ranks.
    """
    wrong = None if labels is None else _misfit(labels, len(x))
    if not (dist.is_available() and dist.is_initialized()):
        if wrong:
            raise ValueError(wrong)
        return 0, [len(x)]
    own = torch.tensor([len(x), labels is not None, wrong is not None], device=x.device)
    every = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    sizes, labelled, misfits = torch.stack(every).T.tolist()
    if any(misfits):
        raise ValueError(wrong or f"labels of rank {misfits.index(1)} do not fit its images")
    if len(set(labelled)) > 1:
        with_labels, without = labelled.index(1), labelled.index(0)
        raise ValueError(f"labels are given on rank {with_labels}, not on rank {without}; give them on all, or on none")
    return dist.get_rank(group), sizes


def _misfit(labels: Tensor, count: int) -> str | None:
    """Returns what is wrong with the labels of one rank, in words."""
    if len(labels) != count:
        return f"labels has {len(labels)} rows, x has {count}; give one label for each image"
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        return f"labels is {labels.dtype} of shape {list(labels.shape)}; give one integer for each image"
    return None


def _share(rows: Tensor, sizes: list[int], group: Any) -> None:
    """Fills in the rows of the other ranks, one rank's after another's, without a copy."""
    for rank, part in enumerate(rows.split(sizes)):
        if len(part):
            dist.broadcast(part, group=group, group_src=rank)
