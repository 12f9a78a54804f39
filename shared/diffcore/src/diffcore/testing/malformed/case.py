"""Cases of malformed models: a name, and a function that makes the model from a valid one."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore.testing import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Bases:
    """Valid models to start from.

    Attributes:
        backbone: The folder of a tiny DiT.
        pipeline: The folder of a tiny Stable Diffusion pipeline.
        single: A pipeline with the width of SD 1.x in one file.
        like: The pipeline folder that `single` was made from.
    """

    backbone: Path
    pipeline: Path
    single: Path
    like: Path


@dataclass(frozen=True)
class Case:
    """One malformed model.

    Attributes:
        name: Unique name that says what is wrong.
        kind: One of safetensors, config, disguise and place.
        make: Makes the model in an empty folder from the valid models, and returns the path to load.
        options: Further arguments of `load`.
    """

    name: str
    kind: str
    make: Callable[[Bases, Path], Path | str]
    options: tuple[tuple[str, Any], ...] = ()


def make_bases(folder: Path) -> Bases:
    """Writes the valid models, once for all cases."""
    from diffcore.testing.checkpoints import single_file

    backbone, pipeline, like = folder / "dit", folder / "sd15", folder / "wide"
    tiny.backbone("dit").save_pretrained(backbone)
    tiny.pipeline("sd15").save_pretrained(pipeline)
    network = tiny.pipeline("sd15", width=768)
    network.save_pretrained(like)
    return Bases(backbone, pipeline, single_file(network, folder / "sd15.safetensors", "sd15"), like)


def copied(source: Path, target: Path) -> Path:
    """Returns a copy of a folder whose files are links to the same bytes; replace them, never write into them."""
    return Path(shutil.copytree(source, target / source.name, copy_function=os.link))


def replaced(path: Path, data: bytes) -> None:
    """Puts other bytes under a name."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def edited(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON object; None as the whole value stays JSON's null."""
    replaced(path, json.dumps(json.loads(path.read_bytes()) | changes).encode())
