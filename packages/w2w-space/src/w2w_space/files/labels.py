"""Labels of adapters in a table, as people keep them: a row per label, or a row per adapter."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffcore.errors import UserError, printable
from diffcore.io import files
from w2w_space.coordinates import Space
from w2w_space.labels import Labels

_LONG = ["adapter", "attribute", "value"]
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_NAMED = 10  # adapters that a message names
_LOG = logging.getLogger(__name__)


def read_label_rows(path: Path) -> dict[int, list[str]]:
    """Returns the rows of a table of labels by the line that each ends in, the header first.

    Args:
        path: CSV file whose first column is adapter.

    Raises:
        UserError: The file is no such table.
    """
    with files.explained(path, reading=True):
        text = files.read(path).decode("utf-8-sig", "replace")
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = dict[int, list[str]]()
    try:
        for row in reader:
            if row:
                rows[reader.line_num] = row
    except csv.Error:
        rows.clear()  # no table at all
    header = next(iter(rows.values()), [])
    if len(header) < 2 or header[0] != "adapter":
        raise UserError(
            f"{printable(path, 300)} has no column adapter before its others; write adapter,attribute,value, or "
            "adapter and one column per attribute"
        )
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{printable(path, 300)} has two columns {printable(name)!r}; keep one")
    for line, row in rows.items():
        if len(row) > len(header):
            raise UserError(
                f"{printable(path, 300)}, line {line}: there are {len(row)} values for {len(header)} columns; quote "
                "values that hold commas"
            )
    return rows


def read_labels(path: Path, space: Space) -> Labels:
    """Returns the labels of a space's members from a CSV file.

    The columns are adapter, attribute and value, with one row per label; or adapter and one column per attribute.
    Blanks are not known; yes, no, true and false are 1 and 0. Labels of adapters that are no members, such as those
    that an import left out, are named in a warning and passed over.

    Args:
        path: CSV file of the labels.
        space: Space with its members.

    Raises:
        UserError: The file is no such table, names no member, holds what is no number, or tells one label twice.
    """
    if not space.names:
        raise UserError("the space was written without its members, whom labels are about; build it with them")
    (_, header), *rows = read_label_rows(path).items()
    values: dict[str, dict[str, float]] = {}
    for line, row in rows:
        adapter, *cells = row
        told = [(cells[0], cells[1:])] if header == _LONG else [(n, cells[p : p + 1]) for p, n in enumerate(header[1:])]
        for attribute, cell in told:
            column, text = values.setdefault(attribute, {}), "".join(cell).strip()
            if not text:
                continue
            found = _number(text, path, line)
            if column.setdefault(adapter, found) != found:
                raise UserError(
                    f"{printable(path, 300)}, line {line}: {printable(attribute)!r} of {printable(adapter)!r} is "
                    f"{found:g} here, and {column[adapter]:g} above; keep one"
                )
    return Labels.of(space.names, _of_members(values, space.names, path))


def labels_text(rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """Returns a table of labels with the rows of some members alone.

    Args:
        rows: Rows of the table, the header first.
        names: Names of the members whose rows are kept.

    Example:
        >>> labels_text([["adapter", "age"], ["alice", "40"], ["bob", "20"]], ["bob"]).splitlines()
        ['adapter,age', 'bob,20']
    """
    buffer, known = io.StringIO(newline=""), set(names)
    csv.writer(buffer, lineterminator="\n").writerows([rows[0], *(row for row in rows[1:] if row[0] in known)])
    return buffer.getvalue()


def _of_members(
    values: Mapping[str, Mapping[str, float]], members: Sequence[str], path: Path
) -> dict[str, dict[str, float]]:
    """Returns the labels of members; those of others are told, and are an error where there are no more."""
    known = set(members)
    named = dict.fromkeys(name for column in values.values() for name in column)
    others = [name for name in named if name not in known]
    if others and len(others) == len(named):
        raise UserError(
            f"{printable(path, 300)} names no member of the space, but {_listed(others)}; the members are "
            f"{_listed(members)}"
        )
    if others:
        _LOG.warning(
            "labels of adapters that are no members are passed over, %d in all: %s", len(others), _listed(others)
        )
    return {
        attribute: {name: value for name, value in column.items() if name in known}
        for attribute, column in values.items()
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:_NAMED]) + (" and others" if len(names) > _NAMED else "")


def _number(text: str, path: Path, line: int) -> float:
    try:
        found = _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
    except ValueError:
        found = float("nan")
    if not math.isfinite(found):
        raise UserError(
            f"{printable(path, 300)}, line {line}: {printable(text)!r} is no number; leave unknown ones blank"
        )
    return found
