"""The edit as files: a checkpoint that any tool loads, a small delta that undoes it, and the same edit as a LoRA.

Switching a neuron off zeroes one row of one matrix, which is a run of bytes in a safetensors file. So a checkpoint is
copied byte by byte and those runs are overwritten: nothing is loaded, converted or rounded, and putting the saved runs
back gives the very file that there was.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore import artifact, files
from diffcore.adapters import Adapter, write_adapter
from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError, printable
from diffcore.jsonfile import write_json
from diffcore.models import Inventory, inspect_model
from diffcore.models.bases import FAMILIES, base_on_disk, family_base
from diffcore.models.families import PREFIX
from diffcore.models.stored import stored_in
from diffcore.models.walk import walk
from diffcore.models.weightfiles import PICKLE_SUFFIXES
from diffcore.record import versions
from diffcore.tensorfile import TensorHeader, read_header
from nemo_localize.neurons import NeuronSet

_LOG = logging.getLogger("diffcore.nemo_localize")
_DELTA = "nemo-localize/delta@1"
_FLOATS = ("F64", "F32", "F16", "BF16")
DELTA, MANIFEST, LORA = "delta.safetensors", "manifest.json", "lora"


@dataclass(frozen=True)
class _Run:
    """Bytes of one neuron in one file.

    Attributes:
        file: Relative name; empty where the model is a single file.
        offset: Of the first byte.
        length: In bytes.
    """

    file: str
    offset: int
    length: int


def apply(
    source: Path,
    neurons: NeuronSet,
    out: Path,
    *,
    reasons: Mapping[str, NeuronSet] | None = None,
    lora: bool = True,
) -> dict[str, Any]:
    """Writes an edited checkpoint, what undoes it, and the same edit as a LoRA in three layouts; returns the manifest.

    `out/model` (or `out/model.safetensors`) is the checkpoint, in the layout of its source; `out/delta.safetensors`
    the removed rows: keep those to yourself, they are what was memorised with. Every file of the backbone that holds a
    copy of the weights is edited, whatever its precision; pickles and further checkpoints beside the folders are left
    out, for they would carry the memory along.

    Args:
        source: A diffusers pipeline folder, the folder of one U-Net, or a single safetensors file.
        neurons: What to switch off.
        out: A folder, made where it is not there.
        reasons: For the manifest: caption -> the neurons found for it.
        lora: Whether to write the LoRAs too.

    Raises:
        UserError: There is nothing to edit, or something is in `out` already.
        IncompatibleModelError: The source is no such model, holds no such neuron, or holds it quantised.
        MachineError: The disk is full or failing; a half-written copy is named `.partial` and is written anew.
    """
    if not len(neurons):
        raise UserError("the set of neurons is empty: there is nothing to switch off")
    source = Path(source)
    inventory = inspect_model(source)
    target = out / ("model.safetensors" if inventory.header is not None else "model")
    _refuse_taken(target)
    headers = _headers(inventory)
    runs = [run for file, header in headers.items() for run in _runs(file, header, neurons)]
    _require_all(neurons, headers, source)
    files.make_folder(out)
    if lora:
        _write_loras(source, headers, neurons, out / LORA)
    edited = sorted({run.file for run in runs})
    saved = {file: _bytes_of(_member(source, file), [run for run in runs if run.file == file]) for file in edited}
    partial = _partial(target)
    left_out = _copy(source, partial, inventory)
    for run in runs:
        _overwrite(_member(partial, run.file), run.offset, bytes(run.length))
    record = {
        file: {
            "sha256_before": files.sha256(_member(source, file)),
            "sha256_after": files.sha256(_member(partial, file)),
            "runs": [[run.offset, run.length] for run in runs if run.file == file],
        }
        for file in edited
    }
    artifact.save(
        out / DELTA,
        {f"file{place}": saved[file] for place, file in enumerate(edited)},
        schema=_DELTA,
        neurons=neurons.to_json(),
        files=record,
    )
    manifest = {
        "schema": "nemo-localize/manifest@1",
        "source": source.resolve().name,
        "neurons": neurons.to_json(),
        "num_neurons": len(neurons),
        "captions": {prompt: found.to_json() for prompt, found in (reasons or {}).items()},
        "files": {file: {key: row[key] for key in ("sha256_before", "sha256_after")} for file, row in record.items()},
        "left_out": left_out,
        "lora": sorted(path.relative_to(out).as_posix() for path in (out / LORA).glob("*")) if lora else [],
        "versions": versions("nemo-localize"),
        "created": artifact.utc_now(),
    }
    write_json(out / MANIFEST, manifest)
    _finish(partial, target)  # last: a checkpoint that is there is whole, and so is what undoes it
    return manifest


def revert(edited: Path, delta: Path, out: Path) -> dict[str, Any]:
    """Writes the checkpoint as it was before `apply`, byte for byte; returns the sums of the files that changed.

    Args:
        edited: What `apply` wrote.
        delta: The delta beside it.
        out: Where the restored checkpoint goes.

    Raises:
        UserError: Something is at `out` already.
        CorruptArtifactError: The delta is damaged, or is not of this checkpoint.
    """
    edited, out = Path(edited), Path(out)
    _refuse_taken(out)
    found = artifact.load(delta, schema=_DELTA)
    record: Mapping[str, Any] = found.fields["files"]
    single = edited.is_file()
    for file, row in record.items():
        path = edited if single else edited / file
        if not path.is_file() or single != (file == "") or files.sha256(path) != row["sha256_after"]:
            raise CorruptArtifactError(
                f"{printable(path, 300)} is not what {printable(delta, 300)} was made with; "
                "give the untouched result of the same apply"
            )
    partial = _partial(out)
    if single:
        _copy_file(edited, partial)
    else:
        for name in walk(edited):
            _copy_file(edited / name, partial / name)
    for place, (file, row) in enumerate(record.items()):
        data = found.tensors[f"file{place}"].numpy().tobytes()
        for offset, length in row["runs"]:
            _overwrite(_member(partial, file), offset, data[:length])
            data = data[length:]
        if files.sha256(_member(partial, file)) != row["sha256_before"]:
            raise CorruptArtifactError(f"{printable(delta, 300)} does not restore {printable(file)}; it is damaged")
    _finish(partial, out)
    return {file or out.name: row["sha256_before"] for file, row in record.items()}


def adapter_of(weights: Mapping[str, Tensor], neurons: NeuronSet, *, name: str = "nemo-localize") -> Adapter:
    """Returns the edit as an exact LoRA: one rank per neuron of a layer; at strength 1 it equals the edited weights.

    Args:
        weights: Of the layers, by module name.
        neurons: What to switch off.
        name: For messages.

    Raises:
        UserError: All these rows are zero already.
    """
    differences = {}
    for module, channels in neurons.layers:
        difference = torch.zeros_like(weights[module])
        difference[list(channels)] = -weights[module][list(channels)]
        differences[module] = difference
    if not any(bool(difference.any()) for difference in differences.values()):
        raise UserError("these neurons are off in this model already; there is nothing to write")
    return Adapter.from_differences(differences, name=name)


def _write_loras(source: Path, headers: Mapping[str, TensorHeader], neurons: NeuronSet, folder: Path) -> None:
    weights: dict[str, Tensor] = {}
    for header in headers.values():
        names = {found: module for module, _ in neurons.layers if (found := _tensor_name(header, module, "weight"))}
        weights = {names[name]: tensor for name, tensor in stored_in([header], header.path).read(names)} | weights
        if biased := next((module for module, _ in neurons.layers if _tensor_name(header, module, "bias")), None):
            raise IncompatibleModelError(
                f"{biased!r} has a bias, which no LoRA changes; leave the LoRA out with --no-lora"
            )
    adapter, base = adapter_of(weights, neurons), base_on_disk(source)
    write_adapter(adapter, folder / "diffusers.safetensors", format="diffusers", base=base, overwrite=True)
    write_adapter(adapter, folder / "kohya.safetensors", format="kohya", base=base, overwrite=True)
    write_adapter(adapter, folder / "peft", format="peft", base=base, overwrite=True)


def _headers(inventory: Inventory) -> dict[str, TensorHeader]:
    """Returns the headers of all files that hold the backbone's weights, in every precision that is there."""
    if inventory.header is not None:
        return {"": inventory.header}
    backbone = next(component for component in inventory.components.values() if component.role == "backbone")
    paths = sorted(Path(backbone.folder).glob("*.safetensors"))
    return {path.relative_to(inventory.path).as_posix(): read_header(path) for path in paths}


