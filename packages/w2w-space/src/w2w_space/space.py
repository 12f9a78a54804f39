"""The linear space over a population of adapters (paper, section 3.2): mean, scale, and principal components.

With the vectors theta_i of n adapters in one gauge, mu their mean and s their standard deviation, number by number,

    Z = (theta - mu) / s,    Z = U S V^T,    beta = (theta - mu) / s V,    theta = mu + s (V beta).

Coordinates are given in standard deviations, z = beta / sigma, where sigma_k^2 is the variance of the members'
coefficients beta_k: in z the members are a round cloud, and lengths and directions mean the same along every component.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.adapters import Adapter
from diffcore.digests import add_tensors, digest_of_values
from diffcore.errors import IncompatibleModelError, UserError
from diffcore.units import Map, each_unit
from w2w_space import gauge as gauges
from w2w_space.coordinates import Alignment, Fit, Point, Scaling, Space, about
from w2w_space.gauge import Gauge, GaugeKind
from w2w_space.layout import Layout
from w2w_space.population import Population, vector_of
from w2w_space.products import relative_distance
from w2w_space.solve import Solver, best_solver, gram, leading, leading_iteratively, signed, sum_of

__all__ = ["FEWEST", "Alignment", "Fit", "Point", "Scaling", "WeightSpace", "about"]

Part = tuple[range, ...]
_AT_ONCE = 2**26  # numbers of all members together that are read at a time
FEWEST = 3
"""Fewest members that span a space."""


def require_enough(count: int) -> None:
    """Refuses a population that is too small for a space.

    Args:
        count: Number of adapters in the population.

    Raises:
        UserError: There are fewer than three.
    """
    if count < FEWEST:
        told = "there is 1 adapter" if count == 1 else f"there are {count} adapters"
        raise UserError(f"{told}; a space needs at least {FEWEST}, and hundreds to be of use")


@dataclass(frozen=True, eq=False)
class WeightSpace(Space):
    """The space of the paper, linear in the factors of the changes; see `Space` for what it shares with others.

    Attributes:
        gauge: Rule that makes vectors comparable, with the layout.
        mean: Mean of the members' vectors.
        scale: Divisor of deviations from the mean, number by number.
        components: Principal components, orthonormal rows, largest variance first.
    """

    gauge: Gauge
    mean: Float[Tensor, " size"]
    scale: Float[Tensor, " size"]
    components: Float[Tensor, "m size"]

    @classmethod
    def build(
        cls,
        population: Population,
        *,
        gauge: GaugeKind = "canonical",
        scaling: Scaling = "standard",
        like: "WeightSpace | None" = None,
        num_components: int | None = None,
        solver: Solver | None = None,
        block_size: int | None = None,
        parts: int = 1,
        map: Map = each_unit,
    ) -> "WeightSpace":
        """Returns the space of a population, from a few passes over its vectors, which are never held as a whole.

        Args:
            population: At least three adapters.
            gauge: "canonical" removes the freedom of the factors; "raw" takes vectors as they are (published code).
            scaling: "standard" divides each number by its standard deviation (paper), "module" each module by the root
                of its mean variance, "none" nothing.
            like: Earlier space of fewer members, whose gauge and scale are kept instead, so that new members do not
                move the vectors of the old ones; mean and components are those of all members.
            num_components: Largest number of components; by default all that the members span.
            solver: "gram" holds the inner products of all pairs of members, "covariance" those of all pairs of numbers,
                "iterative" neither; by default the smaller table, if it has at most 20 000 rows, else "iterative".
            block_size: Numbers per vector that are read at a time; by default at most 8192, fewer of many members.
            parts: Number of parts of the columns that `map` may keep or share among processes.
            map: Goes through the parts; see `diffcore.units.Map`.

        Raises:
            UserError: There are fewer than three members, all members are equal, or values are not finite.
            IncompatibleModelError: The earlier space has another layout.

        Example:
            >>> layout = Layout.of({"to_q": (4, 3)}, rank=1)
            >>> matrix = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
            >>> names = tuple(f"member {i}" for i in range(10))
            >>> from w2w_space.population import Stacked
            >>> space = WeightSpace.build(Population(layout, names, Stacked(matrix)), num_components=3)
            >>> tuple(space.components.shape), tuple(space.members.shape)
            ((3, 7), (10, 3))
        """
        n, layout = len(population), population.layout
        require_enough(n)
        count = n - 1 if num_components is None else min(num_components, n - 1)
        if count < 1:
            raise UserError(f"`num_components` is {num_components}; give at least 1")
        if like is not None and like.layout != layout:
            raise IncompatibleModelError("the space `like` has another layout than the population; fit a space anew")
        gauge, scaling = (gauge, scaling) if like is None else (like.gauge.kind, like.fit.scaling)
        solver = solver or best_solver(n, layout.size)
        block_size = block_size or min(8192, max(_AT_ONCE // n, 1))
        columns = _Columns(
            population,
            gauge,
            scaling,
            solver == "gram",
            like,
            torch.zeros(layout.size),
            torch.zeros(layout.size),
            torch.ones(layout.size),
        )
        shared = _parts(layout.blocks(block_size), parts)
        word = f"space {gauge} {scaling} {count} {block_size} {like.fingerprint[:16] if like else ''}"
        first = map(lambda unit: [columns.first(part) for part in unit], shared, name=f"{word} first", kind=Tensor)
        inner, facts = zip(*(columns.take(*pair) for pair in zip(shared, first, strict=True)), strict=True)
        if solver == "covariance":
            values, found, vectors = _by_rows(columns, count, parts, word, map)
        else:
            values, found, vectors = _by_columns(columns, sum_of(inner), shared, count, f"{word} {solver}", map)
        found, signs = signed(found)
        return cls(
            Gauge(layout, columns.reference, gauge),
            columns.mean,
            columns.scale,
            found,
            variances=values / (n - 1),
            fit=Fit(
                solver,
                scaling,
                sum(part.variance for part in facts),
                sum(part.constant for part in facts),
                float(columns.scale.max() / columns.scale.min()),
                tuple(row for part in facts for row in part.alignment),
            ),
            names=population.names,
            members=(vectors * signs.double() * math.sqrt(n - 1)).float(),
        )

    @property
    def layout(self) -> Layout:
        """Table of the vectors."""
        return self.gauge.layout

    @property
    def kind(self) -> Literal["canonical", "raw", "product"]:
        """What the space is linear in: factors in the canonical gauge, or as they are."""
        return self.gauge.kind

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what gives coordinates their meaning: points and directions of another space are refused by it."""
        # Half precision is what files keep of the components, and its sums are exact, on any machine.
        told = {"components": self.components.half().double().sum(1), "variances": self.variances}
        told |= {"mean": self.mean, "scale": self.scale, "reference": self.gauge.reference}
        digest = hashlib.sha256(digest_of_values([self.layout.to_json(), self.gauge.kind]).encode())
        add_tensors(digest, told)
        return digest.hexdigest()

    def _first(self, num_components: int) -> dict[str, Tensor]:
        return {"components": self.components[:num_components]}

    def vectors(self, z: Float[Tensor, "*b m"]) -> Float[Tensor, "*b size"]:
        """Returns the vectors of points: mu + s (V beta).

        Args:
            z: Coordinates in standard deviations.
        """
        return self.mean + self.scale * ((z.to(self.mean) * self.sigma) @ self.components)

    def coordinates(self, vectors: Float[Tensor, "b size"]) -> Float[Tensor, "b m"]:
        """Returns the coordinates z of the projections of vectors.

        Args:
            vectors: Vectors of adapters, in any gauge.
        """
        return (((self.gauge(vectors) - self.mean) / self.scale) @ self.components.T) / self.sigma

    def projected(self, adapter: Adapter) -> tuple[Float[Tensor, " m"], float]:
        """Returns the coordinates of the point that is nearest to an adapter, and the residual; see `project`.

        Args:
            adapter: Adapter of the same base model and layers, of any rank and with whatever factors.
        """
        vector = self.gauge(vector_of(adapter, self.layout)[0][None])
        z = self.coordinates(vector)[0]
        return z, relative_distance(self.layout, vector[0], self.vectors(z))


