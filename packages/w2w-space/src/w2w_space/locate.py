"""Where a point of a space lies: how far out, near which members, and how much it has of each attribute.

Compared is with members that were held out of the fit, where a space knows them, lengthened by what projection takes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float64
from torch import Tensor

from w2w_space.coordinates import Point, Space
from w2w_space.directions import Directions
from w2w_space.invert import InversionSettings

_TOUCHING = 1e-3  # relative distance from a bound at which a point lies on it
_LEAST_SHRINKAGE = 0.5  # as in `WeightSpace.project`
_MIDDLE = (30.0, 70.0)  # percentiles between which an attribute is usual


@dataclass(frozen=True)
class Place:
    """The place of a point on the axis of an attribute.

    Attributes:
        std: Place in standard deviations of the members.
        percentile: Share of the held-out members below it, in percent; NaN where they are not known.
    """

    std: float
    percentile: float


@dataclass(frozen=True)
class Located:
    """Where a point lies.

    Attributes:
        length: Distance from the mean in standard deviations, along the components that may move.
        usual: Median distance of the held-out members along the same components; NaN where they are not known.
        percentile: Share of the held-out members that are nearer to the mean, in percent; NaN where not known.
        nearest: Names of the nearest members and their distances, the nearest first.
        places: Place of each attribute whose direction is known.
        at_bound: Whether the point lies on a bound of the search, so that the search would have gone farther out.
    """

    length: float
    usual: float
    percentile: float
    nearest: tuple[tuple[str, float], ...]
    places: Mapping[str, Place] = field(default_factory=dict)
    at_bound: bool = False

    @property
    def words(self) -> str:
        """What is unusual about the point, such as "age 80th percentile, beard below 1st percentile"."""
        told = [
            f"{name} {_ranked(place.percentile)} percentile"
            for name, place in sorted(self.places.items(), key=lambda item: -abs(item[1].percentile - 50))
            if not _MIDDLE[0] <= place.percentile <= _MIDDLE[1]
        ]
        return ", ".join(told) or ("usual in all attributes" if self.places else "")


def locate(
    point: Point,
    directions: Directions | None = None,
    *,
    num_components: int | None = None,
    settings: InversionSettings | None = None,
    num_nearest: int = 3,
) -> Located:
    """Returns where a point lies among the members of its space.

    Args:
        point: Point of a space, such as inversion returns it.
        directions: Directions of the same space; its attributes are told in percentiles.
        num_components: Number of components that could move; by default all.
        settings: Settings of the search that found the point, for its bounds.
        num_nearest: Number of nearest members to name.

    Example:
        >>> import torch
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> from w2w_space.space import WeightSpace
        >>> layout, matrix = Layout.of({"to_q": (4, 3)}, rank=1), torch.randn(5, 7)
        >>> space = WeightSpace.build(Population(layout, tuple("abcde"), Stacked(matrix)))
        >>> locate(space.member("c")).nearest[0]
        ('c', 0.0)
    """
    space = point.space
    m = space.num_components if num_components is None else num_components
    z = point.z.double()
    members = _compared(space)
    reference = members[:, :m].norm(dim=1)
    length = float(z[:m].norm())
    known, unknown = len(reference) > 0, float("nan")
    nearest: tuple[tuple[str, float], ...] = ()
    if space.names:
        distances = (space.members.double() - z).norm(dim=1)
        nearest = tuple((space.names[i], float(distances[i])) for i in distances.argsort()[:num_nearest].tolist())
    places = {}
    for row in () if directions is None else directions.rows:
        std = float(row.place(point.z))
        below = 100 * float((row.place(members) < std).double().mean()) if known else unknown
        places[row.name] = Place(std, below)
    return Located(
        length,
        float(reference.median()) if known else unknown,
        100 * float((reference < length).double().mean()) if known else unknown,
        nearest,
        places,
        settings is not None and _touches(z[:m].abs().max().item(), length, m, settings),
    )


def _compared(space: Space) -> Float64[Tensor, "n m"]:
    """Returns the coordinates that found points are compared with: held-out members, as long as a search makes them.

    Members' own rows hold the noise of their training, which is inside the components; projections of held-out members
    are too short by `shrinkage`, and points that were searched for are not.
    """
    if not len(space.held_out):
        return space.members.double()
    return space.held_out.double() / max(space.shrinkage, _LEAST_SHRINKAGE)


def _touches(largest: float, length: float, m: int, settings: InversionSettings) -> bool:
    inside = 1 - _TOUCHING
    return (settings.max_std is not None and largest >= inside * settings.max_std) or (
        settings.max_length is not None and length >= inside * settings.max_length * math.sqrt(m)
    )


def _ranked(percentile: float) -> str:
    """Returns a percentile as people say it: 81st, 12th, above 99th."""
    whole = min(max(round(percentile), 1), 99)
    if not 1 <= percentile <= 99:
        return f"{'above' if percentile > 99 else 'below'} {whole}{'th' if whole == 99 else 'st'}"
    last = 0 if whole % 100 in (11, 12, 13) else whole % 10
    return f"{whole}" + {1: "st", 2: "nd", 3: "rd"}.get(last, "th")
