"""Vocabularies in SentencePiece's file format, a protocol buffer, read without its library.

Only what a unigram tokenizer needs is kept: field 1 repeats pieces (1: text, 2: score), field 3 is the normaliser
(2: its compiled character map). Imports no torch.
"""

import struct
from collections.abc import Iterator

from diffcore.io.strictjson import StrictError

MAX_PIECES = 300_000


def read_pieces(data: bytes) -> tuple[list[tuple[str, float]], bytes | None]:
    """Returns the pieces with their scores, and the character map if there is one.

    Raises:
        StrictError: The bytes are not such a file.
    """
    pieces: list[tuple[str, float]] = []
    charsmap = None
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
            if len(pieces) > MAX_PIECES:
                raise StrictError(f"has more than {MAX_PIECES:,} pieces")
        elif field == 3 and isinstance(value, bytes):
            charsmap = next((v for f, v in _fields(value) if f == 2 and isinstance(v, bytes)), None)
    if not pieces:
        raise StrictError("is no SentencePiece vocabulary")
    return pieces, charsmap or None


def _piece(data: bytes) -> tuple[str, float]:
    fields = dict(_fields(data))
    text, score = fields.get(1), fields.get(2, 0.0)
    if not isinstance(text, bytes) or not isinstance(score, float):
        raise StrictError("has a piece without text or score")
    try:
        return text.decode(), score
    except UnicodeDecodeError:
        raise StrictError("has a piece that is not UTF-8") from None


def _fields(data: bytes) -> Iterator[tuple[int, bytes | float | int]]:
    """Yields (number, value) of a message: varints as int, 32-bit fields as float, the rest as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, position = _varint(data, position)
        if size is None or position + size > len(data):
            raise StrictError("is no SentencePiece vocabulary, or is truncated")
        part = data[position : position + size]
        yield number, struct.unpack("<f", part)[0] if wire == 5 else part
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise StrictError("is no SentencePiece vocabulary, or is truncated")
