"""The linear space over a population of adapters (paper, section 3.2): mean, scale, and principal components.

With the vectors theta_i of n adapters in one gauge, mu their mean and s their standard deviation, number by number,

    Z = (theta - mu) / s,    Z = U S V^T,    beta = (theta - mu) / s V,    theta = mu + s (V beta).

Coordinates are given in standard deviations, z = beta / sigma, where sigma_k^2 is the variance of the members'
coefficients beta_k: in z the members are a round cloud, and lengths and directions mean the same along every component.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.adapters import Adapter
from diffcore.digests import add_tensors, digest_of_values
from diffcore.errors import UserError
from diffcore.units import Map, each_unit
from w2w_space import gauge as gauges
from w2w_space.gauge import Gauge, GaugeKind
from w2w_space.layout import Layout
from w2w_space.population import Population, vector_of
from w2w_space.products import relative_distance
from w2w_space.solve import GRAM_UP_TO, Solver, gram, leading, leading_iteratively, signed

Scaling = Literal["standard", "module", "none"]
Part = tuple[range, ...]
FEWEST = 3
"""Fewest members that span a space."""


@dataclass(frozen=True)
class Alignment:
    """What the gauge found in one module of the population.

    Attributes:
        module: Name of the module.
        flipped: Share of the members whose sign was turned, for rank 1: near 0 where the population was anchored by a
            shared initial A, near .5 where a PCA of the factors as they were would have been meaningless.
        ties: Number of members whose sign is undecided.
        zero: Number of members that do not change this module.
    """

    module: str
    flipped: float
    ties: int
    zero: int


@dataclass(frozen=True)
class Fit:
    """How a space was computed.

    Attributes:
        solver: Way to the eigenvectors; "published" for spaces that were read from the authors' files.
        scaling: Divisor of the vectors: each number's standard deviation, its module's, or nothing.
        total_variance: Sum of the variances of all components, those left out included.
        constant: Number of coordinates that are the same in all members.
        scale_ratio: Largest scale divided by the smallest.
        alignment: Work of the gauge in each module; empty for a raw gauge.
    """

    solver: Solver | Literal["published"]
    scaling: Scaling
    total_variance: float
    constant: int
    scale_ratio: float
    alignment: tuple[Alignment, ...] = ()


@dataclass(frozen=True, eq=False)
class WeightSpace:
    """A linear space of adapters; its points are adapters, in coordinates z of standard deviations.

    Attributes:
        gauge: Rule that makes vectors comparable, with the layout.
        mean: Mean of the members' vectors.
        scale: Divisor of deviations from the mean, number by number.
        components: Principal components, orthonormal rows, largest variance first.
        variances: Variance of the members' coefficients along each component.
        fit: How the space was computed.
        names: Names of the members; empty for a space without members.
        members: Coordinates z of the members; empty for a space without members.
        held_out: Coordinates z of the members in spaces that were fitted without them, see `diagnose`; empty where they
            were not computed. New adapters are compared with these, since members' own noise is inside the components.
        shrinkage: Length of the held-out coordinates relative to the members'; 1 where it is not known.
    """

    gauge: Gauge
    mean: Float[Tensor, " size"]
    scale: Float[Tensor, " size"]
    components: Float[Tensor, "m size"]
    variances: Float64[Tensor, " m"]
    fit: Fit
    names: tuple[str, ...] = ()
    members: Float[Tensor, "n _"] = field(default_factory=lambda: torch.empty(0, 0))
    held_out: Float[Tensor, "h _"] = field(default_factory=lambda: torch.empty(0, 0))
    shrinkage: float = 1.0

    @classmethod
    def build(
        cls,
        population: Population,
        *,
        gauge: GaugeKind = "canonical",
        scaling: Scaling = "standard",
        num_components: int | None = None,
        solver: Solver | None = None,
        block_size: int = 8192,
        parts: int = 1,
        map: Map = each_unit,
    ) -> "WeightSpace":
        """Returns the space of a population, from two passes over its vectors.

        Args:
            population: At least three adapters.
            gauge: "canonical" removes the freedom of the factors; "raw" takes vectors as they are (published code).
            scaling: "standard" divides each number by its standard deviation (paper), "module" each module by the root
                of its mean variance, "none" nothing.
            num_components: Largest number of components; by default all that the members span.
            solver: "gram" holds the inner products of all pairs of members, "iterative" does not; by default the first
                up to 20 000 members.
            block_size: Numbers per vector that are read at a time.
            parts: Number of parts of the columns that `map` may keep or share among processes.
            map: Goes through the parts; see `diffcore.units.Map`.

        Raises:
            UserError: There are fewer than three members, all members are equal, or values are not finite.

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
        if n < FEWEST:
            raise UserError(f"there are {n} adapters; a space needs at least {FEWEST}, and hundreds to be of use")
        count = n - 1 if num_components is None else min(num_components, n - 1)
        if count < 1:
            raise UserError(f"`num_components` is {num_components}; give at least 1")
        solver = solver or ("gram" if n <= GRAM_UP_TO else "iterative")
        columns = _Columns(
            population, gauge, scaling, torch.zeros(layout.size), torch.zeros(layout.size), torch.ones(layout.size)
        )
        shared = _parts(layout.blocks(block_size), parts)
        word = f"space {gauge} {scaling} {count} {block_size}"
        first = map(lambda unit: [columns.first(part) for part in unit], shared, name=f"{word} first", kind=Tensor)
        inner, facts = zip(*(columns.take(*pair) for pair in zip(shared, first, strict=True)), strict=True)
        if solver == "gram":
            values, vectors = leading(torch.stack(inner).sum(0), count)
        else:

            def multiplied(basis: Tensor) -> Tensor:
                small = basis.float()

                def work(unit: list[Part]) -> list[Tensor]:
                    return [
                        torch.stack([z @ (z.T @ small) for z in columns.again(part)]).double().sum(0) for part in unit
                    ]

                found = map(work, shared, name=f"{word} {digest_of_values(basis.sum(0).tolist())[:16]}", kind=Tensor)
                return torch.stack(found).sum(0)

            values, vectors = leading_iteratively(multiplied, n, count)
        if len(values) == 0:
            raise UserError("all adapters are equal: they span no space")
        weights = (vectors / values.sqrt()).float()

        def directions(unit: list[Part]) -> list[Tensor]:
            return [torch.cat([weights.T @ block for block in columns.again(part)], 1) for part in unit]

        found, signs = signed(torch.cat(map(directions, shared, name=f"{word} {solver} components", kind=Tensor), 1))
        return cls(
            Gauge(layout, columns.reference, gauge),
            columns.mean,
            columns.scale,
            found,
            values / (n - 1),
            Fit(
                solver,
                scaling,
                sum(part.variance for part in facts),
                sum(part.constant for part in facts),
                float(columns.scale.max() / columns.scale.min()),
                tuple(row for part in facts for row in part.alignment),
            ),
            population.names,
            (vectors * signs.double() * math.sqrt(n - 1)).float(),
        )

    @property
    def layout(self) -> Layout:
        """Table of the vectors."""
        return self.gauge.layout

    @property
    def num_components(self) -> int:
        """Number of components."""
        return len(self.components)

    @cached_property
    def sigma(self) -> Float[Tensor, " m"]:
        """Standard deviation of the members' coefficients along each component."""
        return self.variances.sqrt().float()

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what gives coordinates their meaning: points and directions of another space are refused by it."""
        # Half precision is what files keep of the components, and its sums are exact, on any machine.
        told = {"components": self.components.half().double().sum(1), "variances": self.variances}
        told |= {"mean": self.mean, "scale": self.scale, "reference": self.gauge.reference}
        digest = hashlib.sha256(digest_of_values([self.layout.to_json(), self.gauge.kind]).encode())
        add_tensors(digest, told)
        return digest.hexdigest()

    def truncated(self, num_components: int) -> "WeightSpace":
        """Returns the space of the first components alone.

        Args:
            num_components: Number of components, at least 1 and at most as many as there are.
        """
        if not 1 <= num_components <= self.num_components:
            raise UserError(f"`num_components` is {num_components}; give 1 to {self.num_components}")
        m = num_components
        return replace(self, components=self.components[:m], variances=self.variances[:m], members=self.members[:, :m])

    def without_members(self) -> "WeightSpace":
        """Returns the space without its members' names and coordinates, which reproduce the members."""
        return replace(self, names=(), members=self.members[:0], held_out=self.held_out[:0])

    @property
    def reference(self) -> Float[Tensor, "n m"]:
        """Coordinates that new points are compared with: the held-out members, or else the members."""
        return self.held_out if len(self.held_out) else self.members

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

    def project(self, adapter: Adapter, *, unshrink: bool = False) -> "Point":
        """Returns the point of the space that is nearest to an adapter.

        Args:
            adapter: Adapter of the same base model and layers, of any rank and with whatever factors.
            unshrink: Whether to divide the coordinates by `shrinkage`, at most twice as long: those of an adapter that
                was not in the fit come out too short.

        Raises:
            IncompatibleModelError: The adapter changes none of the modules, or other shapes.
        """
        vector = self.gauge(vector_of(adapter, self.layout)[0][None])
        z = self.coordinates(vector)[0]
        residual = relative_distance(self.layout, vector[0], self.vectors(z))
        return Point(self, z / max(self.shrinkage, 0.5) if unshrink else z, residual)

    def point(self, z: Float[Tensor, " m"] | None = None) -> "Point":
        """Returns a point of the space.

        Args:
            z: Coordinates in standard deviations; by default those of the mean.

        Raises:
            ValueError: There are not as many coordinates as components.
        """
        z = torch.zeros(self.num_components) if z is None else z.float()
        if z.shape != (self.num_components,):
            raise ValueError(f"`z` has shape {tuple(z.shape)}; the space has {self.num_components} components")
        return Point(self, z)

    def member(self, name: str) -> "Point":
        """Returns the point of a member.

        Args:
            name: Name of the member.

        Raises:
            UserError: There is no such member, or the space was written without its members.
        """
        if not self.names:
            raise UserError("the space was written without its members")
        if name not in self.names:
            raise UserError(
                f"the space has no member {name!r}; it has {self.names[0]!r} and {len(self.names) - 1} more"
            )
        return self.point(self.members[self.names.index(name)])


