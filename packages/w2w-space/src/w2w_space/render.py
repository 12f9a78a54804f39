"""Pictures of points: those that the base model draws with each of them, many points in one forward pass.

Picture (p, c, s) is what the model draws with the adapter of point p under condition c, a prompt or a class, from the
noise of seed s. All points share prompts and noise, so that pictures differ by the points alone. Each row of a batch
gets the adapter of its own point; with guidance both of its halves do, as in the paper.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.adapters import apply
from diffcore.errors import UserError
from diffcore.models import DiffusionModel, generate
from w2w_space.bank import bank
from w2w_space.layout import Layout
from w2w_space.space import Point

Attached = Callable[[Tensor], AbstractContextManager[Any]]
"""Makes the context in which the network runs a batch, from the place of the prompt of each of its rows."""


def render(
    model: DiffusionModel,
    points: Sequence[Point],
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    seeds: Sequence[int] = range(4),
    original: Sequence[Point] | None = None,
    timestep: float | int = float("inf"),
    **options: Any,
) -> Float[Tensor, "points conditions seeds *image"]:
    """Returns the pictures that a model draws with each point.

    Args:
        model: Base model of the points' space; its weights stay as they are.
        points: Points of one space.
        prompts: Prompts that every point draws; for class-conditional models give `labels`.
        labels: Classes that every point draws, in place of prompts.
        seeds: Seeds of the initial noise, which all points and prompts share.
        original: Points that draw above `timestep`, one for each of `points` (delayed injection, section 6.5).
        timestep: Largest timestep at which `points` draw where `original` is given, in the model's own units.
        **options: More arguments of `diffcore.models.generate`, such as steps, guidance_scale and batch_size.

    Returns:
        Pictures in [0, 1] on the CPU; a model without conditions has a single one.

    Raises:
        UserError: There are no points, or they are of several spaces.
        IncompatibleModelError: The model lacks a module of the space, or is compiled or fused.

    Example:
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> from w2w_space import Population, WeightSpace
        >>> from w2w_space.population import Stacked
        >>> from w2w_space.recipe import layout_for
        >>> model = from_pipeline(tiny.pipeline("sd15"))
        >>> layout = layout_for(model, ("to_q",), rank=1)
        >>> space = WeightSpace.build(Population(layout, tuple("abcde"), Stacked(torch.randn(5, layout.size))))
        >>> points = [space.member("a"), space.member("b")]
        >>> render(model, points, prompts=["a cat"], seeds=range(3), steps=2, guidance_scale=2.0).shape
        torch.Size([2, 1, 3, 3, 16, 16])
    """
    if not points:
        raise UserError("there are no points to draw with; give at least one")
    everyone = [*points, *(original or ())]
    if len({point.space.fingerprint for point in everyone}) > 1:
        raise UserError("the points are of several spaces; draw those of one space at a time")
    if original is not None and len(original) != len(points):
        raise ValueError(f"there are {len(original)} points in `original` for {len(points)} `points`; give one each")
    vectors = [torch.stack([point.vector for point in some]) for some in (points, original or points)]
    return render_vectors(
        model,
        points[0].space.layout,
        vectors[0],
        prompts=prompts,
        labels=labels,
        seeds=seeds,
        original=None if original is None else vectors[1],
        timestep=timestep,
        **options,
    )


def render_vectors(
    model: DiffusionModel,
    layout: Layout,
    vectors: Float[Tensor, "points size"],
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    seeds: Sequence[int] = range(4),
    original: Float[Tensor, "points size"] | None = None,
    timestep: float | int = float("inf"),
    guidance_scale: float | int = 1.0,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Float[Tensor, "points conditions seeds *image"]:
    """Returns the pictures that a model draws with each adapter, given by its vector; zeros draw the base model.

    Args:
        model: Base model of the adapters; its weights stay as they are.
        layout: Table of the vectors.
        vectors: One vector per adapter.
        prompts: Prompts that every adapter draws; for class-conditional models give `labels`.
        labels: Classes that every adapter draws, in place of prompts.
        seeds: Seeds of the initial noise, which all adapters and prompts share.
        original: Vectors that draw above `timestep`, one for each of `vectors`.
        timestep: Largest timestep at which `vectors` draw where `original` is given, in the model's own units.
        guidance_scale: Strength of classifier-free guidance; 0 and 1 are off.
        batch_size: Rows per batch, halved when memory runs out; guidance doubles what the network sees.
        on_batch: Called after each batch with the number of finished pictures and of all.
        **options: More arguments of `diffcore.models.generate`.

    Raises:
        IncompatibleModelError: The model lacks a module of the layout, or is compiled or fused.
    """
    given = list(prompts or ()), list(labels or ())
    conditions = max(len(given[0]), len(given[1]), 1)
    rows = conditions * len(list(seeds))
    # A bank changes linear modules alone: adapters of convolutions draw one after the other.
    linear = all(len(shape) == 2 for shape in layout.shapes)
    at_once = max(1, batch_size // rows) if linear else 1
    stacks = [vectors] if original is None else [original, vectors]
    done = list[Tensor]()
    for group in range(0, len(vectors), at_once):
        part = [stack[group : group + at_once].to(model.device) for stack in stacks]
        contexts = [
            _attaching(model, layout, some, conditions, doubled=guidance_scale not in (0, 1), linear=linear)
            for some in part
        ]
        done.append(
            generate(
                model,
                given[0] * len(part[0]) if prompts is not None else None,
                labels=given[1] * len(part[0]) if labels is not None else None,
                condition=None if prompts is not None or labels is not None else model.empty_condition(len(part[0])),
                seeds=seeds,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
                attached=contexts[0] if len(contexts) == 1 else _switching(model, contexts[0], contexts[1], timestep),
                **options,
            )
        )
        if on_batch is not None:
            on_batch(rows * sum(map(len, done)) // conditions, rows * len(vectors))
    return torch.cat(done).unflatten(0, (len(vectors), conditions))


def _attaching(
    model: DiffusionModel, layout: Layout, vectors: Tensor, conditions: int, *, doubled: bool, linear: bool
) -> Attached:
    """Returns what attaches to each row of a batch the adapter of its own point."""

    def attached(prompt: Int[Tensor, " rows"]) -> AbstractContextManager[Any]:
        if not linear:  # a single adapter
            return apply(model.backbone, layout.adapter(vectors[0]).modules)
        own = vectors[prompt // conditions]
        return bank(model.backbone, layout, torch.cat([own, own]) if doubled else own)

    return attached


def _switching(model: DiffusionModel, above: Attached, below: Attached, timestep: float | int) -> Attached:
    """Returns what attaches some adapters in steps above a timestep, and others at it and below."""

    @contextmanager
    def attached(prompt: Int[Tensor, " rows"]) -> Any:
        with ExitStack() as stack:
            current: Attached | None = None

            def choose(_: Any, args: tuple[Any, ...]) -> None:
                nonlocal current
                wanted = above if float(args[1][0]) > timestep else below
                if wanted is not current:
                    stack.close()
                    stack.enter_context(wanted(prompt))
                    current = wanted

            handle = model.denoiser.register_forward_pre_hook(choose)
            try:
                yield
            finally:
                handle.remove()

    return attached
