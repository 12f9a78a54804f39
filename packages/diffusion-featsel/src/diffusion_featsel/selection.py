"""A selection: the activations that were chosen as features, with all that is needed to compute them again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Selection:
    """Names of activations with their weights, and the protocol that they are extracted by.

    Attributes:
        names: The paper's names of the activations.
        rms: Root mean square of each activation over a data set, by which it is divided before activations are
            concatenated; empty where it was not measured.
        weights: Factor of each activation after this division; 1 where it is missing.
        t: Timestep, in the units of the model's schedule.
        prompt: Prompt for all images.
        draws: Number of noise draws whose activations are averaged.
        model: Fingerprint of the model that it was chosen on; empty for presets.
        details: Plain values about how it was chosen: scores, costs, exit, what it was compared with.

    Example:
        >>> chosen = Selection(("up-level0-repeat0-res-out",), t=50.0)
        >>> Selection.from_json(chosen.to_json()) == chosen
        True
    """

    names: tuple[str, ...]
    rms: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    t: float = 50.0
    prompt: str = ""
    draws: int = 1
    model: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the selection as plain values."""
        return vars(self) | {
            "names": list(self.names),
            "rms": dict(self.rms),
            "weights": dict(self.weights),
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Selection":
        """Returns the selection that `to_json` wrote."""
        return cls(**{**row, "names": tuple(row["names"])})
