"""A disk that fails on purpose, at a counted operation: full, broken, read-only, killed, or without power.

It stands in for `diffcore.io.files`, through which artefacts and runs do everything they do to a disk.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from diffcore.errors import MachineError
from diffcore.io import files

Fault = Literal["full", "broken", "read-only", "killed", "power"]

_ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}
_OPERATIONS = ("create", "write", "sync", "close", "replace", "sync_folder", "make_folder", "read", "remove")
_VOLATILE = {"created", "seconds", "hardware", "sidecar_sha256"}


class Killed(BaseException):
    """The process ends here, by SIGKILL or a power cut."""


@dataclass
class FaultyDisk:
    """Counts operations and fails at one of them.

    Attributes:
        at: Number of the operation that fails, from 1; 0 never fails.
        fault: The way in which operations fail.
        lasting: Whether every later operation fails too; a killed process does nothing more in any case.
        count: Number of operations so far.
    """

    at: int = 0
    fault: Fault = "full"
    lasting: bool = False
    count: int = 0
    _open: dict[int, Path] = field(default_factory=dict)
    _unsynced: set[Path] = field(default_factory=set)
    _renamed: dict[Path, bytes | None] = field(default_factory=dict)

    def run(self, name: str, real: Callable[..., Any], *arguments: Any) -> Any:
        """Does one operation, or fails."""
        self.count += 1
        dead = self.fault in ("killed", "power")
        if self.at and (self.count == self.at or (self.count > self.at and (self.lasting or dead))):
            self._fail(name, real, arguments)
        return self._perform(name, real, arguments)

    def _perform(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "sync":  # remembered instead of done: waiting for a real disk would take the test's time
            self._unsynced.discard(self._open[arguments[0]])
            return None
        if name == "sync_folder":
            self._renamed = {path: old for path, old in self._renamed.items() if path.parent != arguments[0]}
            return None
        if name == "replace":
            source, target = arguments
            if target.is_file() or not target.exists():
                self._renamed.setdefault(target, target.read_bytes() if target.exists() else None)
            if source in self._unsynced:
                self._unsynced.discard(source)
                self._unsynced.add(target)
        value = real(*arguments)
        if name == "create":
            self._open[value] = arguments[0]
            self._unsynced.add(arguments[0])
        return value

    def _fail(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if name == "write" and self.count == self.at:
            real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # torn
        if self.fault == "power" and self.count == self.at:
            self._lose()
        if self.fault in ("killed", "power"):
            raise Killed
        if name == "close":
            real(*arguments)  # a failing close closes all the same
        raise OSError(_ERRORS[self.fault], os.strerror(_ERRORS[self.fault]))

    def _lose(self) -> None:
        """Undoes operations that were never synced: renames first, then the contents of files."""
        for path, old in self._renamed.items():
            if old is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(old)
        for path in self._unsynced:
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@contextmanager
def faulty_disk(at: int = 0, fault: Fault = "full", *, lasting: bool = False) -> Iterator[FaultyDisk]:
    """Replaces the file operations of artefacts and runs inside the block."""
    disk = FaultyDisk(at, fault, lasting)
    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            real = getattr(files, name)
            patch.setattr(files, name, lambda *a, _name=name, _real=real: disk.run(_name, _real, *a))
        yield disk


def check_every_fault(
    work: Callable[[Path], None], folder: Path, fault: Fault, *, lasting: bool, every: int = 1
) -> int:
    """Checks that `work` resumes to the same files whatever operation failed; returns how many operations it has.

    Args:
        work: Does a resumable job in the folder it is given; finished parts must be skipped.
        folder: An empty place for all attempts.
        fault: The way in which operations fail.
        lasting: Whether the fault stays until the job ends.
        every: Step between the operations that are tried; 1 tries all.

    Raises:
        AssertionError: A fault was neither survived nor turned into a MachineError, or files differ after resuming.
    """
    with faulty_disk() as disk:
        work(folder / "golden")
    golden = result_files(folder / "golden")
    for at in range(1, disk.count + 1, every):
        place = folder / f"{fault}-{lasting}-{at}"
        try:
            with faulty_disk(at, fault, lasting=lasting):
                work(place)
        except (MachineError, Killed):
            pass
        with faulty_disk():
            work(place)
        found = result_files(place)
        differing = sorted(n for n in {*golden, *found} if golden.get(n) != found.get(n))
        assert not differing, f"{fault} at operation {at}, then resumed: {differing} differ"
    return disk.count


def result_files(folder: Path) -> dict[str, Any]:
    """Returns what is in a run folder by name: JSON without its volatile fields, other files as bytes."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"):
        data = path.read_bytes()
        if path.suffix == ".json":
            value = json.loads(data)
            found[path.relative_to(folder).as_posix()] = {k: v for k, v in value.items() if k not in _VOLATILE}
        else:
            found[path.relative_to(folder).as_posix()] = data
    return found
