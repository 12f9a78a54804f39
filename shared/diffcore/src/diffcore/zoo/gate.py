"""A gate: one measured value of a shipped model, and the documented bound that it keeps or misses."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Gate:
    """One measured value of a model, with its bound.

    Attributes:
        name: The quantity, and how it was measured.
        value: The value that was measured.
        bound: The limit that the value must respect; None for figures that are only reported.
        direction: Whether the value must be at least, or at most, the bound.
    """

    name: str
    value: float
    bound: float | None = None
    direction: Literal["at least", "at most"] = "at least"

    @property
    def kept(self) -> bool:
        """Whether the value respects its bound; True without a bound."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.direction == "at least" else self.value <= self.bound

    @property
    def promise(self) -> str:
        """The bound in words; empty without one."""
        return "" if self.bound is None else f"{self.direction} {self.bound:g}"
