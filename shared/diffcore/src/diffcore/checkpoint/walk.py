"""Listing the files of a model folder without opening pipes or following links that loop or lead elsewhere."""

import os
import stat
from pathlib import Path

from diffcore.errors import IncompatibleModelError, printable
from diffcore.io import files

MAX_FILES = 10_000
MAX_DEPTH = 8
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device"}


def walk(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of every file below a folder, by its relative name with slashes, sorted.

    A link may stand for a regular file, as in hub caches; nothing else may be linked.

    Raises:
        IncompatibleModelError: The folder holds pipes, sockets, devices, links to anything but regular files, more than
            10 000 files, or folders nested deeper than 8.
    """
    sizes: dict[str, int] = {}
    pending = [("", 0)]
    while pending:
        prefix, depth = pending.pop()
        with files.explained(folder / prefix, reading=True), os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if depth == MAX_DEPTH:
                        raise _refusal(folder, f"has folders nested deeper than {MAX_DEPTH}")
                    pending.append((f"{name}/", depth + 1))
                    continue
                sizes[name] = _size_of_regular_file(folder, name, entry)
                if len(sizes) > MAX_FILES:
                    raise _refusal(folder, f"holds more than {MAX_FILES} files")
    return dict(sorted(sizes.items()))


def _size_of_regular_file(folder: Path, name: str, entry: "os.DirEntry[str]") -> int:
    link = entry.is_symlink()
    try:
        status = entry.stat()
    except OSError:  # broken, or in a circle
        raise _refusal(folder, f"holds a link that leads nowhere, {printable(name)}") from None
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if link:
        raise _refusal(folder, f"holds a link to something else than a file, {printable(name)}")
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
    raise _refusal(folder, f"holds {printable(name)}, which is {kind}")


def _refusal(folder: Path, what: str) -> IncompatibleModelError:
    return IncompatibleModelError(f"{printable(folder, 300)} {what}; point to a plain model folder")
