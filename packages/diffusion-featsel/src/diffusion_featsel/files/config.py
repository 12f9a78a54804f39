"""Reading a backbone's configuration from disk: a pipeline folder, the folder of a backbone, or its `config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffcore.checkpoint.catalog import BACKBONES, current_class
from diffcore.checkpoint.configcheck import cleaned
from diffcore.checkpoint.refusal import about
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, printable
from diffcore.io.strictjson import read_untrusted
from diffusion_featsel.inventory import meta_backbone


def read_backbone_config(path: Path | str) -> Mapping[str, Any]:
    """Returns the configuration of the backbone at a path; weights are not looked for, and need not be there.

    Args:
        path: A pipeline folder with its `unet` or `transformer`, the folder of one backbone, or a `config.json`.

    Raises:
        ModelNotFoundError: There is nothing at the path, or a folder without configurations.
        IncompatibleModelError: The configuration is damaged, unsafe, or of no backbone that is known.
    """
    path = Path(path)
    inside = (path / part / "config.json" for part in ("unet", "transformer", "."))
    file = next((file for file in inside if file.is_file()), path)
    if not file.is_file():
        raise ModelNotFoundError(
            f"{printable(path, 300)} has no configuration of a backbone; point to a pipeline folder, the folder of a "
            "backbone, or a config.json"
        )
    stated = read_untrusted(file)
    name = stated.get("_class_name")
    known = current_class(name, stated) if isinstance(name, str) else ""
    if known not in BACKBONES:
        raise IncompatibleModelError(
            f"{printable(file, 300)} is the configuration of {printable(name) if name else 'no class'}, which is no "
            "known backbone; point to a pipeline folder, or to the config.json of its unet or transformer"
        )
    with about(file):
        config, _ = cleaned(stated, "backbone", known)
    return {**config, "_class_name": known}


def read_meta_backbone(path: Path | str) -> nn.Module:
    """Returns the backbone at a path without weights, on the meta device, as `inventory` takes it.

    Args:
        path: A pipeline folder with its `unet` or `transformer`, the folder of one backbone, or a `config.json`.

    Raises:
        ModelNotFoundError: There is nothing at the path, or a folder without configurations.
        IncompatibleModelError: The configuration is damaged, unsafe, or of no backbone that is known.
    """
    return meta_backbone(read_backbone_config(path))
