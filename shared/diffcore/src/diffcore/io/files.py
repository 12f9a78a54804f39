"""The file operations of artefacts and runs, which tests replace to simulate a failing disk.

The first functions make one system call each. The others compose them: a file is written under a temporary name in the
same folder, synced, renamed over its target, and the folder synced, so that readers find either the old file or the new
one, even after a full disk or a power cut.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffcore.errors import MachineError, UserError, printable

MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
}
_BLOCK = 1 << 20


def create(path: Path) -> int:
    """Opens a new file for writing and returns its descriptor; the mode follows the umask."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write(descriptor: int, data: bytes) -> None:
    """Writes all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync(descriptor: int) -> None:
    """Waits until the file is on the disk."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Closes a descriptor; a network disk reports a failed write only here."""
    os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Renames a file over another."""
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system lets a folder be opened."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it."""
    folder.mkdir(parents=True, exist_ok=True)


def read(path: Path) -> bytes:
    """Returns a file's bytes."""
    return path.read_bytes()


def remove(path: Path) -> None:
    """Deletes a file; no error if there is none."""
    path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is there entirely or not at all, even after a power cut.

    Raises:
        MachineError: The disk is full, read-only or failing; an older file of that name is untouched.
        UserError: The place is not writable, or the name belongs to something else than a regular file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{printable(path, 300)} is not a regular file and is left alone; choose another place")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path, needed=len(data)):
        make_folder(path.parent)
        remove(temporary)
        try:
            descriptor = create(temporary)
            try:
                write(descriptor, data)
                sync(descriptor)
            finally:
                close(descriptor)
            replace(temporary, path)
        except OSError:
            with suppress(OSError):
                remove(temporary)
            raise
        sync_folder(path.parent)


def sha256(path: Path) -> str:
    """Returns the hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with explained(path, reading=True), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_ends(path: Path) -> str:
    """Returns the hex digest of a file's first and last MiB: quick, and enough to distinguish photographs."""
    with explained(path, reading=True), path.open("rb") as file:
        digest = hashlib.sha256(file.read(_BLOCK))
        file.seek(max(path.stat().st_size - _BLOCK, 0))
        digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def sweep(folder: Path) -> list[Path]:
    """Deletes temporary files that killed processes left in a folder and below; returns the deleted paths."""
    stale = sorted(folder.glob("**/.*.tmp"))
    for path in stale:
        with explained(path):
            remove(path)
    return stale


@contextmanager
def explained(path: Path, *, needed: int = 0, reading: bool = False) -> Iterator[None]:
    """Turns the system's errors about a path into diffcore's, with the bytes needed and free.

    Raises:
        MachineError: The disk or the system failed.
        UserError: The path does not exist, may not be written, or is of the wrong kind.
    """
    try:
        yield
    except OSError as error:
        verb = "read" if reading else "write"
        reason = f"cannot {verb} {printable(path, 300)}: {os.strerror(error.errno or errno.EIO)}"
        if error.errno not in MACHINE_ERRORS:
            raise UserError(f"{reason}; choose another place or change its permissions") from error
        room = "" if reading else f" ({needed:,} bytes needed, {_free_bytes(path):,} free)"
        raise MachineError(
            f"{reason}{room}; what was finished is safe: when the disk is well again, run the same command again"
        ) from error


def _free_bytes(path: Path) -> int:
    existing = next((p for p in (path, *path.absolute().parents) if p.is_dir()), Path("/"))
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return 0
