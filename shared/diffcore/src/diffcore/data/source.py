"""Listing the images of a folder or archive, with their classes, before any is read.

A file is an image if its name or its first bytes say so; others (captions, settings, logs) never count. Flat folders
have no labels; one sub-folder per class gives them. A folder that holds everything is no class, and `split` picks one
of several, as in `train/<class>/x.jpg`. Where a `dataset.json` of NVIDIA's dataset tools lies beside the images, it
holds the labels, and folders mean nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from diffcore.data.decode import Decoded, decode, is_image
from diffcore.data.files import Files, UnreadableFileError, open_files
from diffcore.data.order import by_number
from diffcore.errors import UserError, printable
from diffcore.io.strictjson import StrictError, parse

MAX_PIXELS = 64_000_000
_SPLITS = {"train", "training", "test", "val", "valid", "validation", "dev"}
# Of images of any kind: one in a format that is not read is an image all the same, and is reported by name.
_IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".ppm", ".pgm"),
}
_IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_LABELS_FILE = "dataset.json"


@dataclass(frozen=True)
class ImageSource:
    """The images of a folder or archive, not yet read.

    Attributes:
        path: The folder or zip archive.
        names: File names relative to it, sorted as text.
        labels: Index into `classes` for each name; None without classes.
        classes: Names of the sub-folders, or the numbers of `dataset.json`.
        files: Reads the bytes of a file by its name.
        others: Files that are no images, sorted as text.
        notes: Sentences about how the labels were found that their owner may not expect.
    """

    path: Path
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    files: Files = field(compare=False, repr=False)
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def read(self, index: int, *, channels: Literal[1, 3] = 3, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "c h w"]:
        """Returns one image at its own size.

        Raises:
            UnreadableFileError: The file is no image, damaged or too large; the message is the reason.
        """
        return torch.from_numpy(self.decode(index, channels=channels, max_pixels=max_pixels).pixels.copy())

    def decode(self, index: int, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Decoded:
        """Returns one image as an array, with notes on what was done to it; raises as `read`."""
        return decode(self.files.read(self.names[index]), channels=channels, max_pixels=max_pixels)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences about labels, and about files that are no images."""
        return (*self.notes, *_about_others(self))


def list_images(path: str | Path) -> ImageSource:
    """Lists every image of a folder or zip archive, at any depth, without labels; reads none.

    Raises:
        UserError: There is no image at `path`.
    """
    path = Path(path)
    files, names, others = _images_in(path)
    return ImageSource(path, names, None, (), files, others)


def open_images(path: str | Path, *, split: str | None = None) -> ImageSource:
    """Lists the images of a folder or zip archive with their classes; reads none.

    Classes are in the order of their names, with numbers in them taken as numbers.

    Args:
        path: Folder or archive, told apart by content.
        split: Sub-folder to use, where the data set has several.

    Raises:
        UserError: There is no image at `path`, its layout is unclear, or its `dataset.json` does not fit it.
    """
    path = Path(path)
    files, every, others = _images_in(path)
    names, depth = _chosen(path, every, split)
    stated = _stated_labels(path, files, names, others)
    if stated is not None:
        labels, classes = stated
        told = tuple(name for name in others if PurePosixPath(name).name != _LABELS_FILE)
        return ImageSource(path, names, labels, classes, files, told)
    folders = [name.split("/")[depth:-1] for name in names]
    found = sorted({parts[0] for parts in folders if parts})
    if not found:
        return ImageSource(path, names, None, (), files, others)
    several = any(len(parts) > 1 and parts[0].lower() in _SPLITS for parts in folders)
    if split is None and (several or {name.lower() for name in found} <= _SPLITS):
        raise UserError(f"{printable(path)} has several parts: {_listed(found)}; choose one with `split`")
    stray = next((name for name, parts in zip(names, folders, strict=True) if not parts), None)
    if stray is not None:
        raise UserError(
            f"{printable(path)} has images beside its sub-folders, such as {printable(stray)}; "
            "put every image into the folder of its class, or none"
        )
    classes = tuple(by_number(found))
    notes = [] if list(classes) == found else [_about_order(path, classes, found)]
    place = {name: number for number, name in enumerate(classes)}
    return ImageSource(path, names, tuple(place[parts[0]] for parts in folders), classes, files, others, tuple(notes))


def _images_in(path: Path) -> tuple[Files, tuple[str, ...], tuple[str, ...]]:
    """Returns the files, the names of images among them, and the others."""
    files = open_files(path)
    names = [name for name in files.names if _is_image(files, name)]
    if not names:
        if not files.names:
            raise UserError(f"{printable(path)} is empty; expected images, or one sub-folder of images per class")
        first, count = printable(files.names[0]), len(files.names)
        raise UserError(f"{printable(path)} holds no image among {count} files, such as {first}; check the folder")
    images = set(names)
    return files, tuple(names), tuple(name for name in files.names if name not in images)


