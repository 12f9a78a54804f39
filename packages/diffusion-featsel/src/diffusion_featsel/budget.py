"""Budgets of a set of activations: bytes or channels of an image's features, or the share of the network to be run."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from diffcore.errors import UserError
from diffusion_featsel.activation import Activation

Unit = Literal["bytes", "channels", "flops"]
_FACTORS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMS = '"8MiB" (half-precision features of one image), "3520ch" (channels), or "flops:.6" (share of the network)'


@dataclass(frozen=True)
class Budget:
    """The most that a set may cost.

    The cost in bytes and channels is a sum over the set. The cost in FLOPs is the share of the network up to the last
    activation: one that is computed on the way to another costs nothing more.

    Attributes:
        limit: Largest cost of a set.
        unit: Bytes in half precision and channels of one image's features, or share of the network's operations.

    Example:
        >>> Budget.of("8MiB")
        Budget(limit=8388608.0, unit='bytes')
        >>> Budget.of("flops:.6").limit
        0.6
    """

    limit: float
    unit: Unit

    @classmethod
    def of(cls, text: "str | Budget") -> "Budget":
        """Returns the budget that a text such as "8MiB", "3520ch" or "flops:.6" stands for.

        Raises:
            UserError: The text is none of these.
        """
        if isinstance(text, Budget):
            return text
        number, unit = r"(\d+(?:\.\d*)?|\.\d+)", "|".join(_FACTORS)
        if found := re.fullmatch(rf"{number}\s*({unit})", text.strip()):
            return cls(float(found[1]) * _FACTORS[found[2]], "bytes")
        if found := re.fullmatch(rf"{number}\s*ch", text.strip()):
            return cls(float(found[1]), "channels")
        if (found := re.fullmatch(rf"flops:{number}", text.strip())) and 0 < float(found[1]) <= 1:
            return cls(float(found[1]), "flops")
        raise UserError(f"`budget` is {text!r}; give {_FORMS}")

    def cost(self, names: Collection[str], activations: Mapping[str, Activation]) -> float:
        """Returns the cost of a set of activations in the budget's unit."""
        if self.unit == "flops":
            return max((activations[name].cost for name in names), default=0.0)
        if self.unit == "channels":
            return float(sum(activations[name].channels for name in names))
        return float(sum(activations[name].numbers * 2 for name in names))

    def fits(self, names: Collection[str], activations: Mapping[str, Activation]) -> bool:
        """Returns whether a set is within the budget, which it may use up."""
        return self.cost(names, activations) <= self.limit * (1 + 1e-9)

    def shown(self, cost: float) -> str:
        """Returns a cost as text with its unit."""
        if self.unit == "bytes":
            return f"{cost / 2**20:.3g}MiB" if cost >= 2**20 / 10 else f"{cost / 2**10:.3g}KiB"
        return f"{cost:.0f}ch" if self.unit == "channels" else f"flops:{cost:.3g}"

    def require_one(self, activations: Mapping[str, Activation]) -> None:
        """Raises a UserError that names the cheapest candidate where not even this is within the budget."""
        costs = {name: self.cost([name], activations) for name in activations}
        if not costs:
            raise UserError("there are no candidates to choose from; keep at least one activation")
        cheapest = min(costs, key=lambda name: costs[name])
        if not self.fits([cheapest], activations):
            raise UserError(
                f"`budget` is {self.shown(self.limit)}, and the cheapest candidate, {cheapest}, costs "
                f"{self.shown(costs[cheapest])}; give at least that"
            )
