"""Mapping a function over items in small units of work, which can be stored, resumed and shared.

The other rows of a batch change the last bits of a row's result. So a unit is a fixed slice of the distinct items,
never the rest after resuming: the same items share their batches on any number of processes and after any interruption.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

T = TypeVar("T", bound=Hashable)


@runtime_checkable
class Storable(Protocol):
    """A result that can be written as plain values and read again."""

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain values."""
        ...

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Storable":
        """Returns the result that `to_json` wrote."""
        ...


R = TypeVar("R", bound=Storable | Tensor)


@runtime_checkable
class Map(Protocol):
    """A map over items: the plain loop `each_unit`, or `diffcore.run.RunMap`, which resumes and shares."""

    def __call__(
        self, work: Callable[[list[T]], list[R]], items: Sequence[T], *, name: str, kind: type[R], unit_size: int = 1
    ) -> list[R]:
        """Returns one result per item, in order.

        Args:
            work: Computes the results of a unit, one for each of its items.
            items: Items that can be hashed, such as prompts; those given twice are computed once.
            name: Word for this kind of work and for all settings that its results depend on besides the items.
            kind: Class of the results: tensors, or a class with `to_json` and `from_json`.
            unit_size: Number of items that are computed, and kept, together.
        """
        ...


def each_unit(
    work: Callable[[list[T]], list[R]], items: Sequence[T], *, name: str, kind: type[R], unit_size: int = 1
) -> list[R]:
    """Returns one result per item, unit after unit, and keeps nothing: the plain `Map`.

    Args:
        work: Computes the results of a unit, one for each of its items.
        items: Items that can be hashed; those given twice are computed once.
        name: Ignored here; maps that store results name them by it.
        kind: Ignored here; maps that store results read them as this class.
        unit_size: Number of items that are computed together.

    Example:
        >>> import torch
        >>> def squares(unit: list[int]) -> list[torch.Tensor]:
        ...     return [torch.tensor(n * n) for n in unit]
        >>> [int(square) for square in each_unit(squares, [2, 3, 2], name="squares", kind=torch.Tensor)]
        [4, 9, 4]
    """
    return in_order(items, [(unit, work(unit)) for unit in units_of(items, unit_size)])


def units_of(items: Sequence[T], unit_size: int) -> Iterator[list[T]]:
    """Yields the distinct items in fixed slices.

    Raises:
        TypeError: The items are one string, not a list of them.
        ValueError: The size is below 1.
    """
    if isinstance(items, str):
        raise TypeError("the items are one string; pass a list of them")
    if unit_size < 1:
        raise ValueError(f"`unit_size` is {unit_size}; give at least 1")
    distinct = list(dict.fromkeys(items))
    return (distinct[start : start + unit_size] for start in range(0, len(distinct), unit_size))


def in_order(items: Sequence[T], done: Sequence[tuple[list[T], list[R]]]) -> list[R]:
    """Returns the results of finished units in the order of the items, of those given twice too."""
    by_item = {item: result for unit, results in done for item, result in zip(unit, results, strict=True)}
    return [by_item[item] for item in items]
