"""A copy of a checkpoint, byte for byte: under another name until complete, and without unedited weights."""

import logging
import os
import shutil
from pathlib import Path

from diffcore.checkpoint import Inventory
from diffcore.checkpoint.walk import walk
from diffcore.checkpoint.weightfiles import PICKLE_SUFFIXES
from diffcore.errors import UserError, printable
from diffcore.io import files

_LOG = logging.getLogger("diffcore.nemo_localize")


def refuse_taken(path: Path) -> None:
    """Refuses to write over what is there."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{printable(path, 300)} is there already; choose another `out`")


def partial_of(target: Path) -> Path:
    """Returns the name under which a checkpoint is written until it is whole, with nothing there."""
    partial = target.with_name(f"{target.name}.partial")
    with files.explained(partial):
        if partial.is_dir():
            shutil.rmtree(partial)
        files.remove(partial)
    return partial


def copy_model(source: Path, partial: Path, inventory: Inventory) -> list[str]:
    """Copies a model and returns the names of the files that stay behind: unedited copies of the weights."""
    if inventory.header is not None:
        copy_file(source, partial)
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
        copy_file(source / name, partial / name)
    if left_out:
        _LOG.warning("left out, as they hold the unedited weights: %s", printable(", ".join(left_out), 300))
    return left_out


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, and makes the folders above it."""
    with files.explained(target, needed=source.stat().st_size):
        files.make_folder(target.parent)
        shutil.copyfile(source, target)


def finish(partial: Path, target: Path) -> None:
    """Syncs what was written and gives it its name."""
    with files.explained(target):
        for path in [partial] if partial.is_file() else [p for p in partial.rglob("*") if p.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        files.replace(partial, target)
        files.sync_folder(target.parent)
