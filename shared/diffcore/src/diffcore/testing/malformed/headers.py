"""Malformed safetensors files: false headers, data that does not fit, weights of another model."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffcore.testing.malformed.case import WEIGHTS, Bases, Case, copied, replaced

Header = dict[str, Any]
_NAME = "transformer_blocks.0.attn1.to_q.bias"  # 16 numbers in float32
_OTHER = "transformer_blocks.0.attn1.to_k.bias"


def pack(header: bytes, data: bytes) -> bytes:
    """Returns a file of a header and data."""
    return struct.pack("<Q", len(header)) + header + data


def unpack(file: bytes) -> tuple[Header, bytes]:
    """Returns the header and the data of a valid file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def header_cases(seed: int) -> Iterator[Case]:
    """Yields malformed weight files of a backbone folder."""
    for name, change in whole_files(seed):
        yield Case(f"file: {name}", "safetensors", lambda b, f, c=change: _changed(b, f, c))
    for name, edit in _header_edits():
        yield Case(f"header: {name}", "safetensors", lambda b, f, e=edit: _changed(b, f, lambda d: _edited(d, e)))
    for name, text in _header_texts():
        yield Case(
            f"header text: {name}", "safetensors", lambda b, f, t=text: _changed(b, f, lambda d: _retexted(d, t))
        )
    for name, poison in _poisons():
        yield Case(f"data: {name}", "safetensors", lambda b, f, p=poison: _changed(b, f, lambda d: _poisoned(d, p)))


