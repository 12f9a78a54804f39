"""Reading a backbone's configuration from disk: a pipeline folder, the folder of a backbone, or its `config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffcore.checkpoint.catalog import BACKBONES, current_class
from diffcore.checkpoint.folders import inspect_configs
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, printable
from diffcore.io.strictjson import read_untrusted
from diffusion_featsel.inventory import meta_backbone


def read_backbone_config(path: Path | str) -> Mapping[str, Any]:
    """Returns the configuration of the backbone at a path; weights are not looked for, and need not be there.

    Args:
        path: A pipeline folder with a `model_index.json`, the folder of one backbone, or a `config.json`.

    Raises:
        ModelNotFoundError: There is nothing at the path, or a folder without configurations.
        IncompatibleModelError: The configuration is damaged, unsafe, or of no backbone that is known.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        found = inspect_configs(path)
        backbone = next(part for part in found.components.values() if part.role == "backbone")
        return {**backbone.config, "_class_name": backbone.class_name}
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelNotFoundError(
            f"{printable(file, 300)} is not there; point to a pipeline folder, the folder of a backbone, or a config.json"
        )
    config = read_untrusted(file)
    name = config.get("_class_name")
    if not isinstance(name, str) or current_class(name, config) not in BACKBONES:
        raise IncompatibleModelError(
            f"{printable(file, 300)} is the configuration of {printable(name) if name else 'no class'}, which is no "
            "known backbone; point to a pipeline folder, or to the config.json of its unet or transformer"
        )
    return config


def read_meta_backbone(path: Path | str) -> nn.Module:
    """Returns the backbone at a path without weights, on the meta device, as `inventory` takes it.

    Args:
        path: A pipeline folder with a `model_index.json`, the folder of one backbone, or a `config.json`.

    Raises:
        ModelNotFoundError: There is nothing at the path, or a folder without configurations.
        IncompatibleModelError: The configuration is damaged, unsafe, or of no backbone that is known.
    """
    return meta_backbone(read_backbone_config(path))
