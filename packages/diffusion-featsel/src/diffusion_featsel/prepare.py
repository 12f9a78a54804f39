"""Images of any size and kind as the network's input: what is kept of a picture, where it lies, and its key.

A key is a number made from the pixels of the image as it came, before it is resized. The noise of an image depends on
its key, so that equal images get equal noise in any batch, in any order and on any device.

Pixel centres lie at whole coordinates: pixel x of n covers x - 0.5 to x + 0.5, so an edge is at -0.5 and at n - 0.5.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diffcore.data.decode import flattened
from diffcore.errors import UserError

Mode = Literal["squash", "letterbox", "crop", "native"]
"""How an image of another shape fills the network's input."""

Picture = Image.Image | UInt8[np.ndarray, "_ _ 3"] | UInt8[Tensor, "3 _ _"] | Float[Tensor, "3 _ _"]
"""One image: of Pillow in any mode, an array or tensor of 8 bits, or a tensor in [0, 1]."""

_GREY = 0.5  # fills letterboxes: the middle of the range, which networks see as 0
Points = TypeVar("Points", bound=Float[Tensor, "*n 2"])


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input.

    Attributes:
        original: Height and width of the image as it came.
        source: Part of it that is kept: top, left, height and width in its own pixels.
        target: Place of this part in the network's input: top, left, height and width in pixels of that.
        size: Height and width of the network's input.

    Example:
        >>> placement = placed((100, 200), (64, 64), mode="letterbox")
        >>> placement.target
        (16, 0, 32, 64)
        >>> placement.to_input(torch.tensor([[99.5, 49.5]]))
        tensor([[31.5000, 31.5000]])
    """

    original: tuple[int, int]
    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    size: tuple[int, int]

    def to_input(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Returns where points (x, y) of the original image lie in the network's input, in pixels."""
        return _moved(points, self.source, self.target)

    def to_original(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Returns where points (x, y) of the network's input lie in the original image, in pixels."""
        return _moved(points, self.target, self.source)


def _moved(points: Tensor, from_: tuple[int, int, int, int], to: tuple[int, int, int, int]) -> Tensor:
    corner, sides = points.new_tensor([from_[1], from_[0]]), points.new_tensor([from_[3], from_[2]])
    new_corner, new_sides = points.new_tensor([to[1], to[0]]), points.new_tensor([to[3], to[2]])
    return (points + 0.5 - corner) * new_sides / sides + new_corner - 0.5


@dataclass(frozen=True)
class Prepared:
    """Images as the network takes them.

    Attributes:
        images: The images in [0, 1], all of one size.
        keys: One number per image, made from its pixels as it came.
        placements: Where each image lies in the network's input.
    """

    images: Float[Tensor, "b 3 h w"]
    keys: tuple[int, ...]
    placements: tuple[Placement, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, places: slice) -> "Prepared":
        """Returns some of the images."""
        return replace(self, images=self.images[places], keys=self.keys[places], placements=self.placements[places])


def prepare(
    images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | Sequence[Picture],
    size: int | tuple[int, int] | None = None,
    *,
    mode: Mode = "squash",
    multiple: int = 1,
    published: bool = False,
    keys: Sequence[int] | None = None,
) -> Prepared:
    """Resizes images to one size, in RGB and antialiased, and gives each its key.

    Args:
        images: Images of any size; tensors of floats hold values in [0, 1].
        size: Side of square inputs in pixels, or height and width. In the mode "native" it is the longer side. None
            leaves images at their own size, which then must be one size for all.
        mode: "squash" stretches the image to the size, "letterbox" keeps its proportions within grey bars, "crop" keeps
            the middle, and "native" keeps the proportions, each side rounded to a multiple.
        multiple: Number of pixels that each side is to be a multiple of; see `multiple_of`.
        published: Whether to resize as the published code does: by Pillow, with the proportions ignored, before colours
            are converted, so that transparency and palettes differ; tensors bilinearly, without antialiasing.
        keys: One number per image, where they are known already, as for files.

    Raises:
        UserError: The size does not fit the network, or images end up at different sizes.
        ValueError: There is no image, one has no pixels, or the numbers of images and keys differ.

    References:
        Meng et al. 2024; `published` as in their published code.

    Example:
        >>> ready = prepare([Image.new("L", (30, 20)), Image.new("RGB", (8, 8))], 16)
        >>> tuple(ready.images.shape), ready.placements[0].original
        ((2, 3, 16, 16), (20, 30))
    """
    if len(images) == 0:
        raise ValueError("there is no image; give at least one")
    if keys is not None and len(keys) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(keys)} `keys`; give one key per image")
    if published and mode != "squash":
        raise UserError(f"`mode` is {mode!r}, but the published protocol ignores proportions; leave it at 'squash'")
    ours = None if published else images if isinstance(images, Tensor) else [as_rgb(image) for image in images]
    known = tuple(keys) if keys is not None else tuple(image_keys(images if ours is None else ours))
    whole = images if isinstance(images, Tensor) else None
    sizes = [_sides(whole)] * len(images) if whole is not None else [_sides(image) for image in ours or images]
    placements = tuple(placed(own, size, mode=mode, multiple=multiple) for own in sizes)
    for placement, own in zip(placements, sizes, strict=True):
        if placement.size != placements[0].size:
            first, other = _spelled(placements[0].size), _spelled(placement.size)
            raise UserError(
                f"images of one batch end up at {first} and {other} pixels (the latter from {_spelled(own)}); give a "
                "`size` with another mode than 'native', or prepare them apart"
            )
    if whole is not None:
        return Prepared(_resized(_floats(whole), placements[0], published=published), known, placements)
    if ours is None:
        rows = [_published(image, placement.size) for image, placement in zip(images, placements, strict=True)]
    else:
        rows = [
            _resized(_floats(image)[None], placement, published=False)[0]
            for image, placement in zip(ours, placements, strict=True)
        ]
    return Prepared(torch.stack(rows), known, placements)


