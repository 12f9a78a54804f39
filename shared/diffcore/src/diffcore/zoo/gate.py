"""A promise about a shipped model: a figure, and the bound that it keeps or misses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Gate:
    """One figure of a model.

    Attributes:
        name: The quantity, and how it was measured.
        value: The value that was measured.
        bound: The limit that the value must respect; None for figures that are only reported.
        direction: Whether the figure may not fall below, or not exceed, the bound.
    """

    name: str
    value: float
    bound: float | None = None
    direction: Literal["at least", "at most"] = "at least"

    @property
    def kept(self) -> bool:
        """Whether the promise holds; figures without a bound promise nothing."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.direction == "at least" else self.value <= self.bound

    @property
    def promise(self) -> str:
        """The bound in words; empty without one."""
        return "" if self.bound is None else f"{self.direction} {self.bound:g}"
