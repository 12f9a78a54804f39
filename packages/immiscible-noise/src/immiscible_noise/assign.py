"""Assign the noise of a batch to its images: the permutation of least total distance.

For images x_1 … x_B and noise n_1 … n_B ~ N(0, I), `assign_noise` finds the permutation π that minimises
``sum_i dist(x_i, n_π(i))``, and image i is diffused towards n_π(i): ``x_t = alpha_t x_i + sigma_t n_π(i)``. The noise
moves, never the image, its label or its timestep. Rows move by indexing, so that the batch holds the same noise bit for
bit and stays exactly Gaussian; what changes is which image each row of noise meets.

References:
    Y. Li et al., "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment", NeurIPS 2024,
    Algorithm 1.
"""

import math
import time
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .batch import (
    check_choice,
    check_images,
    check_pair,
    check_strength,
    choose_rows,
    draw_noise,
    non_finite_message,
)
from .blocks import Labels, label_table, same_block, split_blocks
from .cost import Cost, Precision, cost_matrix, pair_costs
from .info import AssignmentInfo, SolvedBlock
from .solvers import HostSolver, Solver, check_solver, choose_solver, reduced_costs, solve, solve_in_place
from .sparse import on_host

Condition = Literal["auto", "block", "ignore"]
P = ParamSpec("P")
T = TypeVar("T")


