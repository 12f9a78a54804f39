"""Refinement: the little that a subject's adapter has outside the space.

An inversion finds theta_0 = mu + s * (V beta). What the space cannot hold is looked for in the orthogonal complement of
its components, in the same standardised numbers, close to theta_0 (the idea of pivotal tuning):

    theta = theta_0 + s * r,    r V = 0,    root mean square of r at most R,
    loss  = mean of (o - target)^2 over the mask + penalty * mean of r^2 / 2.

Coordinates in the space stay those of the inversion, so that a subject can still be edited along directions; R says how
far its adapter may be from what the members have in common, in standard deviations of each number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.digests import digest_of_values
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.train import rise_and_fall
from diffcore.train.timesteps import default_time_sampler
from diffcore.units import Map, each_unit
from w2w_space.bank import bank
from w2w_space.instance import (
    Deck,
    Errors,
    Instance,
    denoising_errors,
    group_means,
    held_out_loss,
    instances_by_name,
)
from w2w_space.invert import PHOTO, Best, InversionSettings
from w2w_space.products import relative_distance
from w2w_space.space import Point, of_factors


@dataclass(frozen=True, eq=False)
class Refined:
    """Adapters that were refined outside their space.

    Attributes:
        vectors: Vector of each adapter.
        losses: Loss on the fixed pairs.
        start_losses: Loss of the points on the same pairs.
        departures: Root mean square of what lies outside, in standard deviations of each number.
        outside: Frobenius norm of the difference of the changes, divided by that of the refined ones.
        steps: Step at which the best adapter was found; 0 is the point itself.
    """

    vectors: Float[Tensor, "n size"]
    losses: Float[Tensor, " n"]
    start_losses: Float[Tensor, " n"]
    departures: Float[Tensor, " n"]
    outside: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]


def refine(
    points: Sequence[Point],
    model: DiffusionModel,
    subjects: Sequence[Instance],
    settings: InversionSettings = PHOTO,
    *,
    radius: float = 0.1,
    penalty: float = 0.1,
    learning_rate: float = 1e-2,
    errors: Errors = denoising_errors,
    group_size: int = 16,
    map: Map = each_unit,
) -> Refined:
    """Lets adapters leave their space a little, so that they hold what is their subject's own.

    Args:
        points: Points that inversion found, one for each subject, all in one space.
        model: Base model of the space, whose weights stay as they are.
        subjects: Subjects with their pictures, conditions and masks.
        settings: Settings of the inversion, whose steps, batches, pairs and seed are taken.
        radius: Largest root mean square of the departure, in standard deviations of each number.
        penalty: Weight of the mean square of the departure.
        learning_rate: Largest step of a number, in its standard deviation.
        errors: Function that returns the error of each noisy row; by default the denoising error.
        group_size: Number of subjects in one forward pass; it bounds the memory and changes no result.
        map: Map over subjects that may keep what is finished.

    Raises:
        UserError: There are not as many points as subjects, they lie in different spaces, or a number is out of range.

    Example:
        >>> from diffcore.testing import tiny
        >>> from w2w_space.population import Population, Stacked
        >>> from w2w_space.recipe import layout_for
        >>> from w2w_space.space import WeightSpace
        >>> model = tiny.model("unet2d")
        >>> layout = layout_for(model, ("to_q",), rank=1)
        >>> vectors = torch.randn(5, layout.size, generator=torch.Generator().manual_seed(0))
        >>> space = WeightSpace.build(Population(layout, tuple("abcde"), Stacked(vectors)))
        >>> picture = Instance("me", torch.zeros(1, *model.shape), {"class_labels": torch.tensor([3])})
        >>> done = refine([space.point()], model, [picture], InversionSettings(steps=2), radius=0.05)
        >>> bool(done.departures[0] <= 0.05), bool(done.losses[0] <= done.start_losses[0])
        (True, True)
    """
    by_name = instances_by_name(subjects)
    if len(points) != len(by_name):
        raise UserError(f"there are {len(points)} points for {len(by_name)} subjects; give one for each")
    if len({point.space.fingerprint for point in points}) > 1:
        raise UserError("the points lie in different spaces; refine those of one space at a time")
    for name, value in (("radius", radius), ("learning_rate", learning_rate)):
        if not value > 0:
            raise UserError(f"`{name}` is {value}; it must be positive")
    if not penalty >= 0:
        raise UserError(f"`penalty` is {penalty}; it must be at least 0")
    space, layout = of_factors(points[0].space), points[0].space.layout
    starts = dict(zip(by_name, points, strict=True))
    told = [repr(settings), radius, penalty, learning_rate, space.fingerprint, model.fingerprint, errors.__qualname__]

    def work(unit: list[tuple[str, str, tuple[float, ...]]]) -> list[Tensor]:
        chosen = [by_name[name] for name, _, _ in unit]
        return _refined(
            [starts[each.name] for each in chosen], model, chosen, settings, radius, penalty, learning_rate, errors
        )

    items = [(name, each.digest, tuple(starts[name].z.tolist())) for name, each in by_name.items()]
    word = digest_of_values(told)[:16]
    rows = torch.stack(map(work, items, name=f"refine-{word}", kind=Tensor, unit_size=group_size))
    vectors, (losses, start_losses, departures, steps) = rows[:, : layout.size].float(), rows[:, layout.size :].T
    outside = [relative_distance(layout, vector, point.vector) for vector, point in zip(vectors, points, strict=True)]
    return Refined(vectors, losses, start_losses, departures, torch.tensor(outside), steps.round().long())


def _refined(
    points: list[Point],
    model: DiffusionModel,
    subjects: list[Instance],
    settings: InversionSettings,
    radius: float,
    penalty: float,
    learning_rate: float,
    errors: Errors,
) -> list[Tensor]:
    """Refines several adapters at once; returns vector, loss, loss of the point, departure, and step of the best."""
    space, denoiser, n = of_factors(points[0].space), model.denoiser, len(subjects)
    like = torch.empty((), device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
    components, scale = space.components.to(like), space.scale.to(like)
    pivot = torch.stack([point.vector for point in points]).to(like)
    sampler = default_time_sampler(denoiser.schedule)
    # Other noise than the inversion saw, and the fixed pairs that it was measured on.
    named = [replace(each, name=f"{each.name} refined") for each in subjects]
    deck, fixed = (Deck(each, sampler, seed=settings.seed, antithetic=True, like=like) for each in (named, subjects))

    def measured(r: Tensor) -> Tensor:
        with bank(model.backbone, space.layout, pivot + scale * r):
            return held_out_loss(
                denoiser, fixed, num_pairs=settings.num_pairs, at_once=settings.batch_size, errors=errors
            )

    r = torch.zeros_like(pivot).requires_grad_()
    start = measured(r.detach())
    best = Best(r.detach().clone(), start.clone())
    optimizer = torch.optim.Adam([r], learning_rate)
    factor = rise_and_fall(settings.steps, warmup=1)
    for step in range(settings.steps):
        batch = deck.deal(settings.batch_size, step)
        with bank(model.backbone, space.layout, pivot + scale * r):
            rows = group_means(errors(denoiser, batch), n) + penalty * r.square().mean(1) / 2
            (r.grad,) = torch.autograd.grad(rows.sum(), r)
        optimizer.param_groups[0]["lr"] = learning_rate * factor(step)
        optimizer.step()
        with torch.no_grad():
            r.sub_((r @ components.T) @ components)
            r.mul_((radius / r.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)).clamp(max=1.0))
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            best.update(r.detach(), measured(r.detach()), step + 1, settings.patience)
            if not bool(best.searching.any()):
                break
    departure = best.z.square().mean(1).sqrt()
    told = torch.stack([best.loss, start, departure, best.step.to(like)], 1)
    return list(torch.cat([pivot + scale * best.z, told], 1).cpu())
