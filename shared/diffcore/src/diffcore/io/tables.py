"""CSV tables that are safe to open in a spreadsheet and exact to read back."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcore.io import files

# What a spreadsheet takes for a formula, and the quote itself, so that reading back is exact.
_GUARDED = ("=", "+", "-", "@", "\t", "\r", "'")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, a column per key; text that starts like a formula gets a leading quote, numbers never."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")  # of RFC 4180; any other leaves a lone \r unquoted
    writer.writerow([_guard(column) for column in columns])
    writer.writerows([_guard(row.get(column, "")) for column in columns] for row in rows)
    return text.getvalue()


def has_guarded(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether `csv_text` changes a cell or a column's name."""
    return any(_guard(text) != text for row in rows for text in (*row, *row.values()) if isinstance(text, str))


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads a table that `Run.table` wrote, as text, with the quotes against formulas taken away."""
    with files.explained(path, reading=True):
        text = files.read(path).decode()
    rows = [[cell.removeprefix("'") for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def _guard(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_GUARDED) else value