def _tensor_name(header: TensorHeader, module: str, leaf: str) -> str | None:
    """Returns the name under which a file holds a module's tensor."""
    return next((name for name in _spellings(header, module, leaf) if name in header.tensors), None)


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


def _runs(file: str, header: TensorHeader, neurons: NeuronSet) -> list[_Run]:
    """Returns the bytes of the neurons in one file; copies of the weights that training averaged are edited too."""
    runs = []
    for module, channels in neurons.layers:
        for leaf in ("weight", "bias"):
            name = _tensor_name(header, module, leaf)
            averaged = name and "model_ema." + name.removeprefix("model.").replace(".", "")
            for found in (name, averaged):
                if found in header.tensors:
                    runs += _rows_of(file, header, str(found), channels)
    return runs


def _rows_of(file: str, header: TensorHeader, name: str, channels: Sequence[int]) -> list[_Run]:
    entry = header.tensors[name]
    if entry.dtype not in _FLOATS:
        raise IncompatibleModelError(
            f"{printable(header.path, 300)} holds {name!r} as {entry.dtype}, quantised; edit the weights it was made "
            "from"
        )
    if channels[-1] >= entry.shape[0]:
        raise IncompatibleModelError(f"{name}[{channels[-1]}] is no neuron: the layer has {entry.shape[0]}")
    length = (entry.end - entry.start) // entry.shape[0]
    return [_Run(file, header.data_start + entry.start + channel * length, length) for channel in channels]


