"""Watching Python while hostile input is read: nothing of the input may run, connect or write."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ALWAYS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.startfile",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watching: list[tuple[str, list[str]]] = []
_installed = False


@contextmanager
def sentinel(folder: Path) -> Iterator[list[str]]:
    """Yields a list that fills with forbidden events inside the block.

    Forbidden are new processes, connections, look-ups and classes found by pickles anywhere; and imports from, code out
    of, and writing into `folder`.
    """
    global _installed
    if not _installed:  # audit hooks stay for the life of the process
        sys.addaudithook(_hook)
        _installed = True
    events: list[str] = []
    _watching.append((os.path.realpath(folder), events))
    try:
        yield events
    finally:
        _watching.pop()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of change of everything below a folder, links not followed."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            status = os.lstat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), folder)] = (status.st_size, status.st_mtime_ns)
    return found


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    folder, events = _watching[-1]
    if event in _ALWAYS:
        events.append(f"{event} {arguments[:1]}")
    elif event == "import":
        file = arguments[1]
        if isinstance(file, str) and os.path.realpath(file).startswith(folder):
            events.append(f"import {file}")
    elif event == "exec":
        file = getattr(arguments[0], "co_filename", "")
        if "payload" in file or os.path.realpath(file).startswith(folder):
            events.append(f"exec {file}")
    elif event == "open":
        path, _, flags = arguments
        writes = isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITES
        if writes and os.path.realpath(os.fsdecode(path)).startswith(folder):
            events.append(f"open for writing {os.fsdecode(path)}")
