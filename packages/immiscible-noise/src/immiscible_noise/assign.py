"""Assign the noise of a batch to its images: the permutation of least total distance.

Y. Li et al., "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment", NeurIPS 2024, Algorithm 1.
The noise moves, never the image, its label or its timestep. Rows move by indexing, so that the batch holds the same
noise bit for bit and stays exactly Gaussian; what changes is which image each row of noise meets.
"""

import math
import time
import warnings
from typing import Literal, overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .blocks import Labels, label_table
from .cost import Cost, Precision, pair_costs
from .draw import draw_noise
from .graphs import outside_graphs
from .info import AssignmentInfo
from .match import match
from .solvers import Solver, choose_solver
from .validate import check_choice, check_images, check_pair, non_finite_message

Condition = Literal["auto", "block", "ignore"]


@overload
def assign_noise(
    x: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    *,
    labels: Labels | None = ...,
    mask: Shaped[Tensor, "b ..."] | None = ...,
    cost: Cost = ...,
    condition: Condition = ...,
    solver: Solver = ...,
    strength: float = ...,
    precision: Precision = ...,
    generator: torch.Generator | None = ...,
    return_info: Literal[False] = ...,
) -> Float[Tensor, "b *data"]: ...
@overload
def assign_noise(
    x: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    *,
    labels: Labels | None = ...,
    mask: Shaped[Tensor, "b ..."] | None = ...,
    cost: Cost = ...,
    condition: Condition = ...,
    solver: Solver = ...,
    strength: float = ...,
    precision: Precision = ...,
    generator: torch.Generator | None = ...,
    return_info: Literal[True],
) -> tuple[Float[Tensor, "b *data"], AssignmentInfo]: ...
@outside_graphs
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
    build both the noisy sample and the training target from what it returns. Evaluation losses use unassigned noise.
    No gradient flows through it, the tensor is a new one, and inside `torch.compile` it costs one graph break. Several
    modalities: pass ``torch.cat([a.flatten(1), b.flatten(1)], 1)`` for each argument and index their noises with
    ``info.permutation``.

    Args:
        x: Clean batch, any floating type.
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
        solver: "auto" takes lapx where it is installed, else scipy; on an accelerator, on costs that potentials
            computed there have reduced.
        strength: Share of the rows, chosen at random, that are assigned among themselves, in [0, 1]. The others keep
            their noise: 0 is ordinary training, 1 the paper.
        precision: "bfloat16" rounds the factors of the cost's matrix product: faster, nearly the same optimum.
        generator: Chooses the rows for ``strength`` between 0 and 1.
        return_info: Returns an `AssignmentInfo` as well.

    Raises:
        ValueError: For unequal shapes, integer types, rows with NaN or infinity among those assigned, a wrong number
            of labels, unknown options, or a solver that is not installed. Names the tensor and the first bad row.
    """
    start = time.perf_counter()
    check_pair(x, noise)
    table = _blocks_of(labels, condition, len(x))
    check_choice("cost", cost, Cost)
    check_choice("precision", precision, Precision)
    check_choice("solver", solver, Solver)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, outside [0, 1]")
    if precision != "float32" and cost == "l1":
        raise ValueError("cost='l1' has no matrix product, so precision has no meaning for it")
    keep = None if mask is None else _expand_mask(mask, x)
    chosen = choose_solver(solver, on_host=x.device.type == "cpu")

    with torch.no_grad():
        flat_x, flat_noise = _flatten(x), _flatten(noise)
        rows = _choose_rows(len(x), strength, generator)
        if len(rows) < 2:
            permutation, solved, chosen = torch.arange(len(x), device=x.device), (), "none"
            assigned = noise.detach().clone()
        else:
            try:
                columns, solved = match(
                    _take(flat_x, rows),
                    _take(flat_noise, rows),
                    None if table is None else _take(table, rows),
                    None if keep is None else _take(keep, rows),
                    cost=cost,
                    precision=precision,
                    solver=chosen,
                )
            except FloatingPointError:
                raise ValueError(non_finite_message(x=x, noise=noise)) from None
            if all(len(found) == 1 for _, found in solved):
                chosen = "none"
                warnings.warn(
                    f"all {len(rows)} labels of this batch differ, so no row may exchange its noise and nothing is "
                    "assigned. With a caption per image, give the class or cluster of each, or leave labels out and "
                    "measure the leak with immiscible_noise.diagnose; with many classes, use larger batches",
                    stacklevel=3,
                )
            permutation = _embed(columns, rows, x)
            assigned = _move_rows(noise, permutation)
        ms = (time.perf_counter() - start) * 1000
        if not return_info:
            return assigned
        return assigned, AssignmentInfo(
            permutation=permutation,
            cost=cost,
            solver=chosen,
            ms=ms,
            pair_costs_before=pair_costs(flat_x, flat_noise, cost=cost, mask=keep),
            pair_costs_after=pair_costs(flat_x, _flatten(assigned), cost=cost, mask=keep),
            solved=solved,
        )


def immiscible_noise_like(
    x: Float[Tensor, "b *data"],
    *,
    labels: Labels | None = None,
    mask: Shaped[Tensor, "b ..."] | None = None,
    cost: Cost = "sq",
    condition: Condition = "auto",
    solver: Solver = "auto",
    strength: float = 1.0,
    precision: Precision = "float32",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b *data"]:
    """Draws Gaussian noise of the type and device of ``x`` and assigns it: `assign_noise` in place of ``randn_like``.

    Args:
        x: Clean batch.
        labels: See `assign_noise`, as for the other options.
        mask: Nonzero where ``x`` is data.
        cost: Distance to minimise.
        condition: Whether labels separate the rows.
        solver: Which exact solver to use.
        strength: Share of the rows to assign.
        precision: Number format of the cost's matrix product.
        generator: Draws the noise, then the rows for ``strength``. It may live on another device than ``x``.
    """
    check_images(x)
    return assign_noise(
        x,
        draw_noise(x, generator),
        labels=labels,
        mask=mask,
        cost=cost,
        condition=condition,
        solver=solver,
        strength=strength,
        precision=precision,
        generator=generator,
    )


def _blocks_of(labels: Labels | None, condition: Condition, num_rows: int) -> Tensor | None:
    check_choice("condition", condition, Condition)
    if labels is None:
        if condition == "block":
            raise ValueError("condition='block' needs labels")
        return None
    table = label_table(labels, num_rows)
    if condition != "ignore":
        return table
    # Python shows it once per calling line. Whether the leak is large needs many batches: that is `diagnose`'s to say.
    warnings.warn(
        "condition='ignore' makes the noise depend on the labels in training but not in sampling; "
        "immiscible_noise.diagnose measures how much, condition='block' avoids it",
        stacklevel=4,
    )
    return None


def _expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Returns the mask as booleans, flat like the images."""
    aligned = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    try:
        return _flatten(aligned.ne(0).expand(x.shape))
    except RuntimeError:
        raise ValueError(f"mask has shape {list(mask.shape)}, which does not fit x of shape {list(x.shape)}") from None


