"""Weighted set cover with demands: the lightest choice of items that takes enough of them from every group.

It is a set S of least sum_{i in S} w_i with |S ∩ G| >= d_G for every group G. A branch-and-bound search improves on a
greedy choice; where it ends within its budget of nodes, as for a few dozen groups, nothing lighter exists.

References:
    The greedy choice and its bound, the harmonic number of the largest group: Dobson 1982, theorem 1.
"""

from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_NODES = 2_000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Cover(Generic[T]):
    """A choice of items.

    Attributes:
        items: Items that were chosen.
        exact: Whether no lighter choice exists.
    """

    items: frozenset[T]
    exact: bool


def lightest_cover(
    groups: Sequence[AbstractSet[T]], demands: Sequence[int], weights: Mapping[T, float], *, nodes: int = _NODES
) -> Cover[T]:
    """Returns the lightest choice found that has as many items of every group as the group demands.

    Args:
        groups: Sets of items; they may overlap.
        demands: Number of items needed from each group, no more than it has.
        weights: Weight of each item, above 0.
        nodes: Number of branches after which the best choice so far is taken.

    Raises:
        ValueError: A group demands more items than it has, or a weight is not positive.
    """
    for index, (group, demand) in enumerate(zip(groups, demands, strict=True)):
        if demand > len(group):
            raise ValueError(f"group {index} demands {demand} items and has {len(group)}")
    if any(not weights[item] > 0 for group in groups for item in group):
        raise ValueError("weights must be positive")
    search = _Search([frozenset(group) for group in groups], list(demands), dict(weights))
    search.best = search.greedy()
    search.lightest = search.weigh(search.best)
    exact = search.improve(nodes)
    return Cover(search.best, exact)


class _Search(Generic[T]):
    """Depth first, with the best choice so far."""

    def __init__(self, groups: list[frozenset[T]], demands: list[int], weights: dict[T, float]) -> None:
        self.groups, self.demands, self.weights = groups, demands, weights
        self.order = sorted({item for group in groups for item in group}, key=lambda item: (weights[item], repr(item)))
        self.best: frozenset[T] = frozenset()
        self.lightest = float("inf")

    def weigh(self, items: AbstractSet[T]) -> float:
        return sum((self.weights[item] for item in items), 0.0)

    def missing(self, chosen: AbstractSet[T]) -> list[int]:
        """Returns what each group still demands."""
        return [max(demand - len(group & chosen), 0) for group, demand in zip(self.groups, self.demands, strict=True)]

    def greedy(self) -> frozenset[T]:
        """Takes items that serve most groups for their weight, then drops superfluous ones, heaviest first."""
        chosen: set[T] = set()
        while any(missing := self.missing(chosen)):
            open_groups = [group for group, lacking in zip(self.groups, missing, strict=True) if lacking]
            left = [item for item in self.order if item not in chosen]
            chosen.add(max(left, key=lambda item: sum(item in group for group in open_groups) / self.weights[item]))
        for item in sorted(chosen, key=lambda item: -self.weights[item]):
            if not any(self.missing(chosen - {item})):
                chosen.remove(item)
        return frozenset(chosen)

    def improve(self, nodes: int) -> bool:
        """Looks for lighter choices, depth first; returns whether all were looked at, or could not be lighter."""
        stack = [(frozenset[T](), frozenset[T]())]
        for _ in range(nodes):
            if not stack:
                return True
            chosen, refused = stack.pop()
            item = self.branch(chosen, refused)
            if item is not None:
                stack += [(chosen, refused | {item}), (chosen | {item}, refused)]
        return not stack

    def branch(self, chosen: frozenset[T], refused: frozenset[T]) -> T | None:
        """Returns the item to branch on; None where no lighter choice has the chosen and lacks the refused items."""
        missing, weight = self.missing(chosen), self.weigh(chosen)
        if not any(missing):
            if weight < self.lightest - _ROUNDING:
                self.best, self.lightest = chosen, weight
            return None
        serves = [group for group, lacking in zip(self.groups, missing, strict=True) if lacking]
        left = [[item for item in self.order if item in group - chosen - refused] for group in serves]
        lacking = [count for count in missing if count]
        if any(len(items) < count for items, count in zip(left, lacking, strict=True)):
            return None
        # The cost of the dearest group alone bounds the cost of all together.
        least = max(self.weigh(frozenset(items[:count])) for items, count in zip(left, lacking, strict=True))
        if weight + least >= self.lightest - _ROUNDING:
            return None
        tightest = min(left, key=len)
        return max(tightest, key=lambda item: sum(item in group for group in serves) / self.weights[item])
