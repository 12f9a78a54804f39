"""Checks that a model folder or file is safe to load, and lists what it holds. Reads bytes and JSON only.

No library opens an untrusted file before this module has checked it. Nothing is imported, built or unpickled
here; every refusal says what was wrong, with which file, and what to do. Imports no torch.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffcore.checkpoint.families import family_of
from diffcore.checkpoint.folders import inspect_backbone, inspect_pipeline
from diffcore.checkpoint.inventory import Inventory
from diffcore.checkpoint.quantised import refuse_quantised
from diffcore.checkpoint.stated import stated_by
from diffcore.checkpoint.walk import walk
from diffcore.checkpoint.weightfiles import PICKLE_SUFFIXES
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, printable
from diffcore.io.tensorfile import read_header, refusal_of_pickle

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def inspect_model(path: str | Path, *, allow_pickle: bool = False) -> Inventory:
    """Checks that a model folder or file is safe to load, and returns what it holds.

    Args:
        path: A pipeline folder, the folder of one backbone, or a safetensors file.
        allow_pickle: Whether pickled weights are accepted; they are not opened here.

    Raises:
        ModelNotFoundError: `path` does not exist.
        IncompatibleModelError: Something in it is unsafe, broken, or of a kind that is not supported.
    """
    path = Path(path)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        sizes = walk(path)
        return _with_strays(_inspect_folder(path, sizes, allow_pickle), sizes)
    if not stat.S_ISREG(mode):
        raise IncompatibleModelError(f"{printable(path, 300)} is neither a file nor a folder; point to a model")
    if path.suffix in PICKLE_SUFFIXES:
        if not allow_pickle:
            raise IncompatibleModelError(refusal_of_pickle(path))
        return Inventory(path, "pickle", "", {})
    if path.suffix != ".safetensors":
        raise IncompatibleModelError(f"{printable(path, 300)} is no model; point to a folder or a .safetensors file")
    header = read_header(path)
    refuse_quantised(header)
    family = family_of({name: entry.shape for name, entry in header.tensors.items()}, path)
    stated = stated_by(path, header.tensors, header.metadata)
    return Inventory(path, "single_file", family, {}, header=header, warnings=stated.warnings)


def _mode(path: Path) -> int:
    shown = printable(path, 300)
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if HUB_NAME.fullmatch(str(path)):
            raise ModelNotFoundError(
                f"'{shown}' is not a folder here; `download=True` fetches it from the hub"
            ) from None
        raise ModelNotFoundError(f"{shown} does not exist; point to a model folder or file") from None
    except (OSError, ValueError) as error:  # a circle of links, a name with NUL
        raise ModelNotFoundError(f"{shown} cannot be read ({printable(error)}); check the path") from None


def _inspect_folder(path: Path, sizes: Mapping[str, int], allow_pickle: bool) -> Inventory:
    if "model_index.json" in sizes:
        return inspect_pipeline(path, sizes, allow_pickle=allow_pickle)
    if "config.json" in sizes:
        return inspect_backbone(path, sizes, allow_pickle=allow_pickle)
    if "adapter_config.json" in sizes:
        raise IncompatibleModelError(
            f"{printable(path, 300)} is an adapter; load its base model and add it with `adapter`"
        )
    raise IncompatibleModelError(
        f"{printable(path, 300)} holds neither model_index.json nor config.json; point to a diffusers model folder"
    )


def _with_strays(found: Inventory, sizes: Mapping[str, int]) -> Inventory:
    """Adds a warning about scripts and pickles that lie around."""
    used = {path for component in found.components.values() for path in component.pickles}
    strays = [n for n in sizes if n.endswith((".py", *PICKLE_SUFFIXES)) and found.path / n not in used]
    if not strays:
        return found
    shown = ", ".join(printable(name) for name in strays[:5]) + (", …" if len(strays) > 5 else "")
    return replace(found, warnings=(*found.warnings, f"{len(strays)} files are never opened: {shown}"))