def placed(
    original: tuple[int, int], size: int | tuple[int, int] | None, *, mode: Mode = "squash", multiple: int = 1
) -> Placement:
    """Returns where an image of some height and width lies in the network's input; arguments as in `prepare`.

    Raises:
        UserError: The size is no multiple of `multiple`, or no height and width.
        ValueError: The image has no pixels.

    Example:
        >>> placed((480, 640), None, mode="native", multiple=64).size
        (512, 640)
    """
    height, width = original
    if height < 1 or width < 1:
        raise ValueError(f"an image is {height}x{width} pixels; both sides must be at least 1")
    if mode == "native":
        if isinstance(size, tuple):
            raise UserError(f"`size` is {size}, but the mode 'native' keeps proportions; give the longer side alone")
        scale = 1.0 if size is None else size / max(original)
        sides = tuple(max(round(side * scale / multiple), 1) * multiple for side in original)
        return Placement(original, (0, 0, height, width), (0, 0, sides[0], sides[1]), (sides[0], sides[1]))
    new_height, new_width = (size, size) if isinstance(size, int) else size or original
    if new_height < 1 or new_width < 1 or new_height % multiple or new_width % multiple:
        near = tuple(max(round(side / multiple), 1) * multiple for side in (new_height, new_width))
        raise UserError(
            f"`size` is {_spelled((new_height, new_width))} pixels; this network takes multiples of {multiple}, such "
            f"as {_spelled(near)}"
        )
    source, target = (0, 0, height, width), (0, 0, new_height, new_width)
    if mode == "letterbox":
        scale = min(new_height / height, new_width / width)
        h, w = max(round(height * scale), 1), max(round(width * scale), 1)
        target = ((new_height - h) // 2, (new_width - w) // 2, h, w)
    elif mode == "crop":
        scale = max(new_height / height, new_width / width)
        h, w = max(round(new_height / scale), 1), max(round(new_width / scale), 1)
        source = ((height - h) // 2, (width - w) // 2, h, w)
    return Placement(original, source, target, (new_height, new_width))


def image_keys(
    images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | Sequence[Picture],
) -> list[int]:
    """Returns a number below 2**63 for each image, from a digest of its size and pixels.

    Images with equal pixels in 8 bits have equal keys, whatever they are stored as: a tensor in [0, 1] has the key of
    the 8-bit image that it rounds to.

    Args:
        images: Images of any size; tensors of floats hold values in [0, 1].

    Example:
        >>> black = torch.zeros(2, 3, 4, 4)
        >>> first, second = image_keys(black)
        >>> first == second == image_keys([Image.new("L", (4, 4))])[0]
        True
    """
    rows = _bytes(images) if isinstance(images, Tensor) else [_bytes(as_rgb(image)) for image in images]
    return [key_of(row.numpy()) for row in rows]


def key_of(pixels: UInt8[np.ndarray, "3 h w"]) -> int:
    """Returns the key of an image from its pixels in RGB; see `image_keys`."""
    return int(digest_of_pixels(pixels)[:16], 16) >> 1


def digest_of_pixels(pixels: UInt8[np.ndarray, "3 h w"]) -> str:
    """Returns the sha256, in hexadecimal, of an image's height, width and RGB pixels row by row."""
    digest = hashlib.sha256(struct.pack("<QQ", *pixels.shape[1:]))
    digest.update(np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes())
    return digest.hexdigest()


def as_rgb(image: Picture) -> Float[Tensor, "3 h w"] | UInt8[Tensor, "3 h w"]:
    """Returns an image as a tensor in RGB, upright and on white; tensors stay what they are.

    Raises:
        UnreadableFileError: The numbers of an image of Pillow have no known range.

    Example:
        >>> as_rgb(Image.new("RGBA", (1, 1)))[:, 0, 0].tolist()
        [255, 255, 255]
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, Image.Image):
        image = np.array(flattened(image).convert("RGB"))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _sides(image: Picture | Tensor) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.size[1], image.size[0]
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.shape[:2]
    return int(height), int(width)


def _floats(images: Tensor) -> Tensor:
    return images.float() if images.is_floating_point() else images.float() / 255


def _bytes(images: Tensor) -> Tensor:
    if images.is_floating_point():
        images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return images.cpu()


def _resized(images: Tensor, placement: Placement, *, published: bool) -> Tensor:
    """Returns images of one size in their place; those that have the size already stay as they are."""
    if published:
        same = tuple(images.shape[-2:]) == placement.size
        return images if same else F.interpolate(images, placement.size, mode="bilinear", align_corners=False)
    top, left, height, width = placement.source
    part = images[..., top : top + height, left : left + width]
    if part.shape[-2:] != placement.target[2:]:
        part = F.interpolate(part, placement.target[2:], mode="bicubic", antialias=True, align_corners=False)
        part = part.clamp(0, 1)
    top, left, height, width = placement.target
    if (height, width) == placement.size:
        return part
    bars = (left, placement.size[1] - left - width, top, placement.size[0] - top - height)
    return F.pad(part, bars, value=_GREY)


def _published(image: Picture, size: tuple[int, int]) -> Tensor:
    if isinstance(image, Tensor):
        return F.interpolate(_floats(image)[None], size, mode="bilinear", align_corners=False)[0]
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    pixels = np.array(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC).convert("RGB"))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255


def _spelled(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