def of_factors(space: Space) -> WeightSpace:
    """Returns a space as what it is, where it is one of factors.

    Args:
        space: Space of any kind.

    Raises:
        UserError: The space is linear in products, where this has no meaning.
    """
    if not isinstance(space, WeightSpace):
        raise UserError("the space is one of products; this needs one of factors, as `WeightSpace.build` makes")
    return space


@dataclass
class _Columns:
    """The columns of Z, block by block: the first pass finds gauge, mean and scale on the way, later ones take them.

    A part is a tuple of blocks, a block a range of modules.
    """

    population: Population
    gauge: GaugeKind
    scaling: Scaling
    inner: bool
    like: WeightSpace | None
    reference: Tensor
    mean: Tensor
    scale: Tensor

    def first(self, part: Part) -> Float64[Tensor, " _"]:
        """Returns what the first pass finds in a part, in one vector that `take` reads.

        Args:
            part: Blocks of the part.
        """
        n = len(self.population)
        inner, found = torch.zeros(self._sides, dtype=torch.float64), []
        for modules in part:
            block, reference, facts = self._gauged(modules, find=True)
            mean = block.mean(0)
            block -= mean
            # Once more, since values far from zero lose the digits of a small deviation in their first mean.
            rest = block.mean(0)
            block -= rest
            mean = mean.double() + rest.double()
            variances = (block * block).sum(0).double() / (n - 1)
            # Numbers that never move have rounding errors for a deviation, and are left as they are.
            still = variances <= (1e-7 * mean).square()
            scale = self._scales(variances, modules).masked_fill(still, 1.0).float().double()
            if self.like is not None:
                scale = self.like.scale[self.population.layout.span(modules)].double()
            if self.inner:
                inner += gram([block.div_(scale.float())], n)
            kept = (variances / scale.square()).masked_fill(still, 0.0)
            found += [reference.double(), mean, scale, kept, still.double(), facts.double().flatten()]
        return torch.cat([inner.flatten(), *found])

    @property
    def _sides(self) -> tuple[int, int]:
        n = len(self.population) if self.inner else 0
        return n, n

    def take(self, part: Part, flat: Float64[Tensor, " _"]) -> tuple[Float64[Tensor, "n n"], "_Facts"]:
        """Keeps gauge, mean and scale of a part, and returns its inner products (0 x 0 without) and what is told of it.

        Args:
            part: Blocks of the part.
            flat: Vector that `first` returned.
        """
        layout, held = self.population.layout, math.prod(self._sides)
        inner, rest = flat.split([held, len(flat) - held])
        variance, constant, alignment = 0.0, 0, list[Alignment]()
        for modules in part:
            span = layout.span(modules)
            size = span.stop - span.start
            *vectors, facts, rest = rest.split([size] * 5 + [3 * len(modules), len(rest) - 5 * size - 3 * len(modules)])
            self.reference[span], self.mean[span], self.scale[span] = (vector.float() for vector in vectors[:3])
            variance, constant = variance + float(vectors[3].sum()), constant + int(vectors[4].sum())
            for place, (flipped, ties, zero) in zip(modules, facts.view(-1, 3).tolist(), strict=True):
                alignment.append(Alignment(layout.modules[place], flipped, int(ties), int(zero)))
        return inner.view(self._sides), _Facts(variance, constant, alignment if self.gauge == "canonical" else [])

    def again(self, part: Part) -> Iterator[Tensor]:
        """Yields the blocks of a part once gauge, mean and scale are known.

        Args:
            part: Blocks of the part.
        """
        for modules in part:
            span = self.population.layout.span(modules)
            yield self._gauged(modules, find=False)[0].sub_(self.mean[span]).div_(self.scale[span])

    def rows(self, part: range) -> Iterator[Float[Tensor, "b size"]]:
        """Yields rows of Z, a few members at a time, once gauge, mean and scale are known.

        Args:
            part: Places of members that follow one another.
        """
        layout, at_once = self.population.layout, min(8192, max(_AT_ONCE // self.population.layout.size, 1))
        rule = Gauge(layout, self.reference, self.gauge)
        for start in range(part.start, part.stop, at_once):
            block = self.population.vectors.rows(range(start, min(start + at_once, part.stop)))
            yield rule(block).sub(self.mean).div_(self.scale)

    def _scales(self, variances: Tensor, modules: range) -> Tensor:
        if self.scaling == "none":
            return torch.ones_like(variances)
        if self.scaling == "standard":
            return variances.sqrt()
        layout, start = self.population.layout, self.population.layout.spans[modules[0]].start
        spans = [layout.spans[place] for place in modules]
        parts = [variances[span.start - start : span.stop - start] for span in spans]
        return torch.cat([part.mean().sqrt().expand(len(part)) for part in parts])

    def _gauged(self, modules: range, *, find: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the vectors of some modules in the gauge, its reference, and for each module what it found."""
        layout, span = self.population.layout, self.population.layout.span(modules)
        block = self.population.vectors.columns(span).clone()
        if find and not bool(block.sum().isfinite()):
            row = int((~block.isfinite()).any(1).nonzero()[0])
            raise UserError(f"the vector of {self.population.names[row]!r} has values that are NaN or infinite")
        facts = torch.zeros(len(modules), 3)
        if self.gauge == "raw":
            return block, torch.zeros(block.shape[1]), facts
        if not find:
            return Gauge(layout, self.reference).of_modules(block, modules), self.reference[span], facts
        parts, references = [], []
        for number, place in enumerate(modules):
            own = slice(layout.spans[place].start - span.start, layout.spans[place].stop - span.start)
            joint = gauges.balanced(layout, block[:, own], place)
            if self.like is None:
                reference = gauges.find_reference(joint)
            else:
                kept = self.like.gauge.reference[None, layout.spans[place]]
                reference = gauges.joined(layout, kept, place)[0]
            turns = gauges.rotations(joint, reference)
            parts.append(gauges.apart(layout, gauges.turned(joint, turns.matrices), place))
            references.append(gauges.apart(layout, reference[None], place)[0])
            facts[number] = torch.tensor([_flipped(turns), float(turns.ties.sum()), float(turns.zero.sum())])
        return torch.cat(parts, 1), torch.cat(references), facts


def _by_columns(
    columns: _Columns, inner: Tensor, shared: list[Part], count: int, word: str, map: Map
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eigenvalues, components and the members' scores of length 1, from inner products of members."""
    if columns.inner:
        values, vectors = leading(inner, count)
    else:

        def multiplied(basis: Tensor) -> Tensor:
            small = basis.float()

            def work(unit: list[Part]) -> list[Tensor]:
                return [sum_of(z @ (z.T @ small) for z in columns.again(part)) for part in unit]

            found = map(work, shared, name=f"{word} {digest_of_values(basis.sum(0).tolist())[:16]}", kind=Tensor)
            return sum_of(found)

        values, vectors = leading_iteratively(multiplied, len(columns.population), count)
    _refuse_equal(values)
    weights = (vectors / values.sqrt()).float()

    def directions(unit: list[Part]) -> list[Tensor]:
        return [torch.cat([weights.T @ block for block in columns.again(part)], 1) for part in unit]

    return values, torch.cat(map(directions, shared, name=f"{word} components", kind=Tensor), 1), vectors


def _by_rows(columns: _Columns, count: int, parts: int, word: str, map: Map) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same from inner products of numbers, where there are fewer numbers than members."""
    n = len(columns.population)
    shared = [range(start, min(start + -(-n // parts), n)) for start in range(0, n, -(-n // parts))]

    def products(unit: list[range]) -> list[Tensor]:
        return [sum_of(gram([rows.T], rows.shape[1]) for rows in columns.rows(part)) for part in unit]

    found = map(products, shared, name=f"{word} covariance", kind=Tensor)
    values, components = leading(sum_of(found), count)
    _refuse_equal(values)
    weights = (components / values.sqrt()).float()

    def scores(unit: list[range]) -> list[Tensor]:
        return [torch.cat([rows @ weights for rows in columns.rows(part)]) for part in unit]

    found = map(scores, shared, name=f"{word} scores", kind=Tensor)
    return values, components.float().T.contiguous(), torch.cat(found).double()


def _refuse_equal(values: Tensor) -> None:
    if len(values) == 0:
        raise UserError("all adapters are equal: they span no space")


class _Facts(NamedTuple):
    """What the first pass tells of a part: variance, number of constant coordinates, and the gauge's work."""

    variance: float
    constant: int
    alignment: list[Alignment]


def _parts(blocks: list[range], count: int) -> list[Part]:
    """Returns the blocks in so many parts of about the same number."""
    size = -(-len(blocks) // max(count, 1))
    return [tuple(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def _flipped(turns: gauges.Rotations) -> float:
    """Returns the share of the members on the smaller side of a sign; 0 for higher ranks."""
    live = ~turns.zero
    if turns.matrices.shape[1] > 1:
        return 0.0
    share = float(((turns.matrices[:, 0, 0] < 0) & live).sum()) / max(int(live.sum()), 1)
    return min(share, 1 - share)
