"""Images with a mask for each: a PNG of the same size whose values are the classes of the pixels.

Either `images/NAME.jpg` with `masks/NAME.png`, or `NAME.jpg` with `NAME_mask.png` in one folder. A mask is grey or has
a palette, of which the numbers count and not the colours; 255 stands for pixels that do not count.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from diffcore.data.decode import decode
from diffcore.data.files import UnreadableFileError
from diffcore.errors import UserError, printable
from diffusion_featsel.gram import IGNORED, labels_on_grid

_MAX_PIXELS = 64_000_000
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_MODES = {"L", "P", "1", "I;16", "I"}


@dataclass(frozen=True)
class MaskedImages:
    """Images and their masks, not yet read.

    Attributes:
        root: Folder of the data set.
        names: Path of each image below the folder, sorted as text.
        masks: Path of each image's mask below the folder.
        without_mask: Images that have no mask, and are left out.
    """

    root: Path
    names: tuple[str, ...]
    masks: tuple[str, ...]
    without_mask: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Returns an image at its own size, upright and on white.

        Raises:
            UserError: The file is damaged or too large.
        """
        path = self.root / self.names[index]
        try:
            return torch.from_numpy(decode(path.read_bytes(), max_pixels=_MAX_PIXELS).pixels)
        except UnreadableFileError as error:
            raise UserError(f"{printable(path, 300)} {error}; replace it, or remove it and its mask") from None

    def mask(self, index: int, num_classes: int | None = None) -> Int[Tensor, "h w"]:
        """Returns the classes of an image's pixels.

        Args:
            index: Number of the image.
            num_classes: Number of classes that exist; not checked by default.

        Raises:
            UserError: The file is damaged, has colours instead of numbers, or a class does not exist.
        """
        path = self.root / self.masks[index]
        classes = torch.from_numpy(_read(path))
        if num_classes is not None:
            wrong = classes[(classes != IGNORED) & ((classes < 0) | (classes >= num_classes))]
            if len(wrong):
                raise UserError(
                    f"{printable(path, 300)} has the class {int(wrong[0])}; classes are 0 to {num_classes - 1}, and "
                    f"{IGNORED} where a pixel does not count"
                )
        return classes

    def labels(self, grid: tuple[int, int], num_classes: int | None = None) -> Int[Tensor, "b gh gw"]:
        """Returns the classes of all images at the centres of the cells of a grid; errors are those of `mask`."""
        rows = [labels_on_grid(self.mask(index, num_classes)[None], grid)[0] for index in range(len(self))]
        return torch.stack(rows)


def list_masked(root: str | Path) -> MaskedImages:
    """Lists the images of a folder that have a mask.

    Raises:
        UserError: There is no image with a mask.
    """
    root = Path(root)
    apart = (root / "images").is_dir() and (root / "masks").is_dir()
    folder = root / "images" if apart else root
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in _SUFFIXES)
    files = [path for path in files if apart or not path.stem.endswith("_mask")]
    names, masks, without = [], [], []
    for path in files:
        inside = path.relative_to(folder)
        mask = root / "masks" / inside.with_suffix(".png") if apart else path.with_name(f"{path.stem}_mask.png")
        if mask.is_file():
            names.append(path.relative_to(root).as_posix())
            masks.append(mask.relative_to(root).as_posix())
        else:
            without.append(path.relative_to(root).as_posix())
    if not names:
        raise UserError(
            f"{printable(root)} has no image with a mask; put images/NAME.jpg and masks/NAME.png there, or NAME.jpg "
            "and NAME_mask.png"
        )
    return MaskedImages(root, tuple(names), tuple(masks), tuple(without))


def masks_alone(root: str | Path) -> MaskedImages | None:
    """Lists the masks of a folder that holds nothing else, each named like its image; None for other folders.

    Args:
        root: Folder of PNG files with grey values or a palette.
    """
    root = Path(root)
    if not root.is_dir() or (root / "masks").is_dir():
        return None
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in _SUFFIXES)
    if not files or any(path.suffix.lower() != ".png" or path.stem.endswith("_mask") for path in files):
        return None
    names = tuple(path.relative_to(root).as_posix() for path in files)
    return MaskedImages(root, names, names)


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in _MODES:
                raise UserError(
                    f"{printable(path, 300)} has colours ({image.mode}); write the numbers of classes as grey"
                )
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(f"{printable(path, 300)} has more than {_MAX_PIXELS:,} pixels; make it smaller")
            return np.asarray(image).astype(np.int64)
    except UserError:
        raise
    except Exception as error:  # Pillow has many
        raise UserError(f"{printable(path, 300)} is no readable PNG ({printable(error)}); replace it") from None