def _is_image(files: Files, name: str) -> bool:
    if PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES:
        return True
    try:
        return files.read(name, 4).startswith(_IMAGE_BEGINNINGS) and is_image(files.read(name))
    except UnreadableFileError:
        return False


def _stated_labels(
    path: Path, files: Files, names: Sequence[str], others: Sequence[str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...]] | None:
    """Returns labels and classes as the nearest `dataset.json` above all images states them; None without one."""
    top = names[0].split("/")[: _shared_depth(tuple(names), [])]
    places = ("/".join([*top[:depth], _LABELS_FILE]) for depth in range(len(top), -1, -1))
    name = next((place for place in places if place in set(others)), None)
    if name is None:
        return None
    try:
        content = parse(files.read(name))
    except (StrictError, UnreadableFileError) as error:
        raise UserError(f"{printable(path)}: {printable(name)} {error}; correct it, or remove it") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None  # another tool's file of this name
    if content["labels"] is None:
        return None, ()
    inside = name.removesuffix(_LABELS_FILE)
    told = _by_name(content["labels"])
    labels = [told.get(image.removeprefix(inside)) for image in names] if told is not None else [None]
    for image, label in zip(names, labels, strict=False):
        if label is None:
            raise UserError(
                f"{printable(path)}: {printable(name)} states no class number for {printable(image)}; expected "
                'pairs of file name and number, such as ["00000/img00000000.png", 3], for every image, or null'
            )
    numbers = [label for label in labels if label is not None]
    return tuple(numbers), tuple(str(number) for number in range(max(numbers) + 1))


def _by_name(stated: Any) -> Mapping[str, int] | None:
    """Returns class numbers by file name; None if they are anything else."""
    pairs = list(stated.items()) if isinstance(stated, dict) else stated
    if not isinstance(pairs, list):
        return None
    good = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)]
    return {
        name.replace("\\", "/"): label
        for name, label in good
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**16
    }


def _chosen(path: Path, names: tuple[str, ...], split: str | None) -> tuple[tuple[str, ...], int]:
    """Returns the names inside the split, and how many leading folders all of them share."""
    wanted = [part for part in (split or "").split("/") if part]
    depth = _shared_depth(names, wanted)
    if wanted:
        inside = tuple(name for name in names if name.split("/")[depth:-1][: len(wanted)] == wanted)
        if not inside:
            folders = {name.split("/")[depth] for name in names if name.count("/") > depth}
            raise UserError(f"{printable(path)} has no folder {split!r}; it has {_listed(sorted(folders)) or 'none'}")
        names = inside
        depth = depth + len(wanted)
    return names, depth + _shared_depth(tuple("/".join(name.split("/")[depth:]) for name in names), [])


def _shared_depth(names: tuple[str, ...], stop: list[str]) -> int:
    """Returns the number of leading folders that hold everything, stopping before the folder named first in `stop`."""
    depth = 0
    for level in zip(*(name.split("/")[:-1] for name in names), strict=False):
        if len(set(level)) > 1 or level[0] in stop[:1]:
            break
        depth += 1
    return depth


def _about_order(path: Path, classes: Sequence[str], as_text: Sequence[str]) -> str:
    place = next(n for n, (ours, text) in enumerate(zip(classes, as_text, strict=True)) if ours != text)
    return (
        f"{printable(path.name)} has numbered classes, which are taken in the order of their numbers: label {place} is "
        f"{printable(classes[place])}, which sorting as text would give to {printable(as_text[place])}"
    )


def _about_others(source: ImageSource) -> list[str]:
    if not source.others:
        return []
    count = len(source.others)
    kind = "file that is no image" if count == 1 else "files that are no images"
    told = f"{printable(source.path.name)} holds {count} {kind}"
    stems = {str(PurePosixPath(name).with_suffix("")) for name in source.names}
    beside = [name for name in source.others if str(PurePosixPath(name).with_suffix("")) in stems]
    captions = [name for name in beside if PurePosixPath(name).suffix.lower() in (".txt", ".caption")]
    if captions:
        captioned = f"; {len(captions)} may be captions of the images beside them: such a folder can be read as prompts"
        return [f"{told} ({_listed(source.others)}){captioned}"]
    return [f"{told} ({_listed(source.others)})"]


def _listed(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(printable(name) for name in names[:limit]) + (", …" if len(names) > limit else "")
