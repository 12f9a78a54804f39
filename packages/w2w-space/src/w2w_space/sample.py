"""New points of a space: draws from the members' cloud, and what tells a new one from a copy (paper, section 3.3).

The members' coordinates z have mean 0 and unit variance without correlation, by construction, so that independent
normals per component (paper) are the same as a normal with their full covariance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from sklearn.mixture import GaussianMixture
from torch import Tensor

from diffcore.errors import UserError
from w2w_space.coordinates import Point, Space
from w2w_space.diagnose import nearest_among_members, nearest_members
from w2w_space.directions import Directions

Method = Literal["gaussian", "mixture", "bootstrap", "slerp"]
_MIXED = 50  # leading components that a mixture describes
_CLUSTERS = (1, 2, 3, 4, 6, 8)
_NOISE = 0.3  # of a bootstrapped point, beside the members that it is made of
_COPY = 0.01  # quantile of the members' own nearest distances, below which a sample is a copy


@dataclass(frozen=True, eq=False)
class Sample:
    """A new point.

    Attributes:
        point: Place of the sample in the space.
        nearest: Name of the nearest member; empty for spaces without members.
        distance: Distance to it in standard deviations.
        cosine: Cosine of both points' coordinates, the paper's measure.
        near_copy: Whether it is nearer to that member than 99 % of the members are to one another.
        typical: Share of the members, in percent, that lie nearer to the mean.
    """

    point: Point
    nearest: str
    distance: float
    cosine: float
    near_copy: bool
    typical: float


def sample(
    space: Space,
    count: int,
    *,
    method: Method = "gaussian",
    truncation: float = 1.0,
    condition: Mapping[str, float] | None = None,
    directions: Directions | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Draws new points.

    Args:
        space: Space to draw from; all methods but "gaussian" need its members.
        count: Number of points to draw.
        method: "gaussian" draws each coordinate from a normal (paper), "mixture" fits a mixture of Gaussians to the
            leading components, "bootstrap" mixes three members and adds noise, "slerp" takes a point on the arc between
            two members.
        truncation: Factor of the distance from the mean, 0 for the mean itself and 1 for the members' spread.
        condition: Place of attributes in standard deviations, by name; needs `directions`.
        directions: Directions of the space, for conditions.
        seed: Seed of the draws.

    Raises:
        UserError: The method needs members and there are none, or a condition has no direction.

    Example:
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (6, 6)}, rank=1), torch.Generator().manual_seed(0)
        >>> names = tuple(str(i) for i in range(30))
        >>> from w2w_space.space import WeightSpace
        >>> space = WeightSpace.build(Population(layout, names, Stacked(torch.randn(30, 12, generator=g))))
        >>> [one.near_copy for one in sample(space, 3)]
        [False, False, False]
    """
    if method not in get_args(Method):
        raise UserError(f"`method` is {method!r}; give one of {', '.join(get_args(Method))}")
    if count < 1:
        raise UserError(f"`count` is {count}; give at least 1")
    if method != "gaussian" and len(space.members) < 3:
        raise UserError(f"the space was written without its members, which {method!r} draws from; take 'gaussian'")
    generator = torch.Generator().manual_seed(seed)
    z = truncation * _DRAWS[method](space, count, generator)
    return described(space, _conditioned(z, condition, directions) if condition else z)


def described(space: Space, z: Float[Tensor, "b m"], *, projected: bool = False) -> list[Sample]:
    """Returns points with their nearest member and how typical they are.

    Args:
        space: Space of the points.
        z: Coordinates of the points.
        projected: Whether the points are adapters that were not in the fit, as projection gives them: these are
            compared with held-out members, whose coordinates are as short.
    """
    unknown = float("nan")
    if not len(space.members):
        return [Sample(space.point(row), "", unknown, unknown, near_copy=False, typical=unknown) for row in z]
    limit, lengths = float(nearest_among_members(space).quantile(_COPY)), space.peers(projected=projected).norm(dim=1)
    return [
        Sample(
            space.point(row),
            name,
            float(distance),
            float(cosine),
            near_copy=float(distance) < limit,
            typical=100 * float((lengths < row.norm()).float().mean()),
        )
        for row, name, distance, cosine in zip(z, *nearest_members(space, z), strict=True)
    ]


