"""Wrapping a diffusers pipeline in memory as a `DiffusionModel` around the same networks.

A pipeline states what its folder would state: an index of its parts, and a configuration of each. Both are read by the
code that reads folders, so that schedule, prediction type, prompts and codec mean the same.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from diffcore.checkpoint.catalog import IGNORED_COMPONENTS, PIPELINES
from diffcore.checkpoint.component import read_component, role_of
from diffcore.checkpoint.configcheck import cleaned
from diffcore.checkpoint.fingerprint import fingerprint_of_modules
from diffcore.checkpoint.inventory import Component
from diffcore.checkpoint.refusal import about
from diffcore.checkpoint.walk import walk
from diffcore.errors import IncompatibleModelError, printable
from diffcore.models.assemble import make_codec, make_denoiser, make_prompts, read_schedule
from diffcore.models.model import DiffusionModel

_NOWHERE = Path("memory")


def from_pipeline(pipe: Any, *, scheduler: Any = None, name: str | None = None) -> DiffusionModel:
    """Returns a diffusers pipeline as a model; the networks stay the pipeline's own objects.

    Nothing is copied, moved, frozen or put into `eval()`: an edit of `pipe.unet` in place is an edit of the model, and
    the other way round. A network that is assigned to the pipeline afterwards is not seen, and the fingerprint is that
    of the weights at the time of the call.

    Args:
        pipe: A pipeline of a class that `load` knows or its image-to-image relative, or a bare backbone network.
        scheduler: A scheduler object that replaces the pipeline's own; a bare backbone has no other.
        name: Name of the model in messages and results; by default the name of its class.

    Raises:
        IncompatibleModelError: The pipeline, or one of its parts, is of a class that is not supported.

    Example:
        >>> from diffcore.testing import tiny
        >>> pipe = tiny.pipeline("sd15")
        >>> model = from_pipeline(pipe)
        >>> model.backbone is pipe.unet, model.shape
        (True, (4, 8, 8))
    """
    if isinstance(pipe, nn.Module):
        parts, settings, class_name = {"backbone": pipe}, dict[str, Any](), None
    else:
        parts, settings, class_name = _parts_of(pipe)
    if scheduler is not None:
        parts["scheduler"] = scheduler
    with TemporaryDirectory() as folder:
        components = {key: _component(key, part, Path(folder)) for key, part in parts.items()}
        digest = fingerprint_of_modules(components, parts, settings)
    components = {key: replace(found, folder=_NOWHERE / key, files=()) for key, found in components.items()}
    modules = {key: part for key, part in parts.items() if components[key].role != "scheduler"}
    backbone = next((modules[key] for key, found in components.items() if found.role == "backbone"), None)
    if backbone is None:
        raise IncompatibleModelError(f"{type(pipe).__name__} has no backbone; give it a unet or transformer first")
    name = name or type(pipe).__name__
    codec = make_codec(name, type(backbone).__name__, backbone, modules.get("vae"))
    kind, schedule = read_schedule(type(backbone).__name__, components.get("scheduler"), {})
    return DiffusionModel(
        name=name,
        fingerprint=digest,
        denoiser=make_denoiser(backbone, kind, schedule),
        codec=codec,
        prompts=make_prompts(class_name, modules, backbone, codec, settings),
        pipeline_class=class_name,
        components=components,
        modules=modules,
        settings=settings,
    )


def _parts_of(pipe: Any) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Returns the parts of a pipeline by name, its scalar settings, and the class that `load` knows it by."""
    class_name = type(pipe).__name__.replace("Img2Img", "")
    if class_name not in PIPELINES:
        raise IncompatibleModelError(
            f"{printable(type(pipe).__name__)} is a pipeline of unknown kind; known are {', '.join(PIPELINES)}"
        )
    parts = {key: getattr(pipe, key, None) for key in PIPELINES[class_name]}
    index = {key: value for key, value in pipe.config.items() if not key.startswith("_") and key not in parts}
    settings = {
        key: value
        for key, value in index.items()
        if key not in IGNORED_COMPONENTS and (value is None or isinstance(value, bool | int | float | str))
    }
    return {key: part for key, part in parts.items() if part is not None}, settings, class_name


def _component(name: str, part: Any, folder: Path) -> Component:
    """Returns the description that a saved part would have; tokenizers are written to `folder` and read back."""
    library, class_name = type(part).__module__.partition(".")[0], type(part).__name__
    role = role_of(library, class_name)
    if role is None:
        raise IncompatibleModelError(f"{name} is of class {library}.{printable(class_name)}, which is not supported")
    if role == "tokenizer":
        part.save_pretrained(folder / name)
        return read_component(folder / name, walk(folder / name), name, library, class_name)
    stated: Mapping[str, Any] = json.loads((part if library == "diffusers" else part.config).to_json_string())
    if any(parameter.is_meta for parameter in getattr(part, "parameters", tuple)()):
        raise IncompatibleModelError(
            f"{name} has no weights in memory; load the pipeline without offloading or device_map"
        )
    with about(_NOWHERE / name):
        config, dropped = cleaned(stated, role, class_name)
    return Component(name, role, library, class_name, config, _NOWHERE / name, dropped=dropped)
