"""A population: the vectors of many adapters of one kind, wherever they are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.adapters import Adapter
from w2w_space.layout import Layout, common_layout
from w2w_space.ranks import RankLoss, at_rank


@runtime_checkable
class Vectors(Protocol):
    """The matrix of a population, a row for each member: in memory, or in files that are read piece by piece."""

    def __len__(self) -> int:
        """Returns the number of members."""
        ...

    def columns(self, span: slice) -> Float[Tensor, "n numbers"]:
        """Returns some numbers of all members, in float32."""
        ...

    def rows(self, members: Sequence[int]) -> Float[Tensor, "b size"]:
        """Returns all numbers of some members, in float32."""
        ...


@dataclass(frozen=True)
class Stacked:
    """Vectors in memory.

    Attributes:
        matrix: One row per member.
    """

    matrix: Float[Tensor, "n size"]

    def __len__(self) -> int:
        return len(self.matrix)

    def columns(self, span: slice) -> Float[Tensor, "n numbers"]:
        """Returns some numbers of all members, in float32."""
        return self.matrix[:, span].float()

    def rows(self, members: Sequence[int]) -> Float[Tensor, "b size"]:
        """Returns all numbers of some members, in float32."""
        return self.matrix[torch.as_tensor(list(members), dtype=torch.long)].float()


@dataclass(frozen=True)
class Population:
    """Many adapters of one base model and one kind of subject, as vectors of one layout.

    Attributes:
        layout: Table of the vectors.
        names: Name of each member.
        vectors: The vectors, with the factors as they were read.
    """

    layout: Layout
    names: tuple[str, ...]
    vectors: Vectors

    def __post_init__(self) -> None:
        if len(self.names) != len(self.vectors):
            raise ValueError(f"there are {len(self.names)} `names` and {len(self.vectors)} `vectors`; give as many")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two members are called {twice!r}; give each a name of its own")

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, members: Sequence[int]) -> "Population":
        """Returns some of the members, in memory.

        Args:
            members: Places of the members.
        """
        return Population(self.layout, tuple(self.names[i] for i in members), Stacked(self.vectors.rows(members)))

    @classmethod
    def of(cls, adapters: Sequence[Adapter], *, rank: int | None = None) -> "tuple[Population, list[RankLoss]]":
        """Returns the population of adapters in memory, brought to one rank, and what each lost by that.

        Args:
            adapters: Adapters of one base model, with names of their own; modules that not all of them change are left
                out.
            rank: Rank of all; by default the commonest rank of the modules.

        Raises:
            IncompatibleModelError: No module is changed by all, or shapes differ.
            ValueError: Two adapters have the same name.
        """
        rank = rank or commonest_rank(adapters)
        layout = common_layout(adapters, rank)
        rows, losses = [], []
        for adapter in adapters:
            vector, loss = vector_of(adapter, layout)
            rows.append(vector)
            losses.append(loss)
        return cls(layout, tuple(adapter.name for adapter in adapters), Stacked(torch.stack(rows))), losses


def commonest_rank(adapters: Sequence[Adapter]) -> int:
    """Returns the rank that the most modules of the adapters have, the smaller one where two are as common.

    Args:
        adapters: At least one adapter.
    """
    ranks = [change.rank for adapter in adapters for change in adapter.modules.values()]
    return max(sorted(set(ranks)), key=ranks.count)


def vector_of(adapter: Adapter, layout: Layout) -> tuple[Float[Tensor, " size"], RankLoss]:
    """Returns the vector of an adapter of any rank, and what it lost; modules that the layout lacks are left out.

    Args:
        adapter: Adapter of the same base model.
        layout: Table of the vector.
    """
    changes, lost, total = {}, 0.0, 0.0
    for name in layout.modules:
        if name in adapter.modules:
            changes[name], loss = at_rank(adapter.modules[name], layout.rank)
            lost, total = lost + loss.lost, total + loss.total
    kept = Adapter(changes, backbone=adapter.backbone, name=adapter.name)
    return layout.vector(kept), RankLoss(lost, total)
