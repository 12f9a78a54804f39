"""The edit as files: a checkpoint that any tool loads, a small delta that undoes it, and the same edit as a LoRA.

Ablating a neuron zeroes one row of one matrix, which is a run of bytes in a safetensors file. So a checkpoint is
copied byte by byte and those runs are overwritten: nothing is loaded, converted or rounded, and putting the saved runs
back gives the very file that there was.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffcore.checkpoint import inspect_model
from diffcore.checkpoint.origin import forget_origins
from diffcore.checkpoint.walk import walk
from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.io import artifact, files
from diffcore.io.jsonfile import read_trusted, write_json
from diffcore.models.plain_loading import plain_call
from diffcore.run.record import versions
from nemo_localize.files.checkpoint import copy_file, copy_model, finish, partial_of, refuse_taken
from nemo_localize.files.lora import write_loras
from nemo_localize.files.stored_rows import backbone_headers, overwrite, read_rows, require_stored, stored_rows
from nemo_localize.neurons import NeuronSet

_DELTA = "nemo-localize/delta@1"
DELTA, MANIFEST, LORA = "delta.safetensors", "manifest.json", "lora"
_FILE, _FOLDER = "model.safetensors", "model"


def export(
    source: Path,
    neurons: NeuronSet,
    out: Path,
    *,
    reasons: Mapping[str, NeuronSet] | None = None,
    lora: bool = True,
) -> dict[str, Any]:
    """Writes an edited checkpoint, what undoes it, and the same edit as a LoRA in three layouts; returns the manifest.

    `out/model` (or `out/model.safetensors`) is the checkpoint, in the layout of its source; `out/delta.safetensors` has
    the removed rows: keep it private, since it brings the memory back. Every file of the backbone that holds a copy of
    the weights is edited, whatever its precision; pickles and further checkpoints beside the folders are left out, for
    they would carry the memory along. `_name_or_path`, a path of the machine that saved the source, is removed from the
    configurations; the delta keeps it.

    Args:
        source: A diffusers pipeline folder, the folder of one U-Net, or a single safetensors file.
        neurons: The neurons to ablate.
        out: Folder of the result, made where it does not exist.
        reasons: Neurons found for each prompt, kept in the manifest.
        lora: Whether to write the LoRAs too.

    Raises:
        UserError: There is nothing to edit, or something is in `out` already.
        IncompatibleModelError: The source is no such model, holds no such neuron, or holds it quantised.
        MachineError: The disk is full or failing; a half-written copy is named `.partial` and is written anew.

    Example:
        >>> from tempfile import mkdtemp
        >>> from diffcore.testing import tiny
        >>> folder = Path(mkdtemp())
        >>> tiny.pipeline("sd15").save_pretrained(folder / "model")
        >>> neurons = NeuronSet.of({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [0, 3]})
        >>> manifest = export(folder / "model", neurons, folder / "edited", lora=False)
        >>> manifest["num_neurons"], sorted(path.name for path in (folder / "edited").iterdir())
        (2, ['delta.json', 'delta.safetensors', 'manifest.json', 'model'])
        >>> list(restore(folder / "edited" / "model", folder / "edited" / "delta.safetensors", folder / "back"))
        ['unet/diffusion_pytorch_model.safetensors']
    """
    if not len(neurons):
        raise UserError("the set of neurons is empty: there is nothing to ablate")
    source = Path(source)
    inventory = inspect_model(source)
    target = out / (_FILE if inventory.header is not None else _FOLDER)
    refuse_taken(target)
    headers = backbone_headers(inventory)
    runs = [run for file, header in headers.items() for run in stored_rows(file, header, neurons)]
    require_stored(neurons, headers, source)
    files.make_folder(out)
    if lora:
        write_loras(source, headers, neurons, out / LORA)
    edited = sorted({run.file for run in runs})
    saved = {file: read_rows(_member(source, file), [run for run in runs if run.file == file]) for file in edited}
    partial = partial_of(target)
    left_out = copy_model(source, partial, inventory)
    origins = forget_origins(partial) if partial.is_dir() else {}
    for run in runs:
        overwrite(_member(partial, run.file), run.offset, bytes(run.length))
    record = {
        file: {
            "sha256_before": files.sha256(_member(source, file)),
            "sha256_after": files.sha256(_member(partial, file)),
            "runs": [[run.offset, run.length] for run in runs if run.file == file],
        }
        for file in edited
    }
    for file, data in origins.items():
        saved[file] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        record[file] = {
            "sha256_before": files.sha256(source / file),
            "sha256_after": files.sha256(partial / file),
            "runs": None,
        }
    artifact.save(
        out / DELTA,
        {f"file{place}": saved[file] for place, file in enumerate(record)},
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
        "load": plain_call(inventory, target.name),
        "lora": sorted(path.relative_to(out).as_posix() for path in (out / LORA).glob("*")) if lora else [],
        "versions": versions("nemo-localize"),
        "created": artifact.utc_now(),
    }
    write_json(out / MANIFEST, manifest)
    finish(partial, target)  # last: a checkpoint that is there is whole, and so is what undoes it
    return manifest


def require_editable(source: Path) -> None:
    """Raises an error for a model whose edit could not be written, before anything is computed with it.

    Args:
        source: A diffusers pipeline folder, the folder of one U-Net, or a single file.

    Raises:
        UserError: The weights are pickles, of which no copy can be edited byte by byte.
    """
    if not backbone_headers(inspect_model(source, allow_pickle=True)):
        raise UserError(f"the weights of {printable(source, 300)} are pickles; an edit needs them as safetensors")


def checkpoint_in(out: Path) -> Path | None:
    """Returns the checkpoint that `export` wrote; None where it was interrupted or never called."""
    return next((path for path in (out / _FILE, out / _FOLDER) if path.exists()), None)


def how_to_load(out: Path) -> str | None:
    """Returns a line that says how diffusers loads the folder that `export` wrote; None where it wrote none."""
    checkpoint = checkpoint_in(out)
    call = manifest_in(out).get("load") if checkpoint is not None and (out / MANIFEST).is_file() else None
    return call and f"checkpoint: {checkpoint}; diffusers loads it with {call}"


def manifest_in(out: Path) -> dict[str, Any]:
    """Returns the manifest that `export` wrote beside its checkpoint."""
    return read_trusted(out / MANIFEST)


def restore(edited: Path, delta: Path, out: Path) -> dict[str, Any]:
    """Writes the checkpoint as it was before `export`, byte for byte; returns the sums of the files that changed.

    Args:
        edited: Checkpoint that `export` wrote.
        delta: File `delta.safetensors` beside that checkpoint.
        out: Path of the restored checkpoint, where nothing may be yet.

    Raises:
        UserError: Something is at `out` already.
        CorruptArtifactError: The delta is damaged, or is not of this checkpoint.

    Example:
        See `export`, whose example restores what it wrote.
    """
    edited, out = Path(edited), Path(out)
    refuse_taken(out)
    found = artifact.load(delta, schema=_DELTA)
    record: Mapping[str, Any] = found.fields["files"]
    single = edited.is_file()
    for file, row in record.items():
        path = edited if single else edited / file
        if not path.is_file() or single != (file == "") or files.sha256(path) != row["sha256_after"]:
            raise CorruptArtifactError(
                f"{printable(path, 300)} is not what {printable(delta, 300)} was made with; "
                "give the untouched result of the same export"
            )
    partial = partial_of(out)
    if single:
        copy_file(edited, partial)
    else:
        for name in walk(edited):
            copy_file(edited / name, partial / name)
    for place, (file, row) in enumerate(record.items()):
        data = found.tensors[f"file{place}"].numpy().tobytes()
        if row["runs"] is None:  # a configuration, which is kept whole
            files.write_whole(_member(partial, file), data)
        for offset, length in row["runs"] or ():
            overwrite(_member(partial, file), offset, data[:length])
            data = data[length:]
        if files.sha256(_member(partial, file)) != row["sha256_before"]:
            raise CorruptArtifactError(f"{printable(delta, 300)} does not restore {printable(file)}; it is damaged")
    finish(partial, out)
    return {file or out.name: row["sha256_before"] for file, row in record.items()}


def _member(root: Path, file: str) -> Path:
    return root / file if file else root
