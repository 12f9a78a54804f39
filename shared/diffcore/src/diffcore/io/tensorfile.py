"""Headers of untrusted safetensors files, read strictly and without loading a tensor. Imports no torch.

The rules are stricter than the library's: whatever it rejects is rejected here, and what it accepts silently (names
given twice, names with control characters, unknown fields) is rejected too, before any library sees the file.
"""

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore.errors import IncompatibleModelError, printable
from diffcore.io import files
from diffcore.io.strictjson import StrictError, parse

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 200_000
MAX_NAME = 512
MAX_RANK = 8
MAX_DIM = 2**31
_NAME = re.compile(rf"[ -.0-\[\]-~]{{1,{MAX_NAME}}}")  # printable ASCII without slashes
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: Type in safetensors' notation, such as "F32".
        shape: Length of each dimension.
        start: First byte, counted from the end of the header.
        end: One past the last byte, counted likewise.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorHeader:
    """The header of a safetensors file, checked against the file's size.

    Attributes:
        path: The safetensors file itself.
        tensors: Tensors by name, in the file's order.
        metadata: Free text that the author stored.
        data_start: Offset of the first tensor in the file, in bytes.
        size: Size of the whole file in bytes.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    size: int


def read_header(path: Path) -> TensorHeader:
    """Reads and checks the header of a safetensors file; touches none of its tensors.

    Args:
        path: Path of a regular file.

    Raises:
        IncompatibleModelError: The file is not safetensors (the message says what it looks like), is truncated, or
            breaks a rule or limit.
    """
    try:
        with files.explained(path, reading=True):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise StrictError("is not a regular file; point to a safetensors file")
            with path.open("rb") as file:
                head = file.read(8)
                length = int.from_bytes(head, "little")
                header = file.read(length) if len(head) == 8 and length <= MAX_HEADER_BYTES else b""
        return _checked(path, head, header, status.st_size)
    except StrictError as error:
        advice = "" if ";" in str(error) else "; get a clean copy"
        raise IncompatibleModelError(f"{printable(path, 300)} {error}{advice}") from None


def what_it_is(path: Path) -> str | None:
    """Returns the likely format of a file that is not safetensors, in words for a message; None where it is unknown."""
    with files.explained(path, reading=True), path.open("rb") as file:
        head = file.read(4096)
        size = file.seek(0, 2)
        file.seek(max(size - 4096, 0))
        tail = file.read(4096)
    if not head:
        return "an empty file"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _kind_of_zip(head + tail)
    if head.startswith(_LEGACY_TORCH):
        return "a pickle (an old PyTorch checkpoint)"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file"
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer"
    if head.lstrip()[:1] == b"<":
        return "an HTML page, from a failed download"
    if head[:1] in (b"(", b"]", b"}", b"c", b"d", b"l", b"S", b"I", b"F", b"V") and tail.rstrip(b"\0")[-1:] == b".":
        return "a pickle"
    return None


def refusal_of_pickle(path: Path) -> str:
    """Returns the message for a file that would have to be unpickled."""
    return (
        f"{printable(path, 300)} is a pickle, which can run code when read; convert it to safetensors, "
        "or pass `allow_pickle=True` if you trust its author"
    )


def _checked(path: Path, head: bytes, header: bytes, size: int) -> TensorHeader:
    # A valid header length may begin with the bytes of another format: safetensors is tried first.
    length = int.from_bytes(head, "little")
    if not header.startswith(b"{"):
        _say_what_it_is(path)
        if len(head) == 8 and MAX_HEADER_BYTES < length <= size - 8:
            raise StrictError(f"has a header of {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
        raise StrictError("is not a safetensors file; convert it, or get a clean copy")
    if len(header) < length:
        raise StrictError(f"ends after {size:,} of at least {8 + length:,} bytes; copy it again")
    content = parse(header, parse_int=_natural)
    if not isinstance(content, dict):
        raise StrictError("has a header that is no object")
    metadata = _checked_metadata(content.pop("__metadata__", {}))
    if len(content) > MAX_TENSORS:
        raise StrictError(f"names {len(content):,} tensors; the limit is {MAX_TENSORS:,}")
    tensors = {name: _entry(name, value) for name, value in content.items()}
    _check_layout(tensors, size - 8 - length, size)
    return TensorHeader(path, tensors, metadata, 8 + length, size)


def _say_what_it_is(path: Path) -> None:
    kind = what_it_is(path)
    if kind == "a Git-LFS pointer":
        raise StrictError("is a Git-LFS pointer, the file itself is missing; run git lfs pull")
    if kind is not None and "pickle" in kind:
        raise StrictError(f"is {kind}, not safetensors, and can run code when read; convert it to safetensors")
    if kind is not None:
        raise StrictError(f"is {kind}, not safetensors; get the model in safetensors")


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StrictError("has metadata that is not text")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        raise StrictError("has metadata that is not Unicode") from None
    return metadata


def _entry(name: str, value: Any) -> TensorEntry:
    if not _NAME.fullmatch(name):
        raise _tensor_with(name, f"a name that is not 1 to {MAX_NAME} plain characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _tensor_with(name, "other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _tensor_with(name, f"dtype {printable(dtype, 30)}; weights are read in {', '.join(ITEM_BYTES)}")
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and all(type(side) is int for side in shape)):
        raise _tensor_with(name, f"a shape that is not a list of at most {MAX_RANK} whole numbers")
    if not all(0 <= side <= MAX_DIM for side in shape):  # 0 in tensors that say something by being there
        raise _tensor_with(name, "a side outside 0 to 2^31")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise _tensor_with(name, "offsets that are not two whole numbers")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _tensor_with(name, f"{end - start:,} bytes for shape {printable(shape)} of {dtype}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _tensor_with(name: str, what: str) -> StrictError:
    return StrictError(f"has tensor {printable(name)!r} with {what}")


def _check_layout(tensors: Mapping[str, TensorEntry], data_bytes: int, size: int) -> None:
    """Tensors fill the data without holes or overlap."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise StrictError(f"has a hole or an overlap before tensor {printable(name)!r}")
        position = entry.end
    if position > data_bytes:
        raise StrictError(f"ends after {size:,} of {size + position - data_bytes:,} bytes; copy it again")
    if position < data_bytes:
        raise StrictError(f"has {data_bytes - position:,} bytes after its last tensor")


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 19:
        raise StrictError(f"has the number {printable(text, 30)} in its header")
    return int(text)


def _kind_of_zip(data: bytes) -> str:
    if b"constants.pkl" in data or b"/code/" in data:
        return "a TorchScript program (a zip with pickles)"
    if b"data.pkl" in data:
        return "a pickle (a PyTorch checkpoint, zipped)"
    if b".npy" in data:
        return "a NumPy archive"
    return "a zip archive"
