"""How a space grows better with its population: the paper's figures 9, 10, 28 and 30, for any population.

Spaces are fitted to nested random parts of the population, and judged by members that none of them has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from diffcore.errors import UserError
from w2w_space.directions import find_directions
from w2w_space.gauge import GaugeKind
from w2w_space.labels import Labels
from w2w_space.population import Population
from w2w_space.space import FEWEST, WeightSpace


@dataclass(frozen=True, eq=False)
class Scale:
    """What spaces of one size are worth, over several random parts of the population.

    Attributes:
        members: Number of members that the spaces were fitted to.
        components: Number of components of the spaces.
        r2: Coefficient of determination of each attribute's values of held-out members, a row for each part; a linear
            map reads them from the coordinates.
        cosines: Mean absolute cosine of each pair of attributes' directions, one number for each part; NaN where there
            are too few members, or a single attribute.
    """

    members: int
    components: int
    r2: Float64[Tensor, "parts attributes"]
    cosines: Float64[Tensor, " parts"]


def scaling(
    population: Population,
    labels: Labels,
    sizes: Sequence[int],
    *,
    held_out: int | None = None,
    num_components: int = 20,
    parts: int = 3,
    gauge: GaugeKind = "canonical",
    seed: int = 0,
) -> list[Scale]:
    """Returns what spaces of several numbers of members are worth.

    Args:
        population: All members, of which parts are taken.
        labels: Values of attributes in the order of the members; members with blanks are left out.
        sizes: Numbers of members to fit spaces to.
        held_out: Number of members that judge and are in no space; by default a fifth of all.
        num_components: Largest number of components; small spaces take half as many as members.
        parts: Number of random parts of each size.
        gauge: Gauge of the vectors, as `WeightSpace.build` takes it.
        seed: Seed of the order in which members are taken.

    Raises:
        UserError: A size is below 3, or larger than what is left of the population.

    Example:
        >>> from w2w_space.styles import load_styles
        >>> population, styles = load_styles()
        >>> labels = Labels(("ink", "background", "slant", "thickness", "shift"), styles.double())
        >>> small, large = scaling(population, labels, [16, 128], parts=1)
        >>> bool(small.r2.mean() < large.r2.mean() - 0.2)
        True
    """
    known = labels.known(range(len(labels.attributes))).nonzero()[:, 0]
    away = max(1, len(known) // 5) if held_out is None else held_out
    for size in sizes:
        if not FEWEST <= size <= len(known) - away:
            raise UserError(
                f"a space of {size} members was asked for; {len(known) - away} of {len(known)} members with all labels "
                f"are left beside the {away} that judge, and a space needs {FEWEST}"
            )
    found = {size: (list[Tensor](), list[float]()) for size in sizes}
    components = {size: max(1, min(num_components, size // 2)) for size in sizes}
    for part in range(parts):
        order = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed + part))]
        judges, rest = order[:away], order[away:]
        vectors, truth = population.vectors.rows(judges.tolist()), labels.values[judges]
        for size in sizes:
            chosen = rest[:size]
            space = WeightSpace.build(population.subset(chosen.tolist()), gauge=gauge, num_components=components[size])
            own = Labels(labels.attributes, labels.values[chosen])
            r2, cosines = found[size]
            r2.append(told(space.members, own.values, space.coordinates(vectors), truth))
            cosines.append(_cosine(space, own))
    return [
        Scale(size, components[size], torch.stack(r2), torch.tensor(cosines, dtype=torch.float64))
        for size, (r2, cosines) in found.items()
    ]


def told(z: Tensor, values: Tensor, held_out_z: Tensor, held_out_values: Tensor) -> Float64[Tensor, " attributes"]:
    """Returns R^2 of held-out values, read from coordinates by least squares with an intercept.

    Args:
        z: Coordinates of the members of the fit.
        values: Their values, a column for each attribute.
        held_out_z: Coordinates of members that judge.
        held_out_values: Values of the members that judge.
    """
    known, asked = (torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1) for x in (z, held_out_z))
    read = asked @ torch.linalg.lstsq(known, values.double()).solution
    truth = held_out_values.double()
    spread = (truth - truth.mean(0)).square().sum(0)
    return torch.where(spread > 0, 1 - (read - truth).square().sum(0) / spread, torch.nan)


def sizes_of(words: Sequence[str], available: int) -> list[int]:
    """Returns numbers of members from words such as 16, 32 and all, in rising order.

    Args:
        words: Numbers of members, or "all".
        available: Number that "all" stands for.

    Raises:
        UserError: A word is neither a number nor "all".

    Example:
        >>> sizes_of(["16", "all", "64"], 100)
        [16, 64, 100]
    """
    found = set[int]()
    for word in words:
        if word != "all" and not (word.isascii() and word.isdigit()):
            raise UserError(f"{word!r} is no number of members; give numbers such as 16, or all")
        found.add(available if word == "all" else int(word))
    return sorted(found)


def _cosine(space: WeightSpace, labels: Labels) -> float:
    """Returns the mean absolute cosine of all pairs of directions; NaN where there are too few members for them."""
    if len(labels.attributes) < 2:
        return float("nan")
    try:
        found = find_directions(space, labels, estimator="mean", folds=2)
    except UserError:
        return float("nan")
    cosines = found.cosines().abs()
    places: Int[Tensor, "2 pairs"] = torch.triu_indices(len(cosines), len(cosines), 1)
    return float(cosines[places[0], places[1]].mean())