def _changed(bases: Bases, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    model = copied(bases.backbone, folder)
    replaced(model / WEIGHTS, change((bases.backbone / WEIGHTS).read_bytes()))
    return model


def _edited(file: bytes, edit: Callable[[Header], None]) -> bytes:
    header, data = unpack(file)
    edit(header)
    return pack(json.dumps(header).encode(), data)


def _retexted(file: bytes, change: Callable[[str], str]) -> bytes:
    header, data = unpack(file)
    return pack(change(json.dumps(header)).encode("utf-8", "surrogatepass"), data)


def _poisoned(file: bytes, value: bytes) -> bytes:
    header, data = unpack(file)
    start = header[_NAME]["data_offsets"][0] + 8
    return pack(json.dumps(header).encode(), data[:start] + value + data[start + len(value) :])


def whole_files(seed: int) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Yields ways to damage the bytes of any safetensors file."""
    yield "empty", lambda d: b""
    yield "one byte", lambda d: d[:1]
    yield "seven bytes", lambda d: d[:7]
    yield "length alone", lambda d: d[:8]
    yield "length of zero", lambda d: struct.pack("<Q", 0) + d[8:]
    yield "length one short", lambda d: struct.pack("<Q", struct.unpack("<Q", d[:8])[0] - 1) + d[8:]
    yield "length one long", lambda d: struct.pack("<Q", struct.unpack("<Q", d[:8])[0] + 1) + d[8:]
    yield "length beyond the file", lambda d: struct.pack("<Q", len(d) + 1) + d[8:]
    yield "length beyond the limit", lambda d: struct.pack("<Q", 100_000_001) + d[8:]
    yield "length with the top bit", lambda d: struct.pack("<Q", 2**63) + d[8:]
    yield "length all ones", lambda d: b"\xff" * 8 + d[8:]
    for part in (0.05, 0.3, 0.6, 0.99):
        yield f"cut at {part}", lambda d, p=part: d[: int(len(d) * p)]
    yield "last byte missing", lambda d: d[:-1]
    yield "one byte too many", lambda d: d + b"\0"
    yield "a zip at the end", lambda d: d + b"PK\x03\x04" + bytes(60)
    yield "twice", lambda d: d + d
    yield "zeros", lambda d: bytes(len(d))
    noise = np.random.default_rng(seed)
    yield "noise", lambda d: noise.bytes(len(d))
    yield "noise for a header", lambda d: d[:8] + noise.bytes(200) + d[208:]


def _header_edits() -> Iterator[tuple[str, Callable[[Header], None]]]:
    def setting(field: str, value: Any) -> Callable[[Header], None]:
        return lambda header: header[_NAME].__setitem__(field, value)

    shapes: dict[str, Any] = {
        "fractions": [16.0],
        "text": ["16"],
        "negative": [-16],
        "two negatives": [-4, -4],
        "null": None,
        "a number": 16,
        "booleans": [True] * 5,
        "nested": [[16]],
        "nine sides": [16] + [1] * 8,
        "no tensor at all": [0],
        "a huge empty side": [0, 2**62],
        "a side above the limit": [2**31 + 1],
        "an overflowing product": [2**40, 2**40],
        "a wrapping product": [2**32, 2**32, 16],
        "one more": [17],
        "another order": [4, 4],
    }
    for name, value in shapes.items():
        yield f"shape: {name}", setting("shape", value)
    for name, value in {
        "unknown": "F33",
        "lower case": "f32",
        "null": None,
        "a number": 32,
        "a list": ["F32"],
        "narrower": "F16",
        "integers of that size": "I32",
        "booleans": "BOOL",
    }.items():
        yield f"dtype: {name}", setting("dtype", value)
    for name, value in {
        "three": [0, 64, 128],
        "one": [64],
        "text": ["0", "64"],
        "fractions": [0.0, 64.0],
        "negative": [-64, 0],
        "reversed": [64, 0],
        "null": None,
        "beyond the file": [2**40, 2**40 + 64],
        "wrapping": [2**64 - 32, 32],
    }.items():
        yield f"offsets: {name}", setting("data_offsets", value)
    yield "offsets: those of another tensor", lambda h: h[_NAME].update(data_offsets=h[_OTHER]["data_offsets"])
    yield (
        "offsets: half over another tensor",
        lambda h: h[_NAME].update(data_offsets=[offset + 32 for offset in h[_NAME]["data_offsets"]]),
    )
    for field in ("dtype", "shape", "data_offsets"):
        yield f"without {field}", lambda h, f=field: h[_NAME].pop(f)
    yield "a field too many", setting("comment", "x")
    yield "an entry that is a list", lambda h: h.__setitem__(_NAME, [1])
    yield "an entry that is null", lambda h: h.__setitem__(_NAME, None)
    for name, value in {
        "a number": {"format": 1},
        "a list": ["pt"],
        "null": None,
        "an object": {"format": {"a": "b"}},
        "half a character": {"format": "\ud800"},
    }.items():
        yield f"metadata: {name}", lambda h, v=value: h.__setitem__("__metadata__", v)
    names = {
        "empty": "",
        "with NUL": "a\0b",
        "with ESC": "a\x1b[31mb",
        "with a newline": "a\nb",
        "with a slash": "a/b",
        "that begins with a slash": "/a",
        "with a backslash": "a\\b",
        "with DEL": "a\x7fb",
        "not ASCII": "ä.weight",
        "written backwards": "a\u202eb",
        "far too long": "a" * 1_000_000,
        "of something else": "conv_in.weight",
    }
    for name, value in names.items():
        yield f"a name {name}", lambda h, v=value: h.__setitem__(v, h.pop(_NAME))
    yield "two names exchanged", _exchanged
    yield "every name different", _renamed
    yield "no tensor", lambda h: h.clear()


def _renamed(header: Header) -> None:
    renamed = {f"x.{name}": entry for name, entry in header.items()}
    header.clear()
    header.update(renamed)


def _exchanged(header: Header) -> None:
    first, second = "pos_embed.proj.weight", "transformer_blocks.0.ff.net.0.proj.weight"
    header[first], header[second] = header[second], header[first]


def _header_texts() -> Iterator[tuple[str, Callable[[str], str]]]:
    yield "a list", lambda t: "[" + t + "]"
    yield "text", lambda t: '"' + "x" * 40 + '"'
    yield "null", lambda t: "null"
    yield "blank first", lambda t: " " + t
    yield "a byte order mark", lambda t: "\ufeff" + t
    yield "unfinished", lambda t: t[:-1]
    yield "something after it", lambda t: t + "x"
    yield "two objects", lambda t: t + "{}"
    yield "a comma too many", lambda t: t[:-1] + ",}"
    yield "single quotes", lambda t: t.replace('"', "'")
    yield "NaN", lambda t: t[:-1] + ', "__metadata__": NaN}'
    yield "a huge number", lambda t: t.replace("[16]", "[" + "9" * 5000 + "]", 1)
    yield "an exponent", lambda t: t.replace("[16]", "[16e0]", 1)
    yield "minus zero", lambda t: t.replace('"data_offsets": [0,', '"data_offsets": [-0,', 1)
    yield "nested deeply", lambda t: t[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    yield "nested without end", lambda t: '{"x": ' + "[" * 100_000
    yield "a name twice with one range", lambda t: t[:-1] + f', "{_NAME}": ' + _entry_text(t) + "}"
    yield "a name twice with two ranges", lambda t: t[:-1] + f', "{_NAME}": ' + _entry_text(t, _OTHER) + "}"
    yield "a field twice", lambda t: t.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"', 1)
    yield "half a character", lambda t: t.replace("pos_embed", "pos\ud800embed", 1)


def _entry_text(text: str, name: str = _NAME) -> str:
    return json.dumps(json.loads(text)[name])


def _poisons() -> Iterator[tuple[str, bytes]]:
    yield "NaN", struct.pack("<f", float("nan"))
    yield "a signalling NaN", b"\x01\x00\x80\x7f"
    yield "infinity", struct.pack("<f", float("inf"))
    yield "minus infinity", struct.pack("<f", -float("inf"))
