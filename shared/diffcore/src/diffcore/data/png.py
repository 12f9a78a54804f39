"""Stripping PNG files of the metadata beside their pixels."""

import re
import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OF_PIXELS = {b"tRNS", b"eXIf"}  # what else their colour and orientation depend on here
_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)[1-8]")
_OLD_EXIF = b"Raw profile type exif\0"  # where the orientation stood before PNG had a place for it
_LOOKED_AT = 2**20  # bytes of a text, where an editor's note of the orientation is looked for


def pixels_alone(data: bytes) -> bytes:
    """Returns a PNG without the chunks that its pixels do not need; of an editor's XMP, the orientation stays.

    Image libraries bound the size of texts, and refuse a whole image for a fault in what is written beside its pixels.
    Colour profiles and gamma are left out too: `decode` never applies those of PNGs.

    Args:
        data: A file that begins with `SIGNATURE`.
    """
    kept, place = [SIGNATURE], len(SIGNATURE)
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        if kind[:1].isupper() or kind in _OF_PIXELS or body.startswith(_OLD_EXIF):
            kept.append(data[place : place + size + 12])  # with its own checksum: damaged pixels stay damaged
        elif turned := kind == b"iTXt" and _ORIENTATION.search(_beginning_of_text(body)):
            kept.append(_chunk(kind, b"XML:com.adobe.xmp\0\0\0\0\0" + turned[0]))
        place += size + 12
    return b"".join(kept)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def _beginning_of_text(body: bytes) -> bytes:
    """Returns the first mebibyte of an international text, decompressed."""
    keyword, _, rest = body.partition(b"\0")
    if keyword != b"XML:com.adobe.xmp" or len(rest) < 2:
        return b""
    text = rest[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(text, _LOOKED_AT) if rest[0] else text[:_LOOKED_AT]
    except zlib.error:
        return b""
