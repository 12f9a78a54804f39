"""The positions of neurons' rows in the files of a checkpoint, in every copy of the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffcore.checkpoint import Inventory
from diffcore.checkpoint.families import PREFIX
from diffcore.errors import IncompatibleModelError, printable
from diffcore.io import files
from diffcore.io.tensorfile import TensorHeader, read_header
from diffcore.models.bases import FAMILIES, family_base
from nemo_localize.neurons import NeuronSet

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredRow:
    """The bytes of one neuron in one file.

    Attributes:
        file: Relative name; empty where the model is a single file.
        offset: Position of the first byte in the file.
        length: Number of bytes of the row.
    """

    file: str
    offset: int
    length: int


def backbone_headers(inventory: Inventory) -> dict[str, TensorHeader]:
    """Returns the headers of all files that hold the backbone's weights, in every precision, those in use first."""
    if inventory.header is not None:
        return {"": inventory.header}
    backbone = next(component for component in inventory.components.values() if component.role == "backbone")
    in_use = {header.path for header in backbone.weights}
    paths = sorted(Path(backbone.folder).glob("*.safetensors"), key=lambda path: (path not in in_use, path))
    return {path.relative_to(inventory.path).as_posix(): read_header(path) for path in paths}


def stored_rows(file: str, header: TensorHeader, neurons: NeuronSet) -> list[StoredRow]:
    """Returns the bytes of the neurons in one file; copies of the weights that training averaged are edited too."""
    rows = []
    for module, channels in neurons.layers:
        for leaf in ("weight", "bias"):
            name = tensor_name(header, module, leaf)
            averaged = name and "model_ema." + name.removeprefix("model.").replace(".", "")
            for found in (name, averaged):
                if found in header.tensors:
                    rows += _rows_of(file, header, str(found), channels)
    return rows


def require_stored(neurons: NeuronSet, headers: Mapping[str, TensorHeader], source: Path) -> None:
    """Raises an error for neurons that no file holds."""
    for module, _ in neurons.layers:
        if not any(tensor_name(header, module, "weight") for header in headers.values()):
            raise IncompatibleModelError(
                f"{printable(source, 300)} has no {module!r}; give the neurons that were found in this very model"
            )


def tensor_name(header: TensorHeader, module: str, leaf: str) -> str | None:
    """Returns the name under which a file holds a module's tensor."""
    return next((name for name in _spellings(header, module, leaf) if name in header.tensors), None)


def read_rows(path: Path, rows: Sequence[StoredRow]) -> Tensor:
    """Returns the bytes of rows, one after another."""
    with files.explained(path, reading=True), path.open("rb") as file:
        data = bytearray()
        for row in rows:
            file.seek(row.offset)
            data += file.read(row.length)
    return torch.frombuffer(data, dtype=torch.uint8)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Replaces bytes of a file."""
    with files.explained(path, needed=len(data)), path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _rows_of(file: str, header: TensorHeader, name: str, channels: Sequence[int]) -> list[StoredRow]:
    entry = header.tensors[name]
    if entry.dtype not in _FLOATS:
        raise IncompatibleModelError(
            f"{printable(header.path, 300)} holds {name!r} as {entry.dtype}, quantised; edit the weights it was made "
            "from"
        )
    if channels[-1] >= entry.shape[0]:
        raise IncompatibleModelError(f"{name}[{channels[-1]}] is no neuron: the layer has {entry.shape[0]}")
    length = (entry.end - entry.start) // entry.shape[0]
    return [StoredRow(file, header.data_start + entry.start + channel * length, length) for channel in channels]


def _spellings(header: TensorHeader, module: str, leaf: str) -> Sequence[str]:
    if not any("input_blocks." in name for name in header.tensors):
        return [f"{module}.{leaf}"]
    original = f"{_original(module)}.{leaf}"
    return [PREFIX + original, original]


def _original(module: str) -> str:
    """Returns a module's name in the original layout of Stable Diffusion, where transformers keep their inner names."""
    for family in FAMILIES:
        if module in (names := family_base(family).original):
            return names[module]
    raise IncompatibleModelError(f"{module!r} is in no checkpoint of {', '.join(FAMILIES)}; give their own neurons")