@dataclass(frozen=True, eq=False)
class Point:
    """An adapter of a space.

    Attributes:
        space: Space that the coordinates belong to.
        z: Coordinates in standard deviations.
        residual: For a projected adapter, the Frobenius norm of what the space does not hold of its changes, divided by
            that of the changes; None for points that were not projected.
    """

    space: WeightSpace
    z: Float[Tensor, " m"]
    residual: float | None = None

    @property
    def vector(self) -> Float[Tensor, " size"]:
        """The adapter's vector."""
        return self.space.vectors(self.z)

    @property
    def length(self) -> float:
        """Distance from the mean in standard deviations: the Mahalanobis length of the coefficients."""
        return float(self.z.double().norm())

    def adapter(self, name: str = "point") -> Adapter:
        """Returns the adapter, which `diffcore.adapters.write_adapter` writes as an ordinary LoRA.

        Args:
            name: Name of the adapter in messages.
        """
        return self.space.layout.adapter(self.vector, name)

    def moved(self, by: Float[Tensor, " m"]) -> "Point":
        """Returns the point at another place.

        Args:
            by: Difference of the coordinates z.
        """
        return Point(self.space, self.z + by.to(self.z))

    def __add__(self, other: "Point") -> "Point":
        """Returns the point whose coordinates are the sum, as deviations from the mean."""
        if other.space.fingerprint != self.space.fingerprint:
            raise UserError("the points belong to different spaces, and cannot be added")
        return self.moved(other.z)


