"""A direction as an adapter of its own: its strength is a slider, in standard deviations of the members.

With the factors A, B of a subject and dA, dB the move of one standard deviation, which is the same everywhere in the
space, the subject moved by s has the change (B + s dB)(A + s dA). Less that of the subject, and divided by s = `at`,

    D = dB (A + at dA) + B dA = [dB  B] [A + at dA ; dA],

of twice the space's rank, so that nothing is lost. On top of that subject the slider at strength s makes the edit by s
up to s (s - at) dB dA: exactly at s = 0 and s = at, and to first order everywhere for at = 0. On top of another subject
of factors A', B' the edit differs by dB (A' - A) + (B' - B) dA as well, times s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.adapters import Adapter, LowRank
from diffcore.errors import UserError
from w2w_space.coordinates import Point, Space
from w2w_space.directions import Direction, Directions
from w2w_space.edit import edit
from w2w_space.ranks import RankLoss, adapter_at_rank
from w2w_space.space import of_factors

_OUTERMOST = 1.0  # percent of the held-out members on each side that lie beyond the useful range
_LEAST_SHRINKAGE = 0.5  # as where adapters are projected: coordinates are lengthened to twice at most


@dataclass(frozen=True, eq=False)
class Slider:
    """A direction as an adapter.

    Attributes:
        adapter: Adapter that changes by one standard deviation at strength 1.
        name: Name of the attribute.
        at: Strength at which the slider equals the edit exactly.
        useful: Least and largest strength that leave the subject among the members.
        losses: Loss of each module where the rank was cut; empty where the slider is exact.
    """

    adapter: Adapter
    name: str
    at: float
    useful: tuple[float, float]
    losses: dict[str, RankLoss] = field(default_factory=dict)


def slider(
    subject: Point,
    name: str,
    directions: Directions,
    *,
    at: float = 1.0,
    keep: Sequence[str] = (),
    rank: int | None = None,
) -> Slider:
    """Returns a direction as an adapter, to be added at any strength to the adapter of a subject.

    Args:
        subject: Point that the slider is made for; the mean of the space for one that serves all.
        name: Attribute that the slider moves.
        directions: Directions of the space.
        at: Strength in standard deviations at which slider and edit are equal; 0 for the slope.
        keep: Attributes whose scores stay as they are.
        rank: Rank of the slider; by default twice that of the space, which loses nothing.

    Raises:
        UserError: There is no such direction, it belongs to another space, or `at` is not finite.

    Example:
        >>> from w2w_space.directions import find_directions
        >>> from w2w_space.labels import Labels
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (6, 6)}, rank=1), torch.Generator().manual_seed(0)
        >>> matrix, names = torch.randn(60, 12, generator=g), tuple(map(str, range(60)))
        >>> from w2w_space.space import WeightSpace
        >>> space = WeightSpace.build(Population(layout, names, Stacked(matrix)), gauge="raw")
        >>> found = find_directions(space, Labels.of(names, {"tall": matrix[:, 0].tolist()}))
        >>> made = slider(space.point(), "tall", found, at=2.0)
        >>> moved = edit(space.point(), {"tall": 2.0}, found).point.adapter().modules["to_q"].delta()
        >>> change = moved - space.point().adapter().modules["to_q"].delta()
        >>> torch.allclose(2.0 * made.adapter.modules["to_q"].delta(), change, atol=1e-5)
        True
    """
    if not abs(at) < float("inf"):
        raise UserError(f"`at` is {at}; give a finite number of standard deviations")
    space, layout = of_factors(subject.space), subject.space.layout
    moved = edit(subject, {name: 1.0}, directions, keep=keep).point
    step = space.scale * (((moved.z - subject.z) * space.sigma) @ space.components)
    changes = {}
    own, steps = layout.factors(subject.vector), layout.factors(step)
    for (module, (down, up)), shape in zip(own.items(), layout.shapes, strict=True):
        d_down, d_up = steps[module]
        factors = torch.cat([down + at * d_down, d_down]), torch.cat([d_up, up], 1)
        kernel = factors[0].reshape(2 * layout.rank, *shape[1:])
        changes[module] = LowRank(kernel.contiguous(), factors[1].contiguous(), float(2 * layout.rank))
    whole = Adapter(changes, backbone=layout.backbone, name=name)
    adapter, losses = (whole, {}) if rank is None else adapter_at_rank(whole, rank)
    row = directions[name]
    low, high = useful_places(row, space)
    place = float(row.place(subject.z))
    return Slider(adapter, name, at, (low - place, high - place), losses)


def useful_places(direction: Direction, space: Space) -> tuple[float, float]:
    """Returns the places on an axis between which 98 % of the held-out members lie, in standard deviations.

    Coordinates of adapters that were not in the fit come out too short, and are lengthened first, as `project` can do.
    Spaces without members have -2 and 2, between which 95 % of a normal distribution lie.

    Args:
        direction: Direction of an attribute.
        space: Space that it belongs to.
    """
    reference: Float[Tensor, "n m"] = space.peers(projected=True)
    if not len(reference):
        return -2.0, 2.0
    places = direction.place(reference) / (max(space.shrinkage, _LEAST_SHRINKAGE) if len(space.held_out) else 1.0)
    shares = torch.tensor([_OUTERMOST / 100, 1 - _OUTERMOST / 100], dtype=torch.float64)
    low, high = places.quantile(shares).tolist()
    return low, high