def _outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Keeps `torch.compile` out of a function: its caller has one graph break there, whatever the function does.

    Exact solvers run on the host, and labels may be any Python values; neither can be traced.
    """
    # The public torch.compiler.disable imports the compiler, which takes seconds, when a function is decorated; this,
    # which torch uses for its own optimizers, imports it when a compiled step first meets the function.
    uncompiled = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return uncompiled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call


class Options(TypedDict, total=False):
    """Keyword arguments of `assign_noise`, which describes them."""

    labels: Labels | None
    mask: Shaped[Tensor, "b ..."] | None
    cost: Cost
    condition: Condition
    solver: Solver
    strength: float
    precision: Precision


@overload
def assign_noise(
    x: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    *,
    generator: torch.Generator | None = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[Options],
) -> Float[Tensor, "b *data"]: ...
@overload
def assign_noise(
    x: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    *,
    generator: torch.Generator | None = ...,
    return_info: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Tensor, "b *data"], AssignmentInfo]: ...
@_outside_graphs
def assign_noise(
    x: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    *,
    labels: Labels | None = None,
    mask: Shaped[Tensor, "b ..."] | None = None,
    cost: Cost = "sq",
    condition: Condition = "auto",
    solver: Solver = "auto",
    strength: float = 1.0,
    precision: Precision = "float32",
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Float[Tensor, "b *data"] | tuple[Float[Tensor, "b *data"], AssignmentInfo]:
    """Returns the rows of ``noise`` in the order that brings each near its image.

    Call it after everything that makes the clean sample (latent scaling, normalisation) and before noise offsets, and
    build both the noisy sample and the training target from what it returns. Evaluation losses use unassigned noise. No
    gradient flows through it, the tensor is a new one, and inside `torch.compile` it costs one graph break. For several
    modalities, pass ``torch.cat([a.flatten(1), b.flatten(1)], 1)`` for each argument and index their noises with
    ``info.permutation``.

    Args:
        x: Clean batch of any floating type.
        noise: Independent Gaussian noise of the same shape on the same device.
        labels: Conditions, compared for equality: an integer tensor (one label, or a row of them, per image) or a
            sequence of hashable values. Give the labels the network sees, after classifier-free dropout. Where all
            labels of a batch differ, as captions do, no row may exchange its noise: a warning says so.
        mask: Nonzero where ``x`` is data, zero where it is padding; shaped like ``x`` or its leading dimensions, or
            broadcastable to it. What the padding holds never matters.
        cost: "sq", the squared L2 distance (optimal transport; fastest; ignores the images' mean and scale); "l2", as
            published; "l1", slow, for comparison with the paper's ablation only.
        condition: "auto" lets only rows with equal labels exchange noise if labels are given, which keeps the noise
            of every class exactly Gaussian; "block" asks for that; "ignore" is the published behaviour.
        solver: All are exact. "auto" takes "sparse" for large batches, which solves few of the pairs where the costs
            lie and proves that the others do not matter; else "lapx" where it is installed, else "scipy". On an
            accelerator, potentials that are computed there first reduce the costs ("potentials+scipy" and the like).
        strength: Share of the rows, chosen at random, that are assigned among themselves, in [0, 1]. The others keep
            their noise: 0 is ordinary training, 1 the paper.
        precision: "bfloat16" rounds the factors of the cost's matrix product: faster, nearly the same optimum.
        generator: Source of the choice of rows, for ``strength`` between 0 and 1.
        return_info: Whether an `AssignmentInfo` is returned as well.

    Raises:
        TypeError: ``x`` or ``noise`` is no tensor.
        ValueError: For unequal shapes, integer types, rows with NaN or infinity among those assigned, a wrong number
            of labels, unknown options, or a solver that is not installed. Names the tensor and the first bad row.

    Example:
        >>> import torch
        >>> x, noise = torch.randn(64, 3, 8, 8), torch.randn(64, 3, 8, 8)
        >>> assigned, info = assign_noise(x, noise, return_info=True)
        >>> torch.equal(assigned, noise[info.permutation]), info.cost_after < info.cost_before
        (True, True)
    """
    start = time.perf_counter()
    check_pair(x, noise)
    table = _blocks_of(labels, condition, len(x))
    check_choice("cost", cost, Cost)
    check_choice("precision", precision, Precision)
    check_solver(solver)
    check_strength(strength)
    if precision != "float32" and cost == "l1":
        raise ValueError("cost='l1' has no matrix product that precision could round; leave it at 'float32'")
    keep = None if mask is None else _expand_mask(mask, x)

    with torch.no_grad():
        flat_x, flat_noise = _flatten(x), _flatten(noise)
        rows = choose_rows(len(x), strength, generator)
        permutation, solved, ran = torch.arange(len(x), device=x.device), (), "none"
        if len(rows) > 1:
            table, taking = _take(table, rows), _take(keep, rows)
            costs = cost_matrix(
                _take(flat_x, rows), _take(flat_noise, rows), cost=cost, mask=taking, precision=precision
            )
            try:
                columns, solved, ran = _match(costs, table, solver)
            except FloatingPointError:
                raise ValueError(non_finite_message(x=x, noise=noise)) from None
            _warn_if_alone(solved)
            rows = rows.to(x.device, non_blocking=True)
            permutation[rows] = rows[columns.to(x.device, non_blocking=True)]
        # In the memory layout of the noise, and never the caller's own tensor.
        room = torch.empty_like(noise, requires_grad=False)
        assigned = torch.index_select(noise.detach(), 0, permutation, out=room)
        ms = (time.perf_counter() - start) * 1000
        if not return_info:
            return assigned
        return assigned, AssignmentInfo(
            permutation=permutation,
            cost=cost,
            solver=ran,
            ms=ms,
            pair_costs_before=pair_costs(flat_x, flat_noise, cost=cost, mask=keep),
            pair_costs_after=pair_costs(flat_x, _flatten(assigned), cost=cost, mask=keep),
            solved=solved,
        )


def immiscible_noise_like(
    x: Float[Tensor, "b *data"], *, generator: torch.Generator | None = None, **options: Unpack[Options]
) -> Float[Tensor, "b *data"]:
    """Draws Gaussian noise of the type and device of ``x`` and assigns it: `assign_noise` in place of ``randn_like``.

    Args:
        x: Clean batch as the diffusion sees it.
        generator: Source of the noise, then of the rows for ``strength``; it may live on another device than ``x``.
        **options: Keyword arguments of `assign_noise`, such as ``labels`` or ``strength``.

    Raises:
        ValueError: An argument is refused by `assign_noise`.

    Example:
        >>> import torch
        >>> immiscible_noise_like(torch.randn(8, 4, 16, 16), strength=0.5).shape
        torch.Size([8, 4, 16, 16])
    """
    check_images(x)
    return assign_noise(x, draw_noise(x, generator), generator=generator, **options)


def solve_costs(
    costs: Float[Tensor, "b b"],
    table: Int[Tensor, "b m"] | None = None,
    solver: Solver = "auto",
    *,
    rows: Int[Tensor, "b"] | None = None,
) -> Int[Tensor, "b"]:
    """Returns, on the host, the noise row of every image in the assignment of least total cost.

    Args:
        costs: Cost of each image with each noise, as `cost_matrix` gives them.
        table: Labels as integers; rows exchange noise only where they are equal. None: all rows do.
        solver: Exact solver, as for `assign_noise`.
        rows: Numbers of the images in their batch, for messages; by default from 0.

    Raises:
        ValueError: A cost is NaN or infinite, or the solver is not installed.
    """
    check_solver(solver)
    if len(costs) < 2:
        return torch.arange(len(costs))
    try:
        return _match(costs, table, solver)[0]
    except FloatingPointError:
        place = int((~torch.isfinite(costs)).any(1).nonzero()[0])
        row = place if rows is None else int(rows[place])
        raise ValueError(f"the costs of image {row} hold NaN or infinite values; look at the images") from None


def _match(
    costs: Float[Tensor, "b b"], table: Int[Tensor, "b m"] | None, solver: Solver
) -> tuple[Int[Tensor, "b"], tuple[SolvedBlock, ...], str]:
    """Returns, on the host, the noise row of every image, the problems that were solved, and the solvers that ran.

    Large problems without labels stay on their device, and few of their pairs are copied. Otherwise there is one
    transfer from the device, then an exact solve of every block of equal labels.

    Args:
        costs: Cost of each image with each noise.
        table: Labels as integers; rows exchange noise only where they are equal. None: all rows do.
        solver: Exact solver that the caller asks for.

    Raises:
        FloatingPointError: A cost is NaN or infinite.
    """
    if not on_host(costs):
        solver = choose_solver(solver, len(costs), on_host=False, whole=table is None)
        if solver == "sparse" and table is None:
            columns = solve_in_place(costs)
            if columns is not None:
                return torch.from_numpy(columns), ((costs, columns),), solver
            solver = choose_solver("auto", 0, on_host=False)
    if solver.startswith("potentials"):
        allowed = None if table is None else same_block(table.to(costs.device, non_blocking=True))
        costs = reduced_costs(costs, allowed)
    # On one stream the copies finish in order: waiting for the costs waits for the labels too.
    host_table = None if table is None else table.to("cpu", non_blocking=True)
    host_costs = costs.cpu().numpy()

    blocks = [np.arange(len(costs))] if host_table is None else split_blocks(host_table.numpy())
    columns, solved, ran = np.arange(len(costs)), [], set()
    for block in blocks:
        block_costs = host_costs if len(block) == len(costs) else host_costs[np.ix_(block, block)]
        if not np.isfinite(block_costs).all():
            raise FloatingPointError("a cost is NaN or infinite")
        resolved = choose_solver(solver, len(block), on_host=True)
        host_solver: HostSolver = resolved.removeprefix("potentials+")  # pyright: ignore[reportAssignmentType]
        chosen = solve(block_costs, host_solver)
        columns[block] = block[chosen]
        solved.append((torch.from_numpy(block_costs), chosen))
        ran |= {resolved} if len(block) > 1 else set()
    return torch.from_numpy(columns), tuple(solved), ", ".join(sorted(ran)) or "none"


def _blocks_of(labels: Labels | None, condition: Condition, num_rows: int) -> Tensor | None:
    check_choice("condition", condition, Condition)
    if labels is None:
        if condition == "block":
            raise ValueError("condition='block' needs labels; give them, or leave condition at 'auto'")
        return None
    table = label_table(labels, num_rows)
    if condition != "ignore":
        return table
    # Python shows it once per calling line. One batch cannot tell whether the leak is large; `diagnose` takes many.
    warnings.warn(
        "condition='ignore' makes the noise depend on the labels in training but not in sampling; "
        "immiscible_noise.diagnose measures how much, condition='block' avoids it",
        stacklevel=4,
    )
    return None


def _warn_if_alone(solved: tuple[SolvedBlock, ...]) -> None:
    if all(len(found) == 1 for _, found in solved):
        warnings.warn(
            f"all {len(solved)} labels of this batch differ, so no row may exchange its noise and nothing is "
            "assigned. With a caption per image, give the class or cluster of each, or leave labels out and "
            "measure the leak with immiscible_noise.diagnose; with many classes, use larger batches",
            stacklevel=4,
        )


def _expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Returns the mask as booleans, flat like the images."""
    aligned = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    try:
        return _flatten(aligned.ne(0).expand(x.shape))
    except RuntimeError:
        raise ValueError(f"mask has shape {list(mask.shape)}, which does not fit x of shape {list(x.shape)}") from None


def _flatten(batch: Tensor) -> Tensor:
    return batch.detach().reshape(len(batch), math.prod(batch.shape[1:]))


def _take(batch: Tensor | None, rows: Int[Tensor, "m"]) -> Any:
    if batch is None or len(rows) == len(batch):
        return batch
    return batch[rows.to(batch.device, non_blocking=True)]