@dataclass
class _Columns:
    """The columns of Z, block by block: the first pass finds gauge, mean and scale on the way, later ones take them.

    A part is a tuple of blocks, a block a range of modules.
    """

    population: Population
    gauge: GaugeKind
    scaling: Scaling
    reference: Tensor
    mean: Tensor
    scale: Tensor

    def first(self, part: Part) -> Float64[Tensor, " _"]:
        """Returns what the first pass finds in a part, in one vector that `take` reads.

        Args:
            part: Blocks of the part.
        """
        n = len(self.population)
        inner, found = torch.zeros(n, n, dtype=torch.float64), []
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
            inner += gram([block.div_(scale.float())], n)
            kept = (variances / scale.square()).masked_fill(still, 0.0)
            found += [reference.double(), mean, scale, kept, still.double(), facts.double().flatten()]
        return torch.cat([inner.flatten(), *found])

    def take(self, part: Part, flat: Float64[Tensor, " _"]) -> tuple[Float64[Tensor, "n n"], "_Facts"]:
        """Keeps gauge, mean and scale of a part, and returns its inner products and what is told of it.

        Args:
            part: Blocks of the part.
            flat: Vector that `first` returned.
        """
        n, layout = len(self.population), self.population.layout
        inner, rest = flat.split([n * n, len(flat) - n * n])
        variance, constant, alignment = 0.0, 0, list[Alignment]()
        for modules in part:
            span = layout.span(modules)
            size = span.stop - span.start
            *vectors, facts, rest = rest.split([size] * 5 + [3 * len(modules), len(rest) - 5 * size - 3 * len(modules)])
            self.reference[span], self.mean[span], self.scale[span] = (vector.float() for vector in vectors[:3])
            variance, constant = variance + float(vectors[3].sum()), constant + int(vectors[4].sum())
            for place, (flipped, ties, zero) in zip(modules, facts.view(-1, 3).tolist(), strict=True):
                alignment.append(Alignment(layout.modules[place], flipped, int(ties), int(zero)))
        return inner.view(n, n), _Facts(variance, constant, alignment if self.gauge == "canonical" else [])

    def again(self, part: Part) -> Iterator[Tensor]:
        """Yields the blocks of a part once gauge, mean and scale are known.

        Args:
            part: Blocks of the part.
        """
        for modules in part:
            span = self.population.layout.span(modules)
            yield self._gauged(modules, find=False)[0].sub_(self.mean[span]).div_(self.scale[span])

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
            reference = gauges.find_reference(joint)
            turns = gauges.rotations(joint, reference)
            parts.append(gauges.apart(layout, gauges.turned(joint, turns.matrices), place))
            references.append(gauges.apart(layout, reference[None], place)[0])
            facts[number] = torch.tensor([_flipped(turns), float(turns.ties.sum()), float(turns.zero.sum())])
        return torch.cat(parts, 1), torch.cat(references), facts


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


def about(space: WeightSpace) -> dict[str, Any]:
    """Returns the facts of a space for people: sizes, variance, participation ratio.

    Args:
        space: Space of any population.
    """
    values = space.variances
    return {
        "members": len(space.names),
        "modules": len(space.layout.modules),
        "rank": space.layout.rank,
        "numbers": space.layout.size,
        "components": space.num_components,
        "explained": float(values.sum()) / space.fit.total_variance,
        "participation_ratio": float(values.sum() ** 2 / values.square().sum()),
        "gauge": space.gauge.kind,
        "scaling": space.fit.scaling,
        "solver": space.fit.solver,
        "constant_numbers": space.fit.constant,
        "scale_ratio": space.fit.scale_ratio,
    }
