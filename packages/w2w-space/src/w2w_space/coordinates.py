"""What all spaces of adapters have: coordinates in standard deviations, members, and points that are adapters.

A point has coordinates z, in which the members are a round cloud: mean 0 and variance 1 along every component, and no
correlation. Directions, edits and samples need nothing but z. A space says which adapter a point is, and which point is
nearest to an adapter: `WeightSpace` by vectors in one gauge (paper), `ProductSpace` by the changes of the weights.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.adapters import Adapter
from diffcore.errors import UserError
from w2w_space.layout import Layout
from w2w_space.solve import Solver

Scaling = Literal["standard", "module", "none"]
S = TypeVar("S", bound="Space")


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Space(ABC):
    """A space of adapters; its points are adapters, in coordinates z of standard deviations.

    Attributes:
        variances: Variance of the members' coefficients along each component, largest first.
        fit: How the space was computed.
        names: Names of the members; empty for a space without members.
        members: Coordinates z of the members; empty for a space without members.
        held_out: Coordinates z of the members in spaces that were fitted without them, see `diagnose`; empty where they
            were not computed. New adapters are compared with these, since members' own noise is inside the components.
        shrinkage: Length of the held-out coordinates relative to the members'; 1 where it is not known.
    """

    variances: Float64[Tensor, " m"]
    fit: Fit
    names: tuple[str, ...] = ()
    members: Float[Tensor, "n _"] = field(default_factory=lambda: torch.empty(0, 0))
    held_out: Float[Tensor, "h _"] = field(default_factory=lambda: torch.empty(0, 0))
    shrinkage: float = 1.0

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Table of the vectors of points."""

    @property
    @abstractmethod
    def kind(self) -> Literal["canonical", "raw", "product"]:
        """What the space is linear in: factors in the canonical gauge or as they are, or the changes themselves."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of what gives coordinates their meaning: points and directions of another space are refused by it."""

    @abstractmethod
    def vectors(self, z: Float[Tensor, "*b m"]) -> Float[Tensor, "*b size"]:
        """Returns the vectors of points.

        Args:
            z: Coordinates in standard deviations.
        """

    @abstractmethod
    def projected(self, adapter: Adapter) -> tuple[Float[Tensor, " m"], float]:
        """Returns the coordinates of the point that is nearest to an adapter, and the residual; see `project`.

        Args:
            adapter: Adapter of the same base model and layers, of any rank and with whatever factors.
        """

    @property
    def num_components(self) -> int:
        """Number of components."""
        return len(self.variances)

    @cached_property
    def sigma(self) -> Float[Tensor, " m"]:
        """Standard deviation of the members' coefficients along each component."""
        return self.variances.sqrt().float()

    def peers(self, *, projected: bool) -> Float[Tensor, "n m"]:
        """Returns the members' coordinates that those of points can be compared with.

        Args:
            projected: Whether the points are adapters that were not in the fit, as projection gives them. Their
                coordinates are too short, and so are those of held-out members; where these were not computed, and for
                all other points, it is the members' own.
        """
        return self.held_out if projected and len(self.held_out) else self.members

    def truncated(self: S, num_components: int) -> S:
        """Returns the space of the first components alone.

        Args:
            num_components: Number of components, at least 1 and at most as many as there are.
        """
        if not 1 <= num_components <= self.num_components:
            raise UserError(f"`num_components` is {num_components}; give 1 to {self.num_components}")
        m = num_components
        kept = {"members": self.members[:, :m], "held_out": self.held_out[:, :m], **self._first(m)}
        return replace(self, variances=self.variances[:m], **kept)

    def _first(self, num_components: int) -> dict[str, Tensor]:
        """Returns the fields of a space, beyond those of all, that have a row for each component, cut to the first."""
        del num_components
        return {}

    def without_members(self: S) -> S:
        """Returns the space without its members' names and coordinates, which reproduce the members."""
        return replace(self, names=(), members=self.members[:0], held_out=self.held_out[:0])

    def project(self, adapter: Adapter, *, unshrink: bool = False) -> "Point":
        """Returns the point of the space that is nearest to an adapter.

        Args:
            adapter: Adapter of the same base model and layers, of any rank and with whatever factors.
            unshrink: Whether to divide the coordinates by `shrinkage`, at most twice as long: those of an adapter that
                was not in the fit come out too short.

        Raises:
            IncompatibleModelError: The adapter changes none of the modules, or other shapes.
        """
        z, residual = self.projected(adapter)
        return Point(self, z / max(self.shrinkage, 0.5) if unshrink else z, residual, projected=not unshrink)

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
        projected: Whether the coordinates are those of an adapter as projection gives them: too short by `shrinkage`,
            where the adapter was not in the fit.
    """

    space: Space
    z: Float[Tensor, " m"]
    residual: float | None = None
    projected: bool = False

    @property
    def vector(self) -> Float[Tensor, " size"]:
        """The adapter's vector."""
        return self.space.vectors(self.z)

    @property
    def peers(self) -> Float[Tensor, "n m"]:
        """Coordinates of the members that the point's can be compared with; see `Space.peers`."""
        return self.space.peers(projected=self.projected)

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


def about(space: Space) -> dict[str, Any]:
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
        "gauge": space.kind,
        "scaling": space.fit.scaling,
        "solver": space.fit.solver,
        "constant_numbers": space.fit.constant,
        "scale_ratio": space.fit.scale_ratio,
    }
