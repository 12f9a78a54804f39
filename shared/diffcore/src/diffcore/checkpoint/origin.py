"""Removing the paths that models were once loaded from, so that written files name no machine's folders."""

import re
from pathlib import Path

from diffcore.checkpoint.walk import walk
from diffcore.io import files

_MEMBER = rb'"_?name_or_path"\s*:\s*"(?:[^"\\]|\\.)+"'
_ORIGIN = re.compile(rb"%b\s*,\s*|\s*,\s*%b|%b" % (_MEMBER, _MEMBER, _MEMBER))


def forget_origins(folder: Path) -> dict[str, bytes]:
    """Removes `_name_or_path` from every configuration in a model folder; all other bytes stay.

    Returns:
        Previous bytes of each file that changed, by its relative name.
    """
    before: dict[str, bytes] = {}
    for name in walk(folder):
        if name.endswith(".json"):
            with files.explained(folder / name, reading=True):
                data = (folder / name).read_bytes()
            kept = _ORIGIN.sub(b"", data)
            if kept != data:
                files.write_whole(folder / name, kept)
                before[name] = data
    return before
