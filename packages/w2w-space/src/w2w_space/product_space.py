"""A space that is linear in the changes B A themselves, which need no gauge.

With the inner products G of the members' changes, formed from small matrices, and J = I - 1 1^T / n for centring,

    J G J = E L E^T,    z_i = sqrt(n - 1) E_i,    change(z) = sum_i w_i B_i A_i,    w_i = 1/n + z . z_i / (n - 1).

A point is a mixture of all members' changes, of rank n times theirs; its adapter is the nearest one of a given rank.
The space consists of its members' vectors, and cannot be given away without them.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.adapters import Adapter, LowRank
from diffcore.digests import add_tensors, digest_of_values
from diffcore.errors import UserError
from w2w_space.coordinates import Fit, Space
from w2w_space.layout import Layout
from w2w_space.population import Population, vector_of
from w2w_space.products import product_gram
from w2w_space.ranks import RankLoss, at_rank
from w2w_space.solve import leading
from w2w_space.space import require_enough

PRODUCTS_UP_TO = 5000
"""Largest number of members, whose inner products and vectors are held in memory."""
_RANK = 16


@dataclass(frozen=True, eq=False)
class ProductSpace(Space):
    """A space that is linear in the changes; see `Space` for what it shares with others.

    Attributes:
        table: Table of the members' vectors.
        adapters: Vectors of the members, in any gauge.
        centre: Inner product of the mean change with each member's.
        rank: Rank of the adapters that points are written as.
    """

    table: Layout
    adapters: Float[Tensor, "n size"]
    centre: Float64[Tensor, " n"]
    rank: int = _RANK

    @classmethod
    def build(
        cls, population: Population, *, num_components: int | None = None, rank: int | None = None
    ) -> "ProductSpace":
        """Returns the space of a population.

        Args:
            population: At least three adapters, at most 5000.
            num_components: Largest number of components; by default all that the members span.
            rank: Rank of the adapters that points are written as; by default 16, or the members' where it is larger.

        Raises:
            UserError: There are fewer than three members or more than 5000, or all members are equal.

        Example:
            >>> from w2w_space.population import Stacked
            >>> layout = Layout.of({"to_q": (4, 3)}, rank=1)
            >>> matrix = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
            >>> names = tuple(f"member {i}" for i in range(10))
            >>> space = ProductSpace.build(Population(layout, names, Stacked(matrix)), rank=3)
            >>> point = space.member("member 4")
            >>> truth = layout.adapter(matrix[4]).modules["to_q"].delta()
            >>> torch.allclose(point.adapter().modules["to_q"].delta(), truth, atol=1e-4)
            True
        """
        n = len(population)
        require_enough(n)
        if n > PRODUCTS_UP_TO:
            raise UserError(
                f"there are {n} adapters; a space of products holds at most {PRODUCTS_UP_TO}: take the factors' space"
            )
        vectors = population.vectors.rows(range(n))
        bad = ~vectors.isfinite().all(1)
        if bool(bad.any()):
            name = population.names[int(bad.nonzero()[0])]
            raise UserError(f"the vector of {name!r} has values that are NaN or infinite")
        inner = product_gram(population.layout, vectors)
        centre = inner.mean(1)
        centred = inner - centre - centre[:, None] + centre.mean()
        count = n - 1 if num_components is None else min(num_components, n - 1)
        if count < 1:
            raise UserError(f"`num_components` is {num_components}; give at least 1")
        values, found = leading(centred, count)
        if len(values) == 0:
            raise UserError("all adapters are equal: they span no space")
        found = found * torch.where(found.gather(0, found.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        return cls(
            population.layout,
            vectors,
            centre,
            max(_RANK if rank is None else rank, population.layout.rank if rank is None else 1),
            variances=values / (n - 1),
            fit=Fit("gram", "none", float(centred.trace()) / (n - 1), 0, 1.0),
            names=population.names,
            members=(found * (n - 1) ** 0.5).float(),
        )

    @property
    def layout(self) -> Layout:
        """Table of the vectors of points, at the space's rank."""
        return self._table_of_points

    @property
    def kind(self) -> Literal["canonical", "raw", "product"]:
        """What the space is linear in: the changes themselves."""
        return "product"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what gives coordinates their meaning: points and directions of another space are refused by it."""
        told = [self.table.to_json(), self.rank, self.num_components, "product"]
        digest = hashlib.sha256(digest_of_values(told).encode())
        add_tensors(digest, {"adapters": self.adapters, "variances": self.variances})
        return digest.hexdigest()

    def without_members(self) -> "ProductSpace":
        """Refuses: the space consists of its members."""
        raise UserError("a space of products consists of its members' vectors; it cannot be written without them")

    def weights(self, z: Float[Tensor, "*b m"]) -> Float64[Tensor, "*b n"]:
        """Returns the weight of each member's change in the changes of points.

        Args:
            z: Coordinates in standard deviations.
        """
        n = len(self.members)
        return 1 / n + z.double() @ self.members.double().T / (n - 1)

    def adapter(self, z: Float[Tensor, " m"], *, rank: int | None = None) -> tuple[Adapter, RankLoss]:
        """Returns the adapter of a rank that is nearest to a point, and what it lost.

        Args:
            z: Coordinates of the point in standard deviations.
            rank: Rank of the adapter; by default the space's.
        """
        weights, changes, lost, total = self.weights(z), {}, 0.0, 0.0
        factors = self.table.factors(self.adapters.double())
        for (name, (down, up)), shape in zip(factors.items(), self.table.shapes, strict=True):
            inputs = down.shape[-1]
            left = (up * weights[:, None, None]).permute(1, 0, 2).flatten(1)
            right = down.reshape(-1, inputs)
            mixed = LowRank(right.reshape(-1, *shape[1:]), left, float(len(right)))
            changes[name], loss = at_rank(mixed, rank or self.rank)
            lost, total = lost + loss.lost, total + loss.total
        return Adapter(changes, backbone=self.table.backbone, name="point"), RankLoss(lost, total)

    def vectors(self, z: Float[Tensor, "*b m"]) -> Float[Tensor, "*b size"]:
        """Returns the vectors of points, at the space's rank.

        Args:
            z: Coordinates in standard deviations.
        """
        rows = [self.layout.vector(self.adapter(row)[0]) for row in z.reshape(-1, z.shape[-1])]
        return torch.stack(rows).reshape(*z.shape[:-1], -1)

    def coordinates(self, vectors: Float[Tensor, "b size"]) -> Float[Tensor, "b m"]:
        """Returns the coordinates z of the projections of vectors.

        Args:
            vectors: Vectors in the members' table, in any gauge.
        """
        return self._along(product_gram(self.table, vectors, self.adapters)).float()

    def projected(self, adapter: Adapter) -> tuple[Float[Tensor, " m"], float]:
        """Returns the coordinates of the point that is nearest to an adapter, and the residual; see `project`.

        Args:
            adapter: Adapter of the same base model and layers, of any rank and with whatever factors.
        """
        rank = max([self.table.rank, *(change.rank for change in adapter.modules.values())])
        wide = Layout(self.table.modules, self.table.shapes, rank, self.table.backbone)
        vector = vector_of(adapter, wide)[0]
        inner = product_gram(wide, vector[None], self.adapters, self.table)
        z = self._along(inner)[0]
        own = float(product_gram(wide, vector[None]))
        apart = own - 2 * float(inner.mean()) + float(self.centre.mean())  # squared distance from the mean change
        rest = max(apart - float((z.square() * self.variances).sum()), 0.0)
        return z.float(), (rest / own) ** 0.5 if own > 0 else 0.0

    @cached_property
    def _table_of_points(self) -> Layout:
        return Layout(self.table.modules, self.table.shapes, self.rank, self.table.backbone)

    def _along(self, inner: Float64[Tensor, "b n"]) -> Float64[Tensor, "b m"]:
        n = len(self.members)
        return (inner - self.centre) @ self.members.double() / ((n - 1) * self.variances)
