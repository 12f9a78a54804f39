"""The files of a data set, in a folder or in a zip archive; nothing is ever extracted."""

import os
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from diffcore.errors import UserError, printable

MAX_MEMBERS = 1_000_000
MAX_BYTES = 256 * 2**20  # of one file
MAX_RATIO = 200  # of an archive member above RATIO_FREE_BYTES
RATIO_FREE_BYTES = 10 * 2**20


class UnreadableFileError(Exception):
    """One file of a data set cannot be used; the message is the reason, without the file's name."""


class FolderFiles:
    """All regular files below a folder, links followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found: list[str] = []
        seen: set[tuple[int, int]] = set()
        for folder, folders, files in os.walk(path, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link to one of its own parents
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = os.path.relpath(folder, path)
            found += files if inside == "." else (os.path.join(inside, file) for file in files)
        self.names = _visible(name.replace(os.sep, "/") for name in found)

    def read(self, name: str, limit: int = MAX_BYTES + 1) -> bytes:
        """Returns a file's bytes, `limit` of them at most; refuses pipes and devices, which never end."""
        try:
            with open(os.open(self.path / name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableFileError("is not a regular file")
                if status.st_size > MAX_BYTES:
                    raise UnreadableFileError(f"has {status.st_size} bytes; the limit is {MAX_BYTES}")
                return file.read(limit)
        except OSError as error:
            raise UnreadableFileError(f"cannot be opened: {error.strerror}") from None


class ZipFiles:
    """The members of a zip archive, checked before any is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        archive = self._open()
        members = [member for member in archive.infolist() if not member.is_dir()]
        _check_members(path, archive.infolist())
        self.names = _visible(member.filename for member in members)
        self._archive, self._process = archive, os.getpid()

    def read(self, name: str, limit: int = MAX_BYTES + 1) -> bytes:
        """Returns a member's bytes, `limit` of them at most; never more than its header announced."""
        try:
            # A forked process would share the file position: each opens its own. Threads share under zipfile's lock.
            if self._archive is None or self._process != os.getpid():
                self._archive, self._process = self._open(), os.getpid()
            with self._archive.open(name) as member:
                return member.read(limit)
        except Exception as error:  # zipfile, zlib and struct each have their own
            raise UnreadableFileError(f"is damaged in the archive: {printable(error)}") from None

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except Exception as error:
            raise UserError(f"{printable(self.path)} is damaged: {printable(error)}; copy it again") from None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}


Files = FolderFiles | ZipFiles
"""Names and bytes: a folder or an archive."""


def open_files(path: Path) -> Files:
    """Opens a folder or a zip archive; hidden files and those that operating systems leave behind are ignored.

    Raises:
        UserError: `path` is neither a folder nor a zip archive, or the archive breaks a rule.
    """
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise UserError(f"{printable(path)} does not exist; pass a folder or a zip archive of images")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{printable(path)} is neither a folder nor a zip archive; pass one of them with images in it")
    return ZipFiles(path)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuses archives with members that are duplicate, encrypted, linked, too large, or lead outside."""
    if len(members) > MAX_MEMBERS:
        raise UserError(f"{printable(path)} has {len(members)} members; the limit is {MAX_MEMBERS}")
    seen: set[str] = set()
    for member in members:
        reason = "appears twice" if member.filename in seen else _objection(member)
        if reason:
            raise UserError(
                f"{printable(path)}: member {printable(member.orig_filename)!r} {reason}; repack the archive"
            )
        seen.add(member.filename)


def _objection(member: zipfile.ZipInfo) -> str | None:
    name = member.orig_filename
    parts = name.removesuffix("/").split("/")
    if "\\" in name or "\0" in name or name[1:2] == ":" or not {"", ".", ".."}.isdisjoint(parts):
        return "has a path that leads elsewhere"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed by another method than deflate"
    if member.file_size > MAX_BYTES:
        return f"has {member.file_size} bytes; the limit is {MAX_BYTES}"
    if member.file_size > RATIO_FREE_BYTES and member.file_size > MAX_RATIO * member.compress_size:
        return f"grows more than {MAX_RATIO} times when unpacked"
    return None


def _visible(names: Iterable[str]) -> tuple[str, ...]:
    junk = {"__MACOSX", "Thumbs.db", "desktop.ini"}
    return tuple(
        sorted(name for name in names if not any(p.startswith(".") or p in junk for p in PurePosixPath(name).parts))
    )
