"""Decoding one untrusted image file to 8-bit RGB or grey.

The format is told by the content, not by the file's name. Every error of Pillow becomes one exception with
a reason.
"""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from diffcore.data import png
from diffcore.data.files import UnreadableFileError
from diffcore.errors import printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


class Decoded(NamedTuple):
    """An image, and notes on conversions that its owner may not expect."""

    pixels: UInt8[np.ndarray, "c h w"]
    notes: tuple[str, ...]


def is_image(data: bytes) -> bool:
    """Returns whether the bytes start like an image of a supported format."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    except Exception:
        return False


def decode(data: bytes, *, channels: int = 3, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> Decoded:
    """Returns the pixels as a person sees them: upright, on white, 8 bits.

    Args:
        data: Bytes of the image file.
        channels: Number of channels: 3 for RGB, 1 for grey.
        max_pixels: Width times height above which the image is refused before it is decoded.
        formats: Formats that are read, in Pillow's words.

    Raises:
        UnreadableFileError: The bytes are no image of a supported format, damaged, or too large.
    """
    try:
        flat, notes = _opened(data, max_pixels, formats)
    except UnreadableFileError:
        raise
    except UnidentifiedImageError:
        *others, last = ("WebP" if name == "WEBP" else name for name in formats)
        raise UnreadableFileError(f"is not a {', '.join(others)} or {last} image") from None
    except Exception as error:  # ValueError, SyntaxError, struct.error, MemoryError, DecompressionBombError and others
        raise UnreadableFileError(f"is damaged: {printable(error) or type(error).__name__}") from None
    pixels = np.array(flat.convert("RGB" if channels == 3 else "L"))
    return Decoded(pixels.transpose(2, 0, 1) if channels == 3 else pixels[None], tuple(notes))


def _opened(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> tuple[Image.Image, list[str]]:
    """Returns the image in mode L or RGB, and notes; a PNG that fails is read again without its metadata."""
    try:
        return _flat(data, max_pixels, formats)
    except UnreadableFileError:
        raise
    except Exception:
        shorter = png.pixels_alone(data) if data.startswith(png.SIGNATURE) else data
        if shorter == data:
            raise
    return _flat(shorter, max_pixels, formats)


def _flat(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> tuple[Image.Image, list[str]]:
    with Image.open(io.BytesIO(data), formats=formats) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise UnreadableFileError(f"has {width} x {height} pixels; the limit is {max_pixels:g} (`max_pixels`)")
        frames = getattr(image, "n_frames", 1)
        notes = [f"is animated; the first of its {frames} frames is used"] if frames > 1 else []
        bits = _known_bits(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else 16
        image.load()
        if image.has_transparency_data and image.mode != "I;16":
            notes.append("has transparency; it lies on white")
        return _eight_bits(_upright(image), bits), notes


def flattened(image: Image.Image) -> Image.Image:
    """Returns an image in memory as a person sees it: upright, on white, in mode L or RGB.

    Args:
        image: An image of any mode; integers longer than 8 bits are taken for 16 bits.

    Raises:
        UnreadableFileError: Its numbers have no known range.

    Example:
        >>> flattened(Image.new("LA", (2, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    return _eight_bits(_upright(image), 16)


def _known_bits(image: TiffImagePlugin.TiffImageFile) -> int:
    """Returns the bits of each sample; refuses integer images whose value of white is not known.

    Unsigned integers of up to 16 bits reach from black to white. Signed and longer ones are measurements or labels of
    unknown range; Pillow wraps, clips or reinterprets some of them silently.
    """
    bits, kinds = image.tag_v2.get(BITSPERSAMPLE, (1,)), image.tag_v2.get(SAMPLEFORMAT, (1,))
    if 2 in kinds or (1 in kinds and max(bits) > 16):
        kind = "signed" if 2 in kinds else "unsigned"
        raise UnreadableFileError(f"holds {kind} integers of {max(bits)} bits, whose range is not known; save 8 or 16")
    if max(bits) > 8 and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        raise UnreadableFileError(f"holds {max(bits)} bits of which 0 is white; save it with 0 as black")
    return max(bits)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return image


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Returns the image in mode L or RGB; `bits` is the number of bits that long integers use."""
    if image.mode.startswith("I"):
        return Image.fromarray(_to_eight(np.asarray(image), bits))
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise UnreadableFileError("holds floating-point values that are not all in [0, 1]")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _to_eight(values: np.ndarray, bits: int) -> np.ndarray:
    """Scales 12 or 16 bits to 8; Pillow's own conversion clips at 255."""
    if values.min() < 0 or values.max() >= 2**bits:
        raise UnreadableFileError(f"holds integers beyond {bits} bits")
    return np.rint(values * (255 / (2**bits - 1))).astype(np.uint8)


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except Exception:  # a profile that cannot be used is as good as none
            return image.convert("RGB")
    return image.convert("RGB")
