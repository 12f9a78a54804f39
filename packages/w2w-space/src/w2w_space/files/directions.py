"""Directions on disk."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.io import artifact
from w2w_space.coordinates import Space
from w2w_space.directions import Direction, Directions

FILE = "directions.safetensors"
SCHEMA = "w2w-space/directions@1"
_TENSORS = ("vector", "axis", "score")


def save_directions(found: Directions, path: Path | str, **details: Any) -> Path:
    """Writes directions, and returns their file.

    Args:
        found: Directions of a space.
        path: File that ends in .safetensors.
        **details: Plain values about how they were found.
    """
    rows = [{k: v for k, v in asdict(row).items() if k not in _TENSORS} for row in found.rows]
    tensors = {f"{row.name}/{name}": getattr(row, name) for row in found.rows for name in _TENSORS}
    return artifact.save(
        Path(path), tensors, schema=SCHEMA, space=found.space, rows=rows, notes=list(found.notes), **details
    )


def load_directions(path: Path | str, space: Space) -> Directions:
    """Returns directions that `save_directions` wrote.

    Args:
        path: File of the directions, or the run folder that holds it.
        space: Space that they belong to.

    Raises:
        UserError: There are none.
        IncompatibleModelError: They belong to another space.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{printable(path, 300)} holds no directions; give the run folder in which they were found")
    stored = artifact.load(path, schema=SCHEMA)
    if stored.fields["space"] != space.fingerprint:
        raise IncompatibleModelError(f"{printable(path, 300)} has directions of another space; find them in this one")
    rows = [
        Direction(
            **{name: stored.tensors[f"{row['name']}/{name}"] for name in _TENSORS},
            **(row | {"counts": tuple(row["counts"])}),
        )
        for row in stored.fields["rows"]
    ]
    return Directions(space.fingerprint, tuple(rows), tuple(stored.fields["notes"]))
