"""Words for the columns of report tables; files keep the short names that programs read."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MITIGATIONS = {
    "none": "before",
    "neurons": "found neurons ablated",
    "random-neurons": "as many random ablated",
    "embedding-adjustment": "embedding adjusted",
    "attention-scaling": "attention scaled",
    "random-tokens-1": "1 random token",
    "random-tokens-4": "4 random tokens",
    "random-tokens-10": "10 random tokens",
}
_SETS = {"minimal": "smallest that does", "union": "all of all captions"}
_COLUMNS: dict[str, dict[str, str]] = {
    "captions": {"caption": "caption", "consistency": "first steps alike", "memorised": "above the threshold"},
    "classes": {
        "captions": "captions",
        "n": "how many",
        "median consistency": "first steps alike (median)",
        "above tau": "above the threshold",
    },
    "verification": {
        "prompt": "caption",
        "verdict": "verdict",
        "similarity": "closest image",
        "worst": "came from",
        "residual_consistency": "first steps alike",
    },
}
_MEASURES = (
    (r"_orig, max$", "closest to the training image"),
    (r"_orig$", "like the training image"),
    (r"_gen$", "like the unedited image"),
    (r"^D_", "seeds alike"),
    (r"^A_CLIP$", "fits the caption"),
)


_EARLIER = {
    **{"localised": "localized", "not_localised": "not_localized"},
    **{
        "way": "mitigation",
        "ways": "mitigations",
        "methods": "mitigations",
        "prove": "verify",
        "proof": "verification",
    },
}


def renamed(stored: Any) -> Any:
    """Returns what a run of an earlier version stored, or one of its words, under the names of this one."""
    if isinstance(stored, Mapping):
        return {
            renamed(name): renamed(value) if isinstance(value, Mapping | list) else value
            for name, value in stored.items()
        }
    if isinstance(stored, list):
        return [renamed(row) if isinstance(row, Mapping) else row for row in stored]
    return _EARLIER.get(stored, stored)


def worded(table: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a table with columns and mitigations in words, in an order that reads well.

    Args:
        table: Name of the table in the run.
        rows: Rows as the run keeps them; columns that have no words keep their names.
    """
    table, rows = renamed(table), renamed(list(rows))
    if table == "evaluation":
        return [_evaluated(row) for row in rows]
    if table == "sets":
        return [_set(row) for row in rows]
    if table == "quality":
        return [_distance(row) for row in rows]
    names = _COLUMNS.get(table, {})
    known = [[name for name in names if name in row] + [name for name in row if name not in names] for row in rows]
    return [
        {names.get(name, name.replace("_", " ")): _value(name, row[name]) for name in order}
        for row, order in zip(rows, known, strict=True)
    ]


def _value(name: str, value: Any) -> Any:
    return MITIGATIONS.get(str(value), value) if name == "mitigation" else value


def _set(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the sets for all captions."""
    return {
        "ablated": _SETS.get(str(row["set"]), row["set"]),
        "how many": row["neurons"],
        "captions closed": f"{row['closed']} of {row['captions']}",
        "change of ordinary captions": f"{row['damage']:.4f}{'' if row['within_budget'] else ', too much'}",
        "closest to its own first step": row["largest_score"],
        "closest two seeds": row["largest_residual"],
    }


def _distance(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the distances of ordinary captions' images."""
    low, high = row["low"], row["high"]
    known = None not in (low, high) and math.isfinite(low)
    return {
        "mitigation": _value("mitigation", row["mitigation"]),
        "distance": row["metric"],
        "value": row["value"],
        "95 % interval": f"{low:.3g} to {high:.3g}" if known else None,
        "images": row["n"],
        "features": row["features"],
        "compared with": row["reference"],
    }


def _evaluated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the paper's table: each median with its deviation in one cell."""
    told: dict[str, Any] = {
        "mitigation": _value("mitigation", row["mitigation"]),
        "captions": f"{row['captions']} ({row['n']})",
    }
    for name, value in row.items():
        if f"{name}, mad" in row:
            told[_measure(name)] = f"{value:.3f} ± {row[f'{name}, mad']:.3f}"
    return told


def _measure(name: str) -> str:
    return next((words for pattern, words in _MEASURES if re.search(pattern, name)), name)
