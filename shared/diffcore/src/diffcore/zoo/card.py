"""Model cards: a description of a shipped model, its measured values, and its training."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffcore.io.shipped import SHIPPED
from diffcore.zoo.gate import Gate


def model_card(name: str, gates: Sequence[Gate], made: Mapping[str, Any]) -> str:
    """Returns the card as Markdown.

    Args:
        name: Name of the shipped model.
        gates: Its measured values with their bounds; missed ones are listed first.
        made: Settings of its training: seed, steps, versions.
    """
    missed = [gate for gate in gates if not gate.kept]
    lines = [f"# {name}", "", f"{SHIPPED[name][0].upper()}{SHIPPED[name][1:]}. Part of diffcore; trained on"]
    lines[-1] += (
        " drawn pictures of nobody." if name.startswith("portraits") else " handwritten digits of the UCI repository."
    )
    if missed:
        lines += [
            "",
            "**Missed:** " + "; ".join(f"{g.name}: {g.value:.3f}, promised {g.promise}" for g in missed) + ".",
        ]
    lines += ["", "| figure | value | promised |", "|---|---|---|"]
    lines += [f"| {gate.name} | {gate.value:.3f} | {gate.promise or '-'} |" for gate in gates]
    lines += ["", f"Recomputed from the weights by `diffcore zoo check {name}`.", "", "## How it was made", ""]
    lines += [f"`diffcore zoo train {name}`", ""]
    lines += [f"* {key}: {_plain(value)}" for key, value in made.items()]
    lines += ["", "Licence: Apache-2.0, like diffcore."]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
