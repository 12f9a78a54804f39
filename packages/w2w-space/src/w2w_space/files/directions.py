"""Directions on disk, and labels from a table."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.io import artifact, files
from w2w_space.coordinates import Space
from w2w_space.directions import Direction, Directions
from w2w_space.labels import Labels

FILE = "directions.safetensors"
SCHEMA = "w2w-space/directions@1"
_LONG = ("adapter", "attribute", "value")
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
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
        raise UserError(f"{printable(path, 300)} holds no directions; give the run folder of `directions`")
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


def read_labels(path: Path, space: Space) -> Labels:
    """Returns the labels of a space's members from a CSV file.

    The columns are adapter, attribute and value, with one row per label; or adapter and one column per attribute.
    Blanks are not known; yes, no, true and false are 1 and 0.

    Args:
        path: CSV file of the labels.
        space: Space with its members.

    Raises:
        UserError: The file is no such table, names no member, or holds what is no number.
    """
    with files.explained(path, reading=True):
        text = files.read(path).decode("utf-8-sig", "replace")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error:
        rows = []  # no table at all
    names = list(rows[0]) if rows else []
    if not names or names[0] != "adapter" or len(names) < 2:
        raise UserError(
            f"{printable(path, 300)} has no column adapter before its others; write adapter,attribute,value, or "
            "adapter and one column per attribute"
        )
    values: dict[str, dict[str, float]] = {}
    for line, row in enumerate(rows, 2):
        told = [(row["attribute"], row["value"])] if tuple(names) == _LONG else [(n, row[n]) for n in names[1:]]
        for attribute, value in told:
            column = values.setdefault(attribute, {})
            if value is not None and value.strip():
                column[row["adapter"]] = _number(value.strip(), path, line)
    return Labels.of(space.names, values)


def _number(text: str, path: Path, line: int) -> float:
    try:
        found = _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
    except ValueError:
        found = float("nan")
    if not torch.tensor(found).isfinite():
        raise UserError(
            f"{printable(path, 300)}, line {line}: {printable(text)!r} is no number; leave unknown ones blank"
        )
    return found