def _require_all(neurons: NeuronSet, headers: Mapping[str, TensorHeader], source: Path) -> None:
    for module, _ in neurons.layers:
        if not any(_tensor_name(header, module, "weight") for header in headers.values()):
            raise IncompatibleModelError(
                f"{printable(source, 300)} has no {module!r}; give the neurons that were found in this very model"
            )


def _copy(source: Path, partial: Path, inventory: Inventory) -> list[str]:
    """Copies a model and returns the names of the files that stay behind: unedited copies of the weights."""
    if inventory.header is not None:
        _copy_file(source, partial)
        return []
    backbone = next(component for component in inventory.components.values() if component.role == "backbone")
    inside = Path(backbone.folder).relative_to(source).as_posix()
    left_out = []
    for name in walk(source):
        folder = Path(name).parent.as_posix()
        weights = name.endswith((*PICKLE_SUFFIXES, ".safetensors", ".onnx", ".msgpack", ".h5"))
        beside = folder == "." and inside != "."
        if weights and (beside or (folder == inside and not name.endswith(".safetensors"))):
            left_out.append(name)
            continue
        _copy_file(source / name, partial / name)
    if left_out:
        _LOG.warning("left out, as they hold the unedited weights: %s", printable(", ".join(left_out), 300))
    return left_out


def _member(root: Path, file: str) -> Path:
    return root / file if file else root


def _bytes_of(path: Path, runs: Sequence[_Run]) -> Tensor:
    with files.explained(path, reading=True), path.open("rb") as file:
        data = bytearray()
        for run in runs:
            file.seek(run.offset)
            data += file.read(run.length)
    return torch.frombuffer(data, dtype=torch.uint8)


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with files.explained(path, needed=len(data)), path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _copy_file(source: Path, target: Path) -> None:
    with files.explained(target, needed=source.stat().st_size):
        files.make_folder(target.parent)
        shutil.copyfile(source, target)


def _partial(target: Path) -> Path:
    """Returns the name under which a checkpoint is written until it is whole, with nothing there."""
    partial = target.with_name(f"{target.name}.partial")
    with files.explained(partial):
        if partial.is_dir():
            shutil.rmtree(partial)
        files.remove(partial)
    return partial


def _finish(partial: Path, target: Path) -> None:
    """Syncs what was written and gives it its name."""
    with files.explained(target):
        for path in [partial] if partial.is_file() else [p for p in partial.rglob("*") if p.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        files.replace(partial, target)
        files.sync_folder(target.parent)


def _refuse_taken(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(f"{printable(path, 300)} is there already; choose another --out")
