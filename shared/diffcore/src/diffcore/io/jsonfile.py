"""Writing JSON and text files atomically, and reading them strictly. Imports no torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from diffcore.errors import CorruptArtifactError, printable
from diffcore.io import files
from diffcore.io.strictjson import MAX_BYTES, StrictError, parse, read_limited


def write_json(path: Path, value: Any) -> Path:
    """Writes valid JSON atomically: non-finite numbers become null."""
    return write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns a value as indented JSON, ending in a newline."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def json_line(value: Any) -> str:
    """Returns a value as one line of JSON, ending in a newline: for `.jsonl` files."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text atomically; lone surrogates, which UTF-8 cannot hold, are escaped."""
    files.write_whole(Path(path), text.encode("utf-8", errors="backslashreplace"))
    return Path(path)


def read_trusted(path: Path) -> dict[str, Any]:
    """Reads a JSON object that diffcore wrote; as `read_json`, but refusing any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise corrupt(path, "holds no JSON object")
    return value


def read_json(path: Path) -> Any:
    """Reads JSON that diffcore wrote: as strictly as untrusted JSON, but with integers of any size.

    Raises:
        CorruptArtifactError: The file is missing or is not such JSON.
    """
    if not path.is_file():
        raise corrupt(path, "is missing")
    try:
        return parse(read_limited(path, MAX_BYTES), parse_int=int)
    except StrictError as error:
        raise corrupt(path, str(error)) from error


def jsonable(value: Any) -> Any:
    """Returns a value in JSON's types: paths as text, tensors and arrays as lists, non-finite numbers as None.

    Raises:
        TypeError: A value of another type.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and numpy's numbers
        return jsonable(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    raise TypeError(f"{type(value).__name__} has no JSON form")


def corrupt(path: Path, what: str) -> CorruptArtifactError:
    """Returns the error for a file that diffcore wrote and that is damaged or changed."""
    return CorruptArtifactError(f"{printable(path, 300)} {what}; delete it and make it again, or restore a copy")
