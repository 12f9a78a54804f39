"""Inversion: the point of a space whose adapter explains a few pictures of one subject.

All weights are frozen; only the coordinates z, in standard deviations, move:

    theta = mu + s * ((sigma * z) V),
    loss  = mean of (o - target)^2 over the mask + prior ||z||^2 / (2 m),

with timesteps stratified and noise in pairs of opposite signs. Adam's steps of one size mean the same along every
component in these units, which raw coefficients, whose deviations differ by orders of magnitude, do not offer. After
each step z is brought back within |z_k| <= 3 and ||z|| <= 1.2 sqrt(m), where members are: without bounds and prior the
minimum lies far outside. z stays in float32, because steps of .1 vanish in bfloat16 from 32 on.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.digests import digest_of_values
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.noise import philox_normal
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
from w2w_space.layout import Layout
from w2w_space.space import Point, WeightSpace

_START = 8
_SPREAD = 32
_FALL = 0.01


@dataclass(frozen=True)
class InversionSettings:
    """How coordinates are found.

    Attributes:
        num_components: Number of components that move; by default a share of the number of members.
        component_share: Number of components that move by default, divided by the number of members.
        steps: Largest number of steps of Adam.
        batch_size: Number of pairs of timestep and noise in a step.
        learning_rate: Largest step of a coordinate, in standard deviations; it falls to 0 along a cosine.
        prior: Weight of ||z||^2 / (2 m), the negative logarithm of a normal density.
        max_std: Bound on each coordinate in standard deviations; None for no bound.
        max_length: Bound on the length of z, in units of sqrt(m); None for no bound.
        check_every: Number of steps between two measurements on the fixed pairs.
        patience: Number of steps after which a loss that has not fallen by 1 % ends the search.
        num_pairs: Number of fixed pairs of timestep and noise that the measurements use.
        start: Whether to begin at the mean, or at the best of the mean and 32 members spread over the population.
        restarts: Number of searches for each subject; all after the first begin at random points.
        seed: Seed of timesteps, noise and random starts.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> InversionSettings().steps, ART.prior
        (400, 0.01)
    """

    num_components: int | None = None
    component_share: float = 0.15
    steps: int = 400
    batch_size: int = 4
    learning_rate: float = 0.05
    prior: float = 1e-3
    max_std: float | None = 3.0
    max_length: float | None = 1.2
    check_every: int = 25
    patience: int = 100
    num_pairs: int = 16
    start: Literal["mean", "nearest"] = "mean"
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every", "patience", "num_pairs", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}; it must be positive")
        if not self.prior >= 0:
            raise ValueError(f"`prior` is {self.prior}; it must be at least 0")
        if not self.component_share > 0:
            raise ValueError(f"`component_share` is {self.component_share}; it must be positive")
        if self.start not in ("mean", "nearest"):
            raise ValueError(f"`start` is {self.start!r}; it must be mean or nearest")


PHOTO = InversionSettings()
"""Settings for pictures like those that the members were trained on."""
ART = replace(PHOTO, prior=1e-2, component_share=0.015)
"""Settings for paintings and the like, which lie outside: fewer components and a stronger prior."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """What was found for each subject.

    Attributes:
        points: Best point of each subject; their distance from the mean is `Point.length`.
        losses: Loss of that point on the fixed pairs.
        start_losses: Loss of the mean on the same pairs.
        steps: Step at which the best point was found; 0 is the start.
        history: Loss on the fixed pairs at each measurement of the best search, from the start on; NaN after its end.
    """

    points: tuple[Point, ...]
    losses: Float[Tensor, " n"]
    start_losses: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]
    history: Float[Tensor, "n checks"]


def default_components(space: WeightSpace, share: float = 0.15) -> int:
    """Returns the number of components that inversion moves: a share of the number of members, at most all.

    Args:
        space: Space of the members.
        share: Share of the number of members, such as .015 for paintings.
    """
    members = len(space.names) or space.num_components
    return max(1, min(space.num_components, round(share * members)))


def invert(
    space: WeightSpace,
    model: DiffusionModel,
    subjects: Sequence[Instance],
    settings: InversionSettings = PHOTO,
    *,
    errors: Errors = denoising_errors,
    group_size: int = 16,
    map: Map = each_unit,
) -> Inversion:
    """Finds a point of the space for each subject, from one picture or more; several share one point.

    Args:
        space: Space whose components the search moves along.
        model: Base model that the members were trained on; its weights stay as they are.
        subjects: Subjects with their pictures, conditions and masks.
        settings: Settings of the search, such as `PHOTO` and `ART`.
        errors: Function that returns the error of each noisy row; by default the denoising error.
        group_size: Number of searches in one forward pass; it bounds the memory and changes no result.
        map: Map over subjects that may keep what is finished.

    Raises:
        UserError: There are no subjects, two have one name, or more components are asked for than there are.
        IncompatibleModelError: The model lacks modules of the space, or is compiled or fused.

    Example:
        >>> from diffcore.testing import tiny
        >>> from w2w_space.population import Population, Stacked
        >>> from w2w_space.recipe import layout_for
        >>> model = tiny.model("unet2d")
        >>> layout = layout_for(model, ("to_q",), rank=1)
        >>> vectors = torch.randn(5, layout.size, generator=torch.Generator().manual_seed(0))
        >>> space = WeightSpace.build(Population(layout, tuple("abcde"), Stacked(vectors)))
        >>> picture = Instance("me", torch.zeros(1, *model.shape), {"class_labels": torch.tensor([3])})
        >>> found = invert(space, model, [picture], InversionSettings(steps=2))
        >>> found.points[0].z.shape, bool(found.losses[0] <= found.start_losses[0])
        (torch.Size([4]), True)
    """
    by_name = instances_by_name(subjects)
    m = settings.num_components
    if m is None:
        m = default_components(space, settings.component_share)
    if not 1 <= m <= space.num_components:
        raise UserError(f"`num_components` is {m}; the space has {space.num_components}")
    restarts = range(settings.restarts)
    items = [(name, each.digest, restart) for name, each in by_name.items() for restart in restarts]
    word = digest_of_values([repr(settings), m, space.fingerprint, model.fingerprint, errors.__qualname__])[:16]

    def work(unit: list[tuple[str, str, int]]) -> list[Tensor]:
        chosen = [by_name[name] for name, _, _ in unit]
        return _search(space, model, chosen, [restart for _, _, restart in unit], settings, m, errors)

    rows = torch.stack(map(work, items, name=f"invert-{word}", kind=Tensor, unit_size=group_size))
    rows = rows.unflatten(0, (len(by_name), settings.restarts))
    best = rows[torch.arange(len(by_name)), rows[..., m].argmin(1)]
    full = torch.nn.functional.pad(best[:, :m], (0, space.num_components - m)).float()
    points = tuple(Point(space, z) for z in full)
    return Inversion(points, best[:, m], best[:, m + 1], best[:, m + 2].round().long(), best[:, m + 3 :])


def _search(
    space: WeightSpace,
    model: DiffusionModel,
    subjects: list[Instance],
    restarts: list[int],
    settings: InversionSettings,
    m: int,
    errors: Errors,
) -> list[Tensor]:
    """Searches for several subjects at once; returns z, loss, loss of the mean, step of the best, and history."""
    denoiser, n = model.denoiser, len(subjects)
    like = torch.empty((), device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
    # Draws depend on the name: each search has its own, but the fixed pairs are the subject's.
    named = [replace(s, name=s.name if r == 0 else f"{s.name} {r}") for s, r in zip(subjects, restarts, strict=True)]
    sampler = default_time_sampler(denoiser.schedule)
    decks = [Deck(each, sampler, seed=settings.seed, antithetic=True, like=like) for each in (named, subjects)]
    adapters = _Adapters(space.truncated(m), like)

    def measured(z: Tensor) -> Tensor:
        with bank(model.backbone, space.layout, adapters(z)):
            return held_out_loss(
                denoiser, decks[1], num_pairs=settings.num_pairs, at_once=settings.batch_size, errors=errors
            )

    at_mean = measured(torch.zeros(n, m).to(like))
    z = _starts(space.truncated(m), subjects, restarts, settings, measured, at_mean, like).requires_grad_()
    optimizer = torch.optim.Adam([z], settings.learning_rate)
    factor = rise_and_fall(settings.steps, warmup=1)
    loss = measured(z.detach())
    best = Best(z.detach().clone(), loss.clone())
    history = [loss]
    for step in range(settings.steps):
        batch = decks[0].deal(settings.batch_size, step)
        with bank(model.backbone, space.layout, adapters(z)):
            rows = group_means(errors(denoiser, batch), n) + settings.prior * z.square().sum(1) / (2 * m)
            (z.grad,) = torch.autograd.grad(rows.sum(), z)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * factor(step)
        optimizer.step()
        bound(z, settings.max_std, settings.max_length)
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            loss = measured(z.detach())
            history.append(loss.where(best.searching, torch.nan))
            best.update(z.detach(), loss, step + 1, settings.patience)
            if not bool(best.searching.any()):
                break
    checks = -(-settings.steps // settings.check_every) + 1
    curve = torch.full((n, checks), torch.nan).to(like)
    curve[:, : len(history)] = torch.stack(history, 1)
    return list(torch.cat([best.z, best.loss[:, None], at_mean[:, None], best.step[:, None].to(like), curve], 1).cpu())


def fixed_losses(
    layout: Layout,
    model: DiffusionModel,
    subjects: Sequence[Instance],
    vectors: Float[Tensor, "n size"] | None,
    settings: InversionSettings = PHOTO,
    *,
    errors: Errors = denoising_errors,
    group_size: int = 16,
) -> Float[Tensor, " n"]:
    """Returns the loss of any adapters on the fixed pairs on which inversion measures its own.

    Args:
        layout: Table of the vectors.
        model: Base model of the adapters.
        subjects: Subjects with their pictures, conditions and masks.
        vectors: One adapter for each subject; None measures the base model alone.
        settings: Settings of the inversion, whose pairs and seed are taken.
        errors: Function that returns the error of each noisy row; by default the denoising error.
        group_size: Number of subjects in one forward pass.

    Raises:
        UserError: There are no subjects, or two have one name.

    Example:
        >>> from diffcore.testing import tiny
        >>> from w2w_space.recipe import layout_for
        >>> model = tiny.model("unet2d")
        >>> layout = layout_for(model, ("to_q",), rank=1)
        >>> picture = Instance("me", torch.zeros(1, *model.shape), {"class_labels": torch.tensor([3])})
        >>> base = fixed_losses(layout, model, [picture], None)
        >>> bool(base == fixed_losses(layout, model, [picture], torch.zeros(1, layout.size)))
        True
    """
    subjects = list(instances_by_name(subjects).values())
    like = torch.empty((), device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
    sampler, found = default_time_sampler(model.denoiser.schedule), []
    for start in range(0, len(subjects), group_size):
        group = slice(start, start + group_size)
        deck = Deck(subjects[group], sampler, seed=settings.seed, antithetic=True, like=like)
        applied = nullcontext() if vectors is None else bank(model.backbone, layout, vectors[group].to(like))
        with applied:
            found.append(
                held_out_loss(
                    model.denoiser, deck, num_pairs=settings.num_pairs, at_once=settings.batch_size, errors=errors
                )
            )
    return torch.cat(found).cpu()


@torch.no_grad()
def bound(z: Float[Tensor, "n m"], max_std: float | None, max_length: float | None) -> None:
    """Brings points back, in place, to where members are: each coordinate first, then the length.

    Args:
        z: Coordinates in standard deviations, one row per point.
        max_std: Largest absolute value of a coordinate; None for no bound.
        max_length: Largest length of a row, in units of sqrt(m); None for no bound.

    Example:
        >>> z = torch.tensor([[5.0, 0.0, 0.0, 0.0]])
        >>> bound(z, 3.0, 1.2)
        >>> [round(number, 2) for number in z[0].tolist()]
        [2.4, 0.0, 0.0, 0.0]
    """
    if max_std is not None:
        z.clamp_(-max_std, max_std)
    if max_length is not None:
        largest = max_length * math.sqrt(z.shape[1])
        z.mul_((largest / z.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))


class _Adapters:
    """Turns coordinates into vectors with gradients, in the precision of the search."""

    def __init__(self, space: WeightSpace, like: Tensor) -> None:
        self._mean, self._scale, self._components = (
            part.to(like) for part in (space.mean, space.scale, space.components)
        )
        self._sigma = space.sigma.to(like)

    def __call__(self, z: Tensor) -> Tensor:
        return self._mean + self._scale * ((z * self._sigma) @ self._components)


class Best:
    """Keeps the best row of each search, until its loss has not fallen by 1 % for some time.

    Attributes:
        z: Best row of each search so far.
        loss: Loss of that row on the fixed pairs.
        step: Step at which it was found.
        searching: Whether each search goes on.
    """

    def __init__(self, z: Tensor, loss: Tensor) -> None:
        """Begins at the rows where the searches start.

        Args:
            z: Rows at the start.
            loss: Loss of each on the fixed pairs.
        """
        self.z, self.loss = z, loss
        self.step = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        self.searching = torch.ones(len(z), dtype=torch.bool, device=z.device)
        self._level, self._since = loss.clone(), self.step.clone()

    def update(self, z: Tensor, loss: Tensor, step: int, patience: int) -> None:
        """Takes over rows that are better than before.

        Args:
            z: Rows after some steps.
            loss: Loss of each on the fixed pairs.
            step: Number of steps so far.
            patience: Number of steps without a fall by 1 % after which a search ends.
        """
        better = (loss < self.loss) & self.searching
        self.z = torch.where(better[:, None], z, self.z)
        self.loss = torch.where(better, loss, self.loss)
        self.step = self.step.masked_fill(better, step)
        fallen = loss < (1 - _FALL) * self._level
        self._level = torch.where(fallen, loss, self._level)
        self._since = self._since.masked_fill(fallen, step)
        self.searching = self.searching & (step - self._since < patience)


def _starts(
    space: WeightSpace,
    subjects: list[Instance],
    restarts: list[int],
    settings: InversionSettings,
    measured: Any,
    at_mean: Tensor,
    like: Tensor,
) -> Tensor:
    """Returns where each search begins: mean or nearest member for the first of a subject, random for the others."""
    n, m = len(subjects), space.num_components
    z = torch.zeros(n, m).to(like)
    if settings.start == "nearest":
        if not len(space.members):
            raise UserError("the space was written without its members; start at the mean")
        places = torch.linspace(0, len(space.members) - 1, min(_SPREAD, len(space.members))).round().long()
        candidates = space.members[places].to(like)
        bound(candidates, settings.max_std, settings.max_length)
        losses = torch.stack([at_mean, *(measured(one.expand(n, -1)) for one in candidates)])
        z = torch.cat([z[:1], candidates])[losses.argmin(0)]
    drawn = torch.stack([philox_normal(settings.seed, [restart], (m,), stream=_START)[0] for restart in restarts]).to(
        like
    )
    bound(drawn, settings.max_std, settings.max_length)
    first = torch.tensor([restart == 0 for restart in restarts], device=like.device)
    return torch.where(first[:, None], z, drawn).contiguous()
