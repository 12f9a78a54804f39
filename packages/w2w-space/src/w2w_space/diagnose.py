"""What a space is worth: held-out coordinates, shrinkage, and how many components are more than chance.

A member's own training noise lies inside the components that it was fitted with, so members say nothing about adapters
that come later. Each member is therefore projected onto the components of the others. All
of it follows from the inner products K of the members, with J = I - 1 1^T / n for centring:

    J K_TT J = E L E^T                     the space of the members T that remain
    w = E L^-1 E^T J (k_h - K_TT 1/n)      the projection of member h, as a combination of the centred members T
    z_h = mean(z_T) + w . (z_T - mean(z_T))    the same point in the coordinates of the whole space
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.errors import UserError
from w2w_space.coordinates import S, Space
from w2w_space.population import Population
from w2w_space.solve import gram
from w2w_space.space import Point, WeightSpace

_FEW = 20  # members, below which chance cannot be told
_LOOKED_AT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Shrinkage:
    """How long held-out coordinates are, relative to those of members.

    Attributes:
        components: Numbers of components that were looked at.
        ratios: Root mean square of the held-out coordinates for each number of components; that of members is 1.
    """

    components: tuple[int, ...]
    ratios: tuple[float, ...]


def cross_fitted(space: S, *, num_components: int | None = None, folds: int = 5) -> tuple[S, Shrinkage]:
    """Returns the space of the first components with held-out coordinates of its members, and their shrinkage.

    Args:
        space: Space with its members and all components that they span; fewer would hide the members' own noise.
        num_components: Number of components of the result; by default all.
        folds: Number of parts of the members that are left out in turn.

    Raises:
        UserError: The space lacks members or components, or there are fewer members than parts.

    Example:
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (20, 20)}, rank=1), torch.Generator().manual_seed(0)
        >>> names = tuple(str(i) for i in range(30))
        >>> space = WeightSpace.build(Population(layout, names, Stacked(torch.randn(30, 40, generator=g))))
        >>> cross_fitted(space, num_components=5)[0].shrinkage < 0.8
        True
    """
    n = len(space.members)
    if not n or float(space.variances.sum()) < 0.999 * space.fit.total_variance:
        raise UserError(
            f"the space has {space.num_components} components of {n} members; build it with all that they span, and "
            "take fewer here"
        )
    if not 2 <= folds <= n:
        raise UserError(f"`folds` is {folds} for {n} members; give 2 to {n}")
    m = num_components or space.num_components
    z = space.members.double()
    inner = (z * space.variances) @ z.T
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    looked = sorted({k for k in (*_LOOKED_AT, m) if k <= m})
    squares, held_out = torch.zeros(len(looked), dtype=torch.float64), torch.zeros(n, m, dtype=torch.float64)
    for fold in range(folds):
        left, kept = order[fold::folds], torch.ones(n, dtype=torch.bool)
        kept[left] = False
        own = inner[kept][:, kept]
        apart = inner[left][:, kept] - own.mean(0)
        values, vectors = torch.linalg.eigh(own - own.mean(0) - own.mean(1, keepdim=True) + own.mean())
        values, vectors = values.flip(0), vectors.flip(1)
        count = int((values > 1e-10 * values[0]).sum())
        values, vectors = values[:count], vectors[:, :count]
        # Coefficients in the space of the others, and in its standard deviations.
        along = (apart - apart.mean(1, keepdim=True)) @ vectors / values.sqrt()
        scaled = along / (values / (int(kept.sum()) - 1)).sqrt()
        squares += torch.stack([scaled[:, :k].square().mean(1).sum() for k in looked])
        weights = along[:, :m] / values[:m].sqrt() @ vectors[:, :m].T
        members = z[kept, :m]
        held_out[left] = members.mean(0) + weights @ (members - members.mean(0))
    shrinkage = Shrinkage(tuple(looked), tuple((squares / n).sqrt().tolist()))
    return replace(space.truncated(m), held_out=held_out.float(), shrinkage=shrinkage.ratios[-1]), shrinkage


def real_components(
    population: Population, space: WeightSpace, *, permutations: int = 5, seed: int = 0
) -> tuple[int, Float64[Tensor, " n"]]:
    """Returns how many leading components vary more than chance, and the largest variances of chance (Horn 1965).

    Every number is permuted among the members, which keeps its distribution and destroys what it has in common with
    others. A component is real while its variance exceeds the largest that permuted data have at its place.

    Args:
        population: Population that the space was built from.
        space: Space of that population.
        permutations: Number of permuted copies.
        seed: Seed of the permutations.
    """
    n, layout = len(population), population.layout
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(permutations, n, n, dtype=torch.float64)
    for modules in layout.blocks():
        span = layout.span(modules)
        block = space.gauge.of_modules(population.vectors.columns(span), modules)
        block = (block - space.mean[span]) / space.scale[span]
        for total in totals:
            order = torch.rand(n, span.stop - span.start, generator=generator).argsort(0)
            total += gram([block.gather(0, order)], n)
    limits = torch.linalg.eigvalsh(totals).flip(1).clamp(min=0).amax(0) / (n - 1)
    above = space.variances > limits[: space.num_components]
    return int(above.long().cumprod(0).sum()), limits


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """A space of as many components as there is reason for, and what speaks for that number.

    Attributes:
        space: Space of these components, with held-out coordinates and shrinkage.
        real: Number of components that vary more than chance.
        limits: Largest variance of chance at each place.
        variances: Variances of all components that the members span.
        shrinkage: Length of held-out coordinates by number of components.
    """

    space: WeightSpace
    real: int
    limits: Float64[Tensor, " n"]
    variances: Float64[Tensor, " _"]
    shrinkage: Shrinkage


def diagnosed(population: Population, space: WeightSpace, *, num_components: int | None = None) -> Diagnosis:
    """Returns a space cut to the components that are more than chance.

    With as many components as members, all members are equally far from one another, directions follow the members'
    noise, and every draw looks like a copy. Of fewer than 20 members all components are kept.

    Args:
        population: Population that the space was built from.
        space: Space with all components that its members span.
        num_components: Number of components to keep instead; as many as there are, where it is larger.

    Example:
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Stacked
        >>> layout, g = Layout.of({"to_q": (20, 20)}, rank=1), torch.Generator().manual_seed(0)
        >>> matrix = 3 * torch.randn(40, 2, generator=g) @ torch.randn(2, 40, generator=g)
        >>> names = tuple(str(i) for i in range(40))
        >>> population = Population(layout, names, Stacked(matrix + torch.randn(40, 40, generator=g)))
        >>> diagnosed(population, WeightSpace.build(population, gauge="raw")).space.num_components
        2
    """
    real, limits = real_components(population, space)
    few = len(population) < _FEW
    count = min(num_components or (space.num_components if few else max(real, 1)), space.num_components)
    kept, shrinkage = cross_fitted(space, num_components=count, folds=min(5, len(space.members)))
    return Diagnosis(kept, real, limits, space.variances, shrinkage)


def nearest_members(
    space: Space, z: Float[Tensor, "b m"]
) -> tuple[Sequence[str], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Returns the member that is nearest to each point, its distance in standard deviations, and its cosine.

    Args:
        space: Space with its members.
        z: Coordinates of the points.

    Raises:
        UserError: The space was written without its members.
    """
    _require_members(space)
    place = torch.cdist(z.float(), space.members.float()).argmin(1)
    nearest = space.members[place].float()
    # Distances of many pairs come from a matrix product, which leaves a point some way from itself.
    distance, cosine = (z.float() - nearest).norm(dim=1), torch.nn.functional.cosine_similarity(z.float(), nearest)
    return [space.names[i] for i in place.tolist()], distance, cosine


def members_by_distance(point: Point) -> list[tuple[str, float]]:
    """Returns all members with their distance to a point in standard deviations, the nearest first.

    Args:
        point: Point of a space with its members.

    Raises:
        UserError: The space was written without its members.
    """
    _require_members(point.space)
    distances, places = (point.space.members.float() - point.z.float()).norm(dim=1).sort()
    return [(point.space.names[i], d) for i, d in zip(places.tolist(), distances.tolist(), strict=True)]


def _require_members(space: Space) -> None:
    if not len(space.members):
        raise UserError("the space was written without its members; nearest ones cannot be told")


def nearest_among_members(space: Space) -> Float[Tensor, " n"]:
    """Returns the distance of each member to the member that is nearest to it, in standard deviations.

    Args:
        space: Space with its members.
    """
    apart = torch.cdist(space.members.float(), space.members.float())
    return apart.fill_diagonal_(math.inf).min(1).values
