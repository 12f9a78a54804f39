"""Images of a folder, archive or file: listed by what they show, so that the same picture is computed once."""

import io
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffcore.data import ImageSource, UnreadableFileError, list_images
from diffcore.data.decode import FORMATS, decode
from diffcore.data.files import FolderFiles
from diffcore.data.source import MAX_PIXELS
from diffcore.errors import UserError, printable
from diffcore.runtime import default_threads
from diffusion_featsel.prepare import digest_of_pixels

READ = (*FORMATS, "GIF")
_AHEAD = 64  # images decoded at a time


@dataclass(frozen=True)
class ListedImage:
    """One image file, of which the pixels are known and not kept.

    Attributes:
        name: Name of the file below its folder.
        sha256: Digest of size and RGB pixels; two files that show the same have the same.
        original: Height and width in pixels, upright.
        notes: Sentences about conversions that its owner may not expect.
    """

    name: str
    sha256: str
    original: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> int:
        """The number that the noise of the image depends on; see `diffusion_featsel.prepare.image_keys`."""
        return int(self.sha256[:16], 16) >> 1


@dataclass(frozen=True)
class ImageList:
    """The images of a folder, archive or file.

    Attributes:
        source: Where they are read from.
        images: All images that can be read, sorted by name.
        skipped: Name of each file that cannot be used, and the reason.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> for name in ("a.png", "b.gif"):
        ...     Image.new("L", (4, 3)).save(folder / name)
        >>> found = ImageList.of(folder)
        >>> len(found.images), len(found.distinct), found.skipped
        (2, 1, ())
    """

    source: ImageSource
    images: tuple[ListedImage, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, path: Path | str, *, max_pixels: int = MAX_PIXELS, threads: int | None = None) -> "ImageList":
        """Reads every image once and keeps its digest.

        Args:
            path: Folder, zip archive or single file.
            max_pixels: Width times height above which a file is skipped.
            threads: Number of decoding threads; by default as many as cores, 8 at most.

        Raises:
            UserError: There is no image, or none can be read.
        """
        source = _source(Path(path))
        images: list[ListedImage] = []
        skipped: list[tuple[str, str]] = []

        def listed(name: str) -> ListedImage | str:
            try:
                decoded = decode(source.files.read(name), max_pixels=max_pixels, formats=READ)
            except UnreadableFileError as error:
                return str(error)
            height, width = decoded.pixels.shape[1:]
            return ListedImage(name, digest_of_pixels(decoded.pixels), (height, width), decoded.notes)

        with warnings.catch_warnings(), ThreadPoolExecutor(threads or default_threads()) as pool:
            # What Pillow says about damaged metadata is not about the pixels; damaged pixels are listed by name.
            warnings.filterwarnings("ignore", module="PIL")
            for name, found in zip(source.names, pool.map(listed, source.names), strict=True):
                if isinstance(found, str):
                    skipped.append((name, found))
                else:
                    images.append(found)
        if not images:
            name, reason = skipped[0]
            raise UserError(
                f"{printable(path)} has no readable image among {len(skipped)} files; the first, {printable(name)}, "
                f"{reason}"
            )
        return cls(source, tuple(images), tuple(skipped))

    @property
    def distinct(self) -> tuple[ListedImage, ...]:
        """The images without those that show what an earlier one shows."""
        found: dict[str, ListedImage] = {}
        for image in self.images:
            found.setdefault(image.sha256, image)
        return tuple(found.values())

    def read(self, images: Sequence[ListedImage]) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Returns the pixels of some images, upright and on white.

        Args:
            images: Images of this list.

        Raises:
            UserError: A file has changed since it was listed.
        """
        with warnings.catch_warnings(), ThreadPoolExecutor(default_threads()) as pool:
            warnings.filterwarnings("ignore", module="PIL")
            return list(pool.map(self._pixels, images))

    def pictures(self, images: Sequence[ListedImage]) -> list[Image.Image]:
        """Returns images of Pillow in the mode that their files have, for the protocol of the published code.

        Args:
            images: Images of this list.

        Raises:
            UserError: A file has changed since it was listed.
        """
        opened = []
        for image in images:
            self._pixels(image)
            picture = Image.open(io.BytesIO(self.source.files.read(image.name)), formats=READ)
            picture.load()
            opened.append(picture)
        return opened

    def _pixels(self, image: ListedImage) -> np.ndarray:
        try:
            pixels = decode(self.source.files.read(image.name), max_pixels=2**62, formats=READ).pixels
        except UnreadableFileError as error:
            raise UserError(f"{printable(image.name)} {error}, since it was listed; start again") from None
        if digest_of_pixels(pixels) != image.sha256:
            raise UserError(f"{printable(image.name)} has changed since it was listed; start again")
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def prompts_of(prompts: Mapping[str, str] | None, images: Sequence[ListedImage]) -> list[str] | None:
    """Returns the prompt of each image; None where there are none.

    Args:
        prompts: Prompts by file name.
        images: The images, in order.

    Raises:
        UserError: An image has no prompt.
    """
    if prompts is None:
        return None
    if missing := [image.name for image in images if image.name not in prompts]:
        raise UserError(f"{len(missing)} images have no prompt, such as {printable(missing[0])}; give each one")
    return [prompts[image.name] for image in images]


def _source(path: Path) -> ImageSource:
    if path.is_file() and path.suffix.lower() != ".zip":
        return ImageSource(path.parent, (path.name,), None, (), _OneFile(path))
    return list_images(path)


class _OneFile(FolderFiles):
    """A single file in the form of a folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path.parent, (path.name,)
