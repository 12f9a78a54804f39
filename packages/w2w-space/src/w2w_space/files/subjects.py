"""Pictures of subjects on disk: one sub-folder for each subject of a population, or single files for an inversion.

    instances/alice/1.jpg         a picture of the subject alice
    instances/alice/3/1.jpg       for models that draw classes: a picture of class 3
    instances/labels.csv          labels of the subjects, which go with the population

What cannot be read is named and left out: files that are no pictures, damaged pictures, folders without pictures.
"""

import hashlib
import io
import logging
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from diffcore.data import ImageSource, UnreadableFileError, list_images, resize
from diffcore.data.decode import FORMATS, decode
from diffcore.data.source import MAX_PIXELS
from diffcore.digests import digest_of_values
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.io.files import sha256_of_ends

_LOG = logging.getLogger(__name__)
_THREADS = 4


@dataclass(frozen=True)
class Listed:
    """A subject whose pictures are not yet read.

    Attributes:
        name: Name of its sub-folder.
        pictures: Places of its pictures in the source.
    """

    name: str
    pictures: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Subjects:
    """The subjects of a folder or zip archive, not yet read.

    Attributes:
        source: All pictures, by their names.
        subjects: Subjects in the order of their names.
        skipped: Name and reason of each sub-folder and file that belongs to no subject.
        depth: Number of folders above those that name classes: 1 where the first names the subject.
    """

    source: ImageSource
    subjects: tuple[Listed, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    depth: int = 1

    @property
    def digest(self) -> str:
        """Digest of names and ends of all pictures; labels and other files do not count."""
        path, names = self.source.path, [self.source.names[i] for each in self.subjects for i in each.pictures]
        if not path.is_dir():
            return digest_of_values([sha256_of_ends(path), names])
        return digest_of_values([[name, sha256_of_ends(path / name)] for name in names])

    def first(self, count: int | None) -> "Subjects":
        """Returns the first subjects alone.

        Args:
            count: Number of subjects to keep; None keeps all.

        Raises:
            UserError: There are none to keep.
        """
        if count is not None and count < 1:
            raise UserError(f"`num_members` is {count}; give at least 1")
        return replace(self, subjects=self.subjects[:count])


@dataclass(frozen=True)
class Seen:
    """What a look at the pictures of a subject found.

    Attributes:
        name: Name of the subject.
        pictures: Places of the usable pictures in the source.
        skipped: Name and reason of each picture that cannot be used.
        notes: Sentences about conversions of pictures.
        digest: Digest of the pixels.
    """

    name: str
    pictures: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Returns what was found as plain values."""
        return {
            "name": self.name,
            "pictures": list(self.pictures),
            "skipped": [list(pair) for pair in self.skipped],
            "notes": list(self.notes),
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Seen":
        """Returns what `to_json` wrote.

        Args:
            row: Plain values of one subject.
        """
        skipped = tuple((str(name), str(reason)) for name, reason in row["skipped"])
        return cls(row["name"], tuple(row["pictures"]), skipped, tuple(row["notes"]), row["digest"])


def list_subjects(path: Path | str) -> Subjects:
    """Returns the subjects of a folder or zip archive that has one sub-folder of pictures for each.

    Args:
        path: Folder or zip archive.

    Raises:
        UserError: There are no pictures in sub-folders, or two sub-folders have what is one name to people.
    """
    path = Path(path)
    source = list_images(path)
    found, skipped = dict[str, list[int]](), list[tuple[str, str]]()
    for place, name in enumerate(source.names):
        if "/" in name:
            found.setdefault(name.split("/")[0], []).append(place)
        else:
            skipped.append((name, "lies beside the sub-folders, and belongs to no subject"))
    if not found:
        raise UserError(
            f"{printable(path, 300)} has pictures, such as {printable(source.names[0])}, and no sub-folders; put the "
            "pictures of each subject into a sub-folder of its own"
        )
    folders = {name.split("/")[0] for name in source.others if "/" in name}
    if path.is_dir():
        folders |= {each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")}
    skipped += [(name, "holds no pictures") for name in sorted(folders - set(found))]
    inside = [name for name in source.others if "/" in name and name.split("/")[0] in found]
    skipped += [(name, "is no picture") for name in inside]
    known = dict[str, str]()
    for name in found:
        other = known.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"{printable(path, 300)} has two sub-folders called {printable(name)!r}, which differ in the spelling "
                "of their accents alone; rename one"
            )
    for name, reason in skipped:
        _LOG.warning("left out: %s %s", printable(name), reason)
    return Subjects(source, tuple(Listed(name, tuple(found[name])) for name in sorted(found)), tuple(skipped))


def list_class(path: Path | str) -> Subjects:
    """Returns all pictures of a folder or zip archive as one subject, for prior preservation.

    Args:
        path: Folder or zip archive; for models that draw classes, with a sub-folder of each class's number.

    Raises:
        UserError: There are no pictures.
    """
    source = list_images(path)
    everything = Listed("pictures of the class", tuple(range(len(source.names))))
    return Subjects(source, (everything,), depth=0)


def look_at(source: ImageSource, subject: Listed, *, channels: int, side: int) -> Seen:
    """Returns which pictures of a subject can be used, after decoding each.

    Args:
        source: Pictures of all subjects.
        subject: Subject to look at.
        channels: Number of channels that the model takes, 1 or 3.
        side: Side in pixels that pictures are resized to.
    """
    kept, skipped, notes, rows = list[int](), list[tuple[str, str]](), list[str](), list[Tensor]()
    for place, found in zip(subject.pictures, _decoded(source, subject.pictures, channels, side), strict=True):
        name = source.names[place]
        if isinstance(found, UnreadableFileError):
            skipped.append((name, str(found)))
            continue
        pixels, remarks = found
        kept.append(place)
        rows.append(pixels)
        notes += [f"{name} {remark}" for remark in remarks]
    digest = digest_of_values([pixels_digest(pixels) for pixels in rows])
    return Seen(subject.name, tuple(kept), tuple(skipped), tuple(notes), digest)


def read_pictures(
    source: ImageSource, pictures: Sequence[int], *, channels: int, side: int
) -> UInt8[Tensor, "k c side side"]:
    """Returns the central squares of some pictures, resized.

    Args:
        source: Pictures of all subjects.
        pictures: Places of the pictures in the source, all of which can be read.
        channels: Number of channels that the model takes, 1 or 3.
        side: Side in pixels that pictures are resized to.

    Raises:
        UserError: A picture cannot be read any more.
    """
    rows = []
    for place, found in zip(pictures, _decoded(source, pictures, channels, side), strict=True):
        if isinstance(found, UnreadableFileError):
            raise UserError(f"{printable(source.names[place])} {found}; it was changed meanwhile")
        rows.append(found[0])
    return torch.stack(rows)


def pixels_digest(pixels: UInt8[Tensor, "c h w"]) -> str:
    """Returns a digest of the pixels of a picture.

    Args:
        pixels: 8-bit pixels of the picture.
    """
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def class_of(name: str, depth: int = 1) -> int | None:
    """Returns the class that a picture's folder names; None where it names none.

    Args:
        name: Name of the picture in the source, such as alice/3/1.jpg.
        depth: Number of leading folders that name no class, such as that of the subject.

    Example:
        >>> class_of("alice/3/1.jpg"), class_of("alice/1.jpg")
        (3, None)
    """
    folders = name.split("/")[depth:-1]
    return int(folders[-1]) if folders and folders[-1].isdecimal() else None


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture file that was read whole.

    Attributes:
        path: Place of the file.
        image: Picture as a person sees it: upright, on white.
        sha256: Digest of the file.
    """

    path: Path
    image: Image.Image
    sha256: str


def open_pictures(paths: Sequence[Path]) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Returns the pictures of files and folders, and name and reason of each file that is left out.

    Args:
        paths: Picture files, and folders that hold such at any depth.

    Raises:
        UserError: A path does not exist, or there is no usable picture.
    """
    found, skipped = list[Picture](), list[tuple[str, str]]()
    for path in paths:
        below = [path]
        if path.is_dir():
            source = list_images(path)
            below = [path / name for name in source.names]
            skipped += [((path / name).as_posix(), "is no picture") for name in source.others]
        for file in below:
            with files.explained(file, reading=True):
                data = files.read(file)
            try:
                pixels = decode(data, channels=3, max_pixels=MAX_PIXELS).pixels
            except UnreadableFileError as error:
                skipped.append((file.as_posix(), str(error)))
                continue
            found.append(Picture(file, Image.fromarray(pixels.transpose(1, 2, 0)), files.sha256(file)))
    if not found:
        what = f"; the first, {printable(skipped[0][0])}, {skipped[0][1]}" if skipped else ""
        raise UserError(f"there is no usable picture{what}; give PNG, JPEG, WebP, BMP or TIFF files")
    for name, reason in skipped:
        _LOG.warning("left out: %s %s", printable(name), reason)
    return found, skipped


def open_mask(path: Path) -> Image.Image:
    """Returns a mask as it is, with its alpha channel where it has one.

    Args:
        path: Picture file of the mask.

    Raises:
        UserError: The file is no picture, damaged, or too large.
    """
    with files.explained(path, reading=True):
        data = files.read(path)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"the mask {printable(path)} has {image.width} x {image.height} pixels; the limit is "
                    f"{MAX_PIXELS:g} in all"
                )
            image.load()
            return image.copy()
    except UserError:
        raise
    except Exception as error:  # Pillow has many
        raise UserError(
            f"the mask {printable(path)} is no picture, or damaged: {printable(error, 100)}; give a PNG file"
        ) from None


def _decoded(
    source: ImageSource, pictures: Sequence[int], channels: int, side: int
) -> list[tuple[Tensor, tuple[str, ...]] | UnreadableFileError]:
    """Decodes on a few threads; returns pixels and notes of each picture, or why it cannot be used."""

    def work(place: int) -> tuple[Tensor, tuple[str, ...]] | UnreadableFileError:
        try:
            pixels, notes = source.decode(place, channels=channels, max_pixels=MAX_PIXELS)
        except UnreadableFileError as error:
            return error
        height, width = pixels.shape[1:]
        if min(height, width) < side:
            notes = (*notes, f"has {width} x {height} pixels, fewer than the model's {side}, and is enlarged")
        return resize(torch.from_numpy(pixels.copy()), side), tuple(notes)

    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        # What Pillow says about damaged metadata is not about the pixels; damaged pictures are listed by name.
        warnings.filterwarnings("ignore", module="PIL")
        return list(pool.map(work, pictures))