def slerp(
    first: Float[Tensor, "b m"], second: Float[Tensor, "b m"], share: Float[Tensor, "b 1"]
) -> Float[Tensor, "b m"]:
    """Returns points on the arcs between pairs of points, whose lengths go over into one another.

    Args:
        first: Starts of the arcs.
        second: Ends of the arcs.
        share: Place on each arc, 0 at the start and 1 at the end.
    """
    lengths = first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True)
    one, other = (part / length.clamp(min=1e-12) for part, length in zip((first, second), lengths, strict=True))
    angle = (one * other).sum(1, keepdim=True).clamp(-0.9999, 0.9999).arccos()
    direction = (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / angle.sin()
    return direction * (lengths[0] * (1 - share) + lengths[1] * share)


def _conditioned(z: Tensor, condition: Mapping[str, float], directions: Directions | None) -> Tensor:
    """Returns draws that lie at given places along some directions, and where they were across them."""
    if directions is None:
        raise UserError("`condition` needs `directions`; find them in this space first")
    rows = [directions[name] for name in condition]
    axes = torch.stack([row.axis for row in rows])
    wanted = torch.tensor([place * row.std for place, row in zip(condition.values(), rows, strict=True)]).double()
    # The shortest move that puts all of them where they should be, where directions are correlated too.
    return (z.double() + (wanted - z.double() @ axes.T) @ torch.linalg.pinv(axes).T).float()


def _gaussian(space: Space, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, space.num_components, generator=generator)


def _mixture(space: Space, count: int, generator: torch.Generator) -> Tensor:
    """Draws leading components from the mixture of the best Bayesian criterion, and the others from normals."""
    z = _gaussian(space, count, generator)
    width = min(_MIXED, space.num_components, max(1, len(space.members) // 10))
    members = space.members[:, :width].double().numpy()
    sizes = [clusters for clusters in _CLUSTERS if clusters == 1 or clusters * 10 <= len(members)]
    fits = [GaussianMixture(k, covariance_type="diag", random_state=0, reg_covar=1e-3).fit(members) for k in sizes]
    best = min(fits, key=lambda fit: fit.bic(members))
    chosen = torch.multinomial(torch.from_numpy(best.weights_), count, replacement=True, generator=generator)
    means, deviations = torch.from_numpy(best.means_), torch.from_numpy(best.covariances_).sqrt()
    z[:, :width] = means[chosen].float() + deviations[chosen].float() * z[:, :width]
    return z


def _bootstrap(space: Space, count: int, generator: torch.Generator) -> Tensor:
    """Mixes three members with random weights, as far from the mean as members are, with some noise."""
    weights = torch.rand(count, 3, generator=generator)
    mixed = (weights / weights.norm(dim=1, keepdim=True))[:, :, None] * space.members[
        _drawn(space, count, 3, generator)
    ]
    return (1 - _NOISE**2) ** 0.5 * mixed.sum(1) + _NOISE * _gaussian(space, count, generator)


def _slerp(space: Space, count: int, generator: torch.Generator) -> Tensor:
    first, second = space.members[_drawn(space, count, 2, generator)].unbind(1)
    return slerp(first, second, torch.rand(count, 1, generator=generator))


def _drawn(space: Space, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Returns places of different members, some for each draw."""
    return torch.rand(count, len(space.members), generator=generator).topk(size, 1).indices


_DRAWS = {"gaussian": _gaussian, "mixture": _mixture, "bootstrap": _bootstrap, "slerp": _slerp}
