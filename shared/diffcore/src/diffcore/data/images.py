"""Images from a folder or a zip archive, as one tensor with labels."""

import hashlib
import os
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diffcore.data.files import UnreadableFileError
from diffcore.data.source import MAX_PIXELS, ImageSource, open_images
from diffcore.errors import UserError, printable

_AHEAD = 512  # images decoded and not yet stored
_TASK = 16  # images per hand-over to a thread: small images decode faster than threads switch


@dataclass(frozen=True)
class ImageSet:
    """Images of one size in memory.

    Attributes:
        images: 8-bit pixels of all images.
        labels: Index into `classes` for each image; None without classes.
        classes: Names of the classes; empty without classes.
        names: File name of each image.
        skipped: Name and reason of each image that could not be used.
        notes: Sentences about conversions of images, the origin of labels, and files that are no images.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"] | None
    classes: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sha256(self) -> str:
        """Digest of pixels, labels and names: the same images give the same, whatever else lies beside them."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes, self.names)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def x0(self) -> Float[Tensor, "n c h w"]:
        """Returns the images in [-1, 1], as pixel-space denoisers see them."""
        return self.images.float() / 127.5 - 1

    def unit(self) -> Float[Tensor, "n c h w"]:
        """Returns the images in [0, 1]."""
        return self.images.float() / 255


def load_images(
    path: str | Path,
    *,
    size: int | None = None,
    split: str | None = None,
    channels: Literal[1, 3] = 3,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
) -> ImageSet:
    """Reads all images of a folder or zip archive.

    An image that is damaged, too large or of an unsupported format is skipped and listed in the result; files that are
    no images do not count.

    Args:
        path: Folder or zip archive to read.
        size: Side in pixels: images are cropped to their central square and resized. None takes them as they are.
        split: Sub-folder to use, where the data set has several.
        channels: Number of channels: 3 for RGB, 1 for grey.
        strict: Whether the first unusable image is an error.
        max_pixels: Width times height above which a file is not decoded.
        threads: Number of decoding threads; by default as many as cores, 8 at most.

    Raises:
        UserError: No image can be read, or sizes differ and `size` is None.
    """
    if size is not None and size < 1:
        raise UserError(f"`size` is {size}; it must be at least 1")
    source = open_images(path, split=split)
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    notes: dict[str, list[str]] = {}
    images: Tensor | None = None
    with warnings.catch_warnings(), closing(_decoded(source, size, channels, max_pixels, threads)) as stream:
        # What Pillow says about damaged metadata is not about the pixels; damaged pixels are listed by name.
        warnings.filterwarnings("ignore", module="PIL")
        for index, result in enumerate(stream):
            name = source.names[index]
            if isinstance(result, UnreadableFileError):
                if strict:
                    raise UserError(f"{printable(name)} {result}; remove it, or leave out `strict`")
                skipped.append((name, str(result)))
                continue
            pixels, remarks = result
            if images is None:
                images = _room(len(source.names), pixels)
            if pixels.shape != images.shape[1:]:
                raise UserError(_mixed(source.names[kept[0]], images[0], name, pixels))
            images[len(kept)] = pixels
            kept.append(index)
            for remark in remarks:
                notes.setdefault(remark, []).append(name)
    if images is None:
        raise UserError(_nothing(source, skipped))
    labels = None if source.labels is None else torch.tensor([source.labels[index] for index in kept])
    return ImageSet(
        images if len(kept) == len(images) else images[: len(kept)].clone(),
        labels,
        source.classes,
        tuple(source.names[index] for index in kept),
        tuple(skipped),
        (*source.remarks, *(_note(remark, names) for remark, names in notes.items())),
    )


def resize(image: UInt8[Tensor, "c h w"], size: int) -> UInt8[Tensor, "c size size"]:
    """Returns the central square, resized by antialiased bicubic interpolation in float32 and rounded once."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square
    scaled = F.interpolate(square[None].float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].round().clamp(0, 255).to(torch.uint8)


def _decoded(
    source: ImageSource, size: int | None, channels: int, max_pixels: int, threads: int | None
) -> Generator[tuple[Tensor, Sequence[str]] | UnreadableFileError]:
    """Decodes on a thread pool, a bounded number ahead, in order."""
    total = len(source.names)

    def work(index: int) -> tuple[Tensor, Sequence[str]] | UnreadableFileError:
        try:
            pixels, notes = source.decode(index, channels=channels, max_pixels=max_pixels)
        except UnreadableFileError as error:
            return error
        image = torch.from_numpy(pixels.copy())
        return (image if size is None else resize(image, size)), notes

    def work_on(first: int) -> list[tuple[Tensor, Sequence[str]] | UnreadableFileError]:
        return [work(index) for index in range(first, min(first + _TASK, total))]

    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        try:
            for start in range(0, total, _AHEAD):
                for done in pool.map(work_on, range(start, min(start + _AHEAD, total), _TASK)):
                    yield from done
        finally:
            pool.shutdown(cancel_futures=True)


def _room(count: int, first: Tensor) -> Tensor:
    try:
        return torch.empty(count, *first.shape, dtype=torch.uint8)
    except RuntimeError:
        gigabytes = count * first.numel() / 1e9
        raise UserError(f"{count} images like the first take {gigabytes:.0f} GB of memory; choose a `size`") from None


def _mixed(first: str, image: Tensor, second: str, other: Tensor) -> str:
    (h, w), (other_h, other_w) = image.shape[1:], other.shape[1:]
    return (
        f"images differ in size: {printable(first)} is {w} x {h}, {printable(second)} is {other_w} x {other_h}; "
        f"give them one with `size` {min(h, w, other_h, other_w)}"
    )


def _nothing(source: ImageSource, skipped: list[tuple[str, str]]) -> str:
    name, reason = skipped[0]
    return (
        f"{printable(source.path)} has no readable image among {len(skipped)}; the first, {printable(name)}, {reason}"
    )


def _note(remark: str, names: list[str]) -> str:
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{printable(names[0])}{others} {remark}"
