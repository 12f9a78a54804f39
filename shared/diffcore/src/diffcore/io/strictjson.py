"""Untrusted JSON, read within limits or refused with a reason. Imports no torch.

Python's own parser silently accepts duplicate keys, NaN, numbers of any size, and nesting until the stack overflows.
"""

import json
import math
import re
import stat
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffcore.errors import IncompatibleModelError, printable
from diffcore.io import files

MAX_BYTES = 10_000_000
MAX_DEPTH = 64
MAX_INTEGER = 2**53  # beyond it, integers of JSON are not what every reader takes them for
# A string hides brackets, and may lack its end; possessive, so that the scan is linear.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]


class StrictError(ValueError):
    """Untrusted data breaks a rule; the message is the reason, without the file's name."""


def read_untrusted(
    path: Path,
    *,
    max_bytes: int = MAX_BYTES,
    parse_int: Callable[[str], Any] | None = None,
    infinite: bool = False,
) -> dict[str, Any]:
    """Reads a JSON object from an untrusted file.

    Args:
        path: Path of a regular file.
        max_bytes: Limit on the size; larger files are refused unread.
        parse_int: Converts integers from text; by default those beyond 2^53 are refused.
        infinite: Whether Infinity and -Infinity, which diffusers writes into configurations, are numbers.

    Raises:
        IncompatibleModelError: The file is not such JSON, breaks a limit, or holds something else than an object.
    """
    try:
        value = parse(read_limited(path, max_bytes), parse_int=parse_int, infinite=infinite)
        if not isinstance(value, dict):
            raise StrictError(f"holds a {type(value).__name__}, not an object")
    except StrictError as error:
        raise IncompatibleModelError(f"{printable(path, 300)} {error}; get a clean copy of the model") from None
    return value


def parse(data: bytes, *, parse_int: Callable[[str], Any] | None = None, infinite: bool = False) -> Any:
    """Returns the value of JSON bytes; `parse_int` and `infinite` as in `read_untrusted`.

    Raises:
        StrictError: The bytes are not UTF-8 or not JSON, nest deeper than 64, repeat a key, or hold a number that is
            not finite or not exact.
    """
    check_depth(data)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_infinite if infinite else _refuse_constant,
            parse_float=_finite,
            parse_int=parse_int or _exact,
        )
    except StrictError:
        raise
    except UnicodeDecodeError:
        raise StrictError("is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise StrictError(f"is not valid JSON ({printable(error)})") from None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file of limited size; raises StrictError for anything else."""
    with files.explained(path, reading=True):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StrictError("is not a regular file")
        if status.st_size > max_bytes:
            raise StrictError(f"has {status.st_size:,} bytes; the limit is {max_bytes:,}")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)


def check_depth(data: bytes) -> None:
    """Raises StrictError when brackets outside strings nest deeper than 64; never recurses."""
    brackets = _STRING.sub(b"", data).translate(None, delete=_NO_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise StrictError(f"nests deeper than {MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise StrictError(f"gives the key {printable(twice)!r} twice")
    return value


def _infinite(text: str) -> float:
    return _refuse_constant(text) if text == "NaN" else float(text)


def _refuse_constant(text: str) -> float:
    raise StrictError(f"holds {text}, which is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise StrictError(f"holds {printable(text)}, which is not finite")
    return number


def _exact(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise StrictError(f"holds the integer {printable(text, 30)}, beyond 2^53")
    return int(text)