def _flatten(batch: Tensor) -> Tensor:
    return batch.detach().reshape(len(batch), math.prod(batch.shape[1:]))


def _choose_rows(num_rows: int, strength: float, generator: torch.Generator | None) -> Int[Tensor, "m"]:
    """Returns the rows that take part, ascending. Full and zero strength draw no random number."""
    count = round(strength * num_rows)
    if count in (0, num_rows):
        return torch.arange(count)
    device = None if generator is None else generator.device
    return torch.randperm(num_rows, generator=generator, device=device)[:count].sort().values


def _take(batch: Tensor, rows: Int[Tensor, "m"]) -> Tensor:
    return batch if len(rows) == len(batch) else batch[rows.to(batch.device, non_blocking=True)]


def _embed(columns: Int[Tensor, "m"], rows: Int[Tensor, "m"], x: Tensor) -> Int[Tensor, "b"]:
    """Returns the permutation of the whole batch that permutes the given rows among themselves."""
    permutation = torch.arange(len(x), device=x.device)
    rows = rows.to(x.device, non_blocking=True)
    permutation[rows] = rows[columns.to(x.device, non_blocking=True)]
    return permutation


def _move_rows(noise: Tensor, permutation: Int[Tensor, "b"]) -> Tensor:
    """Returns the rows in their new order, in the memory layout of the noise."""
    return torch.index_select(noise.detach(), 0, permutation, out=torch.empty_like(noise, requires_grad=False))
