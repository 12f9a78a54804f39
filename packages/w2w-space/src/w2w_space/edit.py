"""Moving points along directions, in standard deviations, with other attributes held (paper, section 3.3).

An edit adds strength * std * unit to the coordinates z of a point. Edits commute, strength 0 changes nothing, and +s
then -s returns. Attributes that are kept have their span taken out of the direction first, all at once: removing them
one after the other, as the published code does, leaves a rest where they are correlated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from diffcore.errors import UserError
from w2w_space.coordinates import Point, Space
from w2w_space.directions import Direction, Directions

Unit = Literal["std", "max", "raw"]
Metric = Literal["whitened", "euclidean"]
_NEARLY_ALL = 99.9  # percent of the members, beyond whom an edit is warned about
_ROUNDING = 1e-4  # in standard deviations
_LEAST_LEFT = 0.1  # of a direction's length, below which the request contradicts the data


@dataclass(frozen=True)
class Placed:
    """Where a point lies on an attribute's axis before and after an edit, in standard deviations of the members.

    Attributes:
        name: Name of the attribute.
        before: Place before the edit.
        after: Place after the edit.
        percentile: Share of the members, in percent, that lie below the place after the edit; NaN where there are none.
        reach: Least and largest place of a member; NaN where there are none.
    """

    name: str
    before: float
    after: float
    percentile: float
    reach: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Edit:
    """An edited point.

    Attributes:
        point: The point after the edit.
        places: Place on each attribute's axis, before and after.
        length: Distance from the mean after the edit, in standard deviations.
        warnings: Sentences that speak against it, such as a place farther out than nearly all members.
    """

    point: Point
    places: tuple[Placed, ...]
    length: float
    warnings: tuple[str, ...] = ()


def edit(
    point: Point,
    strengths: Mapping[str, float],
    directions: Directions,
    *,
    keep: Sequence[str] = (),
    unit: Unit = "std",
    metric: Metric = "whitened",
    orthogonal: bool = False,
) -> Edit:
    """Moves a point along the directions of some attributes.

    Args:
        point: Point of the space that the directions belong to.
        strengths: Strength by name of the attribute, negative for less of it.
        directions: Directions of the space.
        keep: Names of attributes whose scores stay as they are.
        unit: Unit of the strengths: standard deviations of the members along the direction, the largest member (paper),
            or the estimator's vector as it came out (published code).
        metric: Space in which kept attributes are taken out: "whitened" takes their scores out in z, so that they do
            not move; "euclidean" takes their directions out in the coefficients, as the paper does.
        orthogonal: Whether several directions are made orthogonal to one another, all alike.

    Raises:
        UserError: The directions belong to another space, there is no such direction, an attribute is to be kept and
            moved, or hardly anything is left of a direction without the kept ones.

    Example:
        >>> from w2w_space.labels import Labels
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (6, 6)}, rank=1), torch.Generator().manual_seed(0)
        >>> matrix = torch.randn(60, 12, generator=g)
        >>> names = tuple(str(i) for i in range(60))
        >>> from w2w_space.space import WeightSpace
        >>> space = WeightSpace.build(Population(layout, names, Stacked(matrix)), gauge="raw")
        >>> from w2w_space.directions import find_directions
        >>> found = find_directions(space, Labels.of(names, {"tall": matrix[:, 0].tolist()}))
        >>> place = edit(space.point(), {"tall": 2.0}, found).places[0]
        >>> round(place.before, 3), round(place.after, 3)
        (0.0, 2.0)
    """
    if directions.space != point.space.fingerprint:
        raise UserError("the directions belong to another space than the point; find them in this one")
    both = set(strengths) & set(keep)
    if both:
        raise UserError(f"{sorted(both)[0]!r} is to be kept and to be moved; leave it out of one")
    moving = [directions[name] for name in strengths]
    vectors = torch.stack([row.vector for row in moving]) if moving else torch.zeros(0, len(point.z)).double()
    kept = [directions[name] for name in keep]
    if kept:
        vectors = _without(vectors, kept, point.space, moving, metric)
    if orthogonal and len(moving) > 1:
        left, _, right = torch.linalg.svd(vectors, full_matrices=False)
        vectors = left @ right
    moved = point.z.double()
    for row, vector, strength in zip(moving, vectors, strengths.values(), strict=True):
        # However much was taken out of it, the vector moves the attribute's own place by 1.
        size = {"std": row.std, "max": row.largest, "raw": row.raw}[unit]
        moved = moved + strength * size * vector / (vector @ row.axis)
    after = Point(point.space, moved.float()) if any(strengths.values()) else point
    places = tuple(_placed(row, point, after) for row in directions.rows)
    length = float(moved.norm())
    warnings = _warnings(after, [place for place in places if strengths.get(place.name)], length)
    return Edit(after, places, length, tuple(warnings))


def _without(
    vectors: Float64[Tensor, "k m"],
    kept: Sequence[Direction],
    space: Space,
    moving: Sequence[Direction],
    metric: Metric,
) -> Float64[Tensor, "k m"]:
    """Returns vectors without what they share with the kept attributes."""
    sigma = space.variances.sqrt()
    if metric == "whitened":
        span = torch.stack([row.score for row in kept])
        left = vectors - vectors @ (basis := torch.linalg.qr(span.T).Q) @ basis.T
    else:
        span = torch.stack([row.vector * sigma for row in kept])
        basis = torch.linalg.qr(span.T).Q
        scaled = vectors * sigma
        left = (scaled - scaled @ basis @ basis.T) / sigma
    lengths = left.norm(dim=1) / vectors.norm(dim=1)
    for row, length in zip(moving, lengths.tolist(), strict=True):
        if length < _LEAST_LEFT:
            names = ", ".join(repr(other.name) for other in kept)
            raise UserError(
                f"{1 - length:.0%} of the direction {row.name!r} is shared with {names}: the members do not tell them "
                "apart; keep fewer attributes"
            )
    return left


def _placed(row: Direction, before: Point, after: Point) -> Placed:
    end = float(row.place(after.z))
    members = row.place(after.peers)
    if not len(members):
        return Placed(row.name, float(row.place(before.z)), end, math.nan, (math.nan, math.nan))
    # A place that a member has counts as reached, whatever the rounding.
    share = 100 * float((members < end - math.copysign(_ROUNDING, end)).double().mean())
    return Placed(row.name, float(row.place(before.z)), end, share, (float(members.min()), float(members.max())))


def _warnings(after: Point, moved: Sequence[Placed], length: float) -> list[str]:
    """Returns a sentence for each axis on which the point was moved off the members, and for its distance."""
    found = [
        f"{place.name!r} is at {place.after:+.1f} standard deviations, farther out than {_NEARLY_ALL:g} % of the "
        f"members, who lie between {place.reach[0]:+.1f} and {place.reach[1]:+.1f}"
        for place in moved
        if (place.percentile <= 100 - _NEARLY_ALL and place.after < 0)
        or (place.percentile >= _NEARLY_ALL and place.after > 0)
    ]
    lengths = after.peers.double().norm(dim=1)
    if moved and len(lengths) and length > float(lengths.quantile(_NEARLY_ALL / 100)):
        found.append(
            f"the point is {length:.1f} standard deviations from the mean, farther than {_NEARLY_ALL:g} % of the "
            f"members, of whom the farthest is at {float(lengths.max()):.1f}"
        )
    return found
