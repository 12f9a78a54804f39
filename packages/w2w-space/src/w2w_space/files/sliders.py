"""What a slider's file says of itself, in one entry of its header that other tools pass over."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcore.adapters.scan import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS
from diffcore.errors import printable
from diffcore.io.strictjson import StrictError, parse
from diffcore.io.tensorfile import read_header
from w2w_space.slider import Slider
from w2w_space.space import Point

METADATA = "w2w_space_slider"
"""Name of the entry."""
_SHOWN = ("attribute", "unit", "useful_range", "exact_at", "subject", "keep", "loss")


def about_slider(made: Slider, subject: Point, *, subject_name: str = "", keep: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the plain values that describe a slider.

    Args:
        made: Slider that shall be written.
        subject: Point that it was made for.
        subject_name: Name of that point.
        keep: Attributes whose scores it leaves as they are.
    """
    return {
        "attribute": made.name,
        "unit": "standard deviations of the members",
        "useful_range": [round(end, 2) for end in made.useful],
        "exact_at": made.at,
        "subject": subject_name,
        "keep": list(keep),
        "space": subject.space.fingerprint,
    }


def slider_of(path: Path | str) -> dict[str, Any] | None:
    """Returns what a file says of the slider that it holds; None where it says nothing.

    Args:
        path: Adapter, a file or a folder.
    """
    path = Path(path)
    names = (path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))
    weights = next((file for file in names if file.is_file()), path) if path.is_dir() else path
    told = read_header(weights).metadata.get(METADATA)
    if told is None:
        return None
    try:
        values: Any = parse(told.encode())
    except StrictError:
        return None
    if not isinstance(values, dict):
        return None
    return {name: _plain(values[name]) for name in _SHOWN if name in values}


def _plain(value: Any) -> Any:
    """Returns a value of a stranger's file in a form that can be printed."""
    return (
        value
        if isinstance(value, int | float)
        else printable(json.dumps(value) if not isinstance(value, str) else value)
    )
