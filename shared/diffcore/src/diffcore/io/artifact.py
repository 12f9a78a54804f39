"""Tensors with a JSON sidecar, written so that a reader finds a whole artefact or none.

`NAME.safetensors` is written first, then `NAME.json`, which holds the tensors' sha256: the sidecar is the commit mark.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from diffcore.errors import CorruptArtifactError, printable
from diffcore.io import files
from diffcore.io.jsonfile import corrupt, jsonable, read_trusted, write_json

_SCHEMA = re.compile(r"([a-z0-9][a-z0-9-]*/[a-z0-9-]+)@([1-9][0-9]*)")
_OWN = ("schema", "produced_by", "created", "sha256", "bytes", "tensors", "sidecar_sha256")


@dataclass(frozen=True)
class Artifact:
    """The content of one artefact: tensors, and the fields of its sidecar.

    Attributes:
        tensors: Named tensors, on the CPU.
        fields: Plain values saved with the tensors; numbers that were not finite are None.
        schema: Owner, noun and version, such as `diffcore/part@1`.
        produced_by: Package and version that wrote it.
        created: Time of writing in UTC, ISO 8601.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any] = field(default_factory=dict)
    schema: str = ""
    produced_by: str = ""
    created: str = ""


def save(path: Path, tensors: Mapping[str, Tensor], *, schema: str, **fields: Any) -> Path:
    """Writes `path` (a `.safetensors` file) and its sidecar, atomically and synced; returns `path`.

    The serialised tensors are held in memory once more while writing.

    Args:
        path: Path of the tensor file; the suffix is set to `.safetensors`.
        tensors: Tensors by name, on any device, in any layout, with shared storage allowed.
        schema: `package/noun@version`; the package is looked up for `produced_by`.
        **fields: Plain values for the sidecar; non-finite numbers become null.

    Raises:
        MachineError: The disk is full or failing; an older artefact of that name stays readable or is absent.
        ValueError: A bad schema, or a field named like one of the sidecar's own.
    """
    owner, _ = _split_schema(schema)
    if taken := sorted(set(fields) & set(_OWN)):
        raise ValueError(f"fields {taken} belong to the sidecar itself")
    path = Path(path).with_suffix(".safetensors")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # one entry only: the library writes several in random order, and the same tensors must give the same bytes
    data = serialize_tensors(plain, metadata={"schema": schema})
    sidecar = {
        "schema": schema,
        "produced_by": produced_by(owner.partition("/")[0]),
        "created": utc_now(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in plain.items()},
        **jsonable(fields),
    }
    sidecar["sidecar_sha256"] = _digest(sidecar)
    # A crash between the two writes leaves a pair that does not verify, which is the same as no artefact.
    files.write_whole(path, data)
    write_json(path.with_suffix(".json"), sidecar)
    return path


def load(path: Path, *, schema: str | None = None, verify: bool = True) -> Artifact:
    """Reads an artefact.

    Args:
        path: The tensor file or its sidecar.
        schema: The schema that the caller reads; an older version of the same noun is accepted.
        verify: Whether the tensors' sha256 is compared, besides their size.

    Raises:
        CorruptArtifactError: A file is missing, truncated or altered, or of another or newer schema.
    """
    path = Path(path).with_suffix(".safetensors")
    sidecar = check(path, verify=False)
    if schema is not None:
        _require_schema(path, sidecar, schema)
    with files.explained(path, reading=True):
        data = files.read(path)
    if verify and hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
        raise corrupt(path, "does not match the sum in its sidecar")
    try:
        tensors = parse_tensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise corrupt(path, f"is not readable ({printable(error)})") from error
    fields = {name: value for name, value in sidecar.items() if name not in _OWN}
    return Artifact(tensors, fields, sidecar["schema"], sidecar["produced_by"], sidecar["created"])


def check(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Returns the sidecar of an artefact after comparing sums and sizes, without reading its tensors into memory.

    Raises:
        CorruptArtifactError: As in `load`.
    """
    path = Path(path).with_suffix(".safetensors")
    sidecar = read_trusted(path.with_suffix(".json"))
    missing = [name for name in _OWN if name not in sidecar]
    if missing or _digest({k: v for k, v in sidecar.items() if k != "sidecar_sha256"}) != sidecar["sidecar_sha256"]:
        raise corrupt(path.with_suffix(".json"), f"lacks {missing}" if missing else "was altered")
    if not path.is_file():
        raise corrupt(path, "is missing")
    if path.stat().st_size != sidecar["bytes"]:
        raise corrupt(path, f"has {path.stat().st_size:,} bytes where its sidecar says {sidecar['bytes']:,}")
    if verify and files.sha256(path) != sidecar["sha256"]:
        raise corrupt(path, "does not match the sum in its sidecar")
    return sidecar


def produced_by(package: str) -> str:
    """Returns a distribution's name and version, or the name alone if it is not installed."""
    version = installed_version(package)
    return f"{package} {version}" if version else package


@cache
def installed_version(package: str) -> str | None:
    """Returns the version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def utc_now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digest(sidecar: Mapping[str, Any]) -> str:
    text = json.dumps(sidecar, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _split_schema(schema: str) -> tuple[str, int]:
    if not (found := _SCHEMA.fullmatch(schema)):
        raise ValueError(f"{schema!r} is no schema; write package/noun@1")
    return found[1], int(found[2])


def _require_schema(path: Path, sidecar: Mapping[str, Any], schema: str) -> None:
    wanted, newest = _split_schema(schema)
    found, version = _split_schema(sidecar["schema"])
    if found != wanted:
        raise corrupt(path, f"is a {found} where a {wanted} is needed")
    if version > newest:
        raise CorruptArtifactError(
            f"{printable(path, 300)} has schema {sidecar['schema']}, newer than @{newest}: "
            f"written by {sidecar['produced_by']}; update to read it"
        )
