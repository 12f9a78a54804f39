"""Loading a folder or file as a `DiffusionModel`, offline by default, without running code from it.

The libraries build modules from checked configurations; files are read here. None of their loaders is called: they
would follow names in configurations, fall back to pickles, and silently leave missing tensors empty.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffcore.checkpoint import ldm
from diffcore.checkpoint.component import read_component
from diffcore.checkpoint.families import family_of
from diffcore.checkpoint.fingerprint import fingerprint
from diffcore.checkpoint.inspect import HUB_NAME, inspect_model
from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.checkpoint.pieces import HARMLESS, Naming, folder_names
from diffcore.checkpoint.stated import require_agreement
from diffcore.checkpoint.stored import Stored, stored_in, unpickled
from diffcore.checkpoint.text_encoder import read_t5
from diffcore.checkpoint.tokenizers import build_tokenizer, installed_clip_tokenizer
from diffcore.checkpoint.walk import walk
from diffcore.denoiser import EDMSchedule, NetworkDenoiser, PredictionType
from diffcore.errors import IncompatibleModelError, MissingDependencyError, ModelNotFoundError, printable
from diffcore.io.shipped import PREFIX, shipped_folder
from diffcore.models import singlefile
from diffcore.models.assemble import make_codec, make_denoiser, make_prompts, read_schedule
from diffcore.models.build import build
from diffcore.models.model import DiffusionModel
from diffcore.runtime import Runtime

_DOWNLOADED = ("*.json", "*.txt", "*.model", "*.safetensors")
_NETWORKS = ("backbone", "codec", "text_encoder")


def load(
    source: str | Path,
    runtime: Runtime,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    prediction_type: PredictionType | None = None,
    tokenizer: Path | None = None,
    like: Path | None = None,
    text_encoder: Path | None = None,
    check_finite: bool = True,
) -> DiffusionModel:
    """Loads a diffusion model, frozen and in `eval()`.

    Args:
        source: A diffusers pipeline folder, the folder of one backbone, a safetensors file in the original layout of
            SD 1.x, 2.x or SDXL, `zoo:NAME` for a model that comes with diffcore, or the name of a repository with
            `download`.
        runtime: Device and precision of the networks.
        download: Whether a repository may be downloaded; otherwise only local files are read.
        allow_pickle: Whether weights may be unpickled, by torch's restricted unpickler, where no safetensors are.
        prediction_type: Prediction type that replaces the one in the files.
        tokenizer: A folder with CLIP's vocabulary, for single files.
        like: A pipeline folder of the same family, for single files: its configurations and tokenizers.
        text_encoder: A folder with a T5 and its vocabulary, for pipelines that came without: PixArt, SD3, Flux.
        check_finite: Whether every weight is checked for NaN and infinity.

    Raises:
        ModelNotFoundError: There is no such model here.
        IncompatibleModelError: It is unsafe, broken, or of a kind that is not supported.
    """
    _ = runtime.torch_dtype  # refuses what the device cannot do before anything is read
    path = resolve(source, download=download)
    inventory = inspect_model(path, allow_pickle=allow_pickle)
    for warning in inventory.warnings:
        warnings.warn(f"{printable(path, 300)}: {warning}", stacklevel=2)
    if inventory.layout in ("pipeline", "component"):
        require_agreement(inventory, prediction_type=prediction_type)
        plan = _plan_of_folder(inventory)
    else:
        plan = _plan_of_file(inventory, prediction_type, tokenizer, like)
    if text_encoder is not None:
        plan = _with_t5(plan, text_encoder, allow_pickle)
    stated, schedule = read_schedule(plan.backbone.class_name, plan.components.get("scheduler"), plan.settings)
    if prediction_type is not None and (prediction_type == "edm") != isinstance(schedule, EDMSchedule):
        raise IncompatibleModelError(
            f"{printable(path, 300)} has a {type(schedule).__name__}; prediction type edm needs an EDM "
            "schedule, and an EDM schedule needs edm"
        )
    modules = {name: _build(plan, name, runtime, check_finite) for name in plan.parts}
    denoiser = make_denoiser(modules[plan.backbone.name], prediction_type or stated, schedule)
    return _assembled(path, plan, denoiser, {**modules, **plan.tokenizers})


def resolve(source: str | Path, *, download: bool = False) -> Path:
    """Returns the local path of a model, downloaded first where the user allows it.

    Raises:
        ModelNotFoundError: No shipped model has this name, or the download failed.
    """
    name = str(source)
    if name.startswith(PREFIX):
        return shipped_folder(name)
    path = Path(source)
    if not download or path.exists() or not HUB_NAME.fullmatch(name):
        return path
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub is not installed; pip install 'diffcore[models]'") from error
    try:
        # One commit for the check and the fetch, whatever is pushed in between.
        commit = HfApi().model_info(name).sha
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # the hub's client and its transport each have their own
        raise ModelNotFoundError(f"{name!r} could not be fetched ({printable(error)}); check the name") from error


@dataclass(frozen=True)
class _Plan:
    """The components to build, and the files to build them from."""

    inventory: Inventory
    components: Mapping[str, Component]
    parts: Mapping[str, Stored]
    naming: Mapping[str, Naming]
    leftovers: re.Pattern[str]
    tokenizers: Mapping[str, Any]
    pipeline_class: str | None
    settings: Mapping[str, Any]

    @property
    def backbone(self) -> Component:
        """The component that is the backbone."""
        return next(self.components[name] for name in self.parts if self.components[name].role == "backbone")


def _plan_of_folder(inventory: Inventory) -> _Plan:
    parts = {name: _stored(c) for name, c in inventory.components.items() if c.role in _NETWORKS}
    tokenizers = {n: build_tokenizer(c) for n, c in inventory.components.items() if c.role == "tokenizer"}
    return _Plan(
        inventory=inventory,
        components=inventory.components,
        parts=parts,
        naming=dict.fromkeys(parts, folder_names),
        leftovers=HARMLESS,
        tokenizers=tokenizers,
        pipeline_class=inventory.class_name if inventory.layout == "pipeline" else None,
        settings=inventory.settings,
    )


def _with_t5(plan: _Plan, folder: Path, allow_pickle: bool) -> _Plan:
    """Returns a plan with the T5 of another folder in place of its own, if it has one."""
    encoder, tokenizer = read_t5(folder, plan.pipeline_class, plan.backbone, allow_pickle=allow_pickle)
    return replace(
        plan,
        components={**plan.components, encoder.name: encoder, tokenizer.name: tokenizer},
        parts={**plan.parts, encoder.name: _stored(encoder)},
        naming={**plan.naming, encoder.name: folder_names},
        tokenizers={**plan.tokenizers, tokenizer.name: build_tokenizer(tokenizer)},
    )


def _stored(component: Component) -> Stored:
    return unpickled(component.pickles[0]) if component.pickles else stored_in(component.weights, component.folder)


def _plan_of_file(
    inventory: Inventory, prediction_type: PredictionType | None, tokenizer: Path | None, like: Path | None
) -> _Plan:
    if inventory.header is not None:
        family, stored = inventory.class_name, stored_in([inventory.header], inventory.path)
    else:
        stored = unpickled(inventory.path)
        family = family_of(stored.shapes, inventory.path)
    metadata = {} if inventory.header is None else inventory.header.metadata
    plan, known_from = singlefile.described_plan(stored, metadata, family, like, prediction_type)
    if prediction_type is None and family == "sd21" and known_from.startswith("what is usual"):
        warnings.warn(
            "the weights of SD 2.x do not say what they predict; v_prediction is taken, `prediction_type` replaces it",
            stacklevel=3,
        )
    parts = singlefile.parts_of(stored, family)
    return _Plan(
        inventory=inventory,
        components=plan.components,
        parts=parts,
        naming={part: partial(ldm.component_names, family, part) for part in parts},
        leftovers=ldm.HARMLESS,
        tokenizers=_tokenizers_of_file(family, plan, tokenizer, like),
        pipeline_class=plan.class_name,
        settings=plan.settings,
    )


def _tokenizers_of_file(family: str, plan: Inventory, folder: Path | None, like: Path | None) -> dict[str, Any]:
    """Returns the tokenizers for a single file, which holds no vocabulary, from the first place that has one."""
    names = [f"tokenizer{number}" for number, _ in zip(("", "_2"), singlefile.PADS[family], strict=False)]
    if folder is not None:
        sizes = walk(folder)
        return {
            name: build_tokenizer(read_component(folder, sizes, name, "transformers", "CLIPTokenizer"), pad_token=pad)
            for name, pad in zip(names, singlefile.PADS[family], strict=True)
        }
    if like is not None:
        return {n: build_tokenizer(c) for n, c in plan.components.items() if c.role == "tokenizer"}
    found = [installed_clip_tokenizer(pad) for pad in singlefile.PADS[family]]
    return {name: tokenizer for name, tokenizer in zip(names, found, strict=True) if tokenizer is not None}


def _build(plan: _Plan, name: str, runtime: Runtime, check_finite: bool) -> torch.nn.Module:
    component = plan.components.get(name)
    if component is None:
        raise IncompatibleModelError(
            f"{printable(plan.inventory.path, 300)} holds a {name}, unknown to its family; name another with `like`"
        )
    wide = component.role == "codec" and component.config.get("force_upcast") and runtime.dtype == "float16"
    return build(
        component,
        plan.parts[name],
        plan.naming[name],
        dtype=torch.float32 if wide else runtime.torch_dtype,
        device=runtime.torch_device,
        leftovers=plan.leftovers,
        check_finite=check_finite,
    )


def _assembled(path: Path, plan: _Plan, denoiser: NetworkDenoiser, modules: dict[str, Any]) -> DiffusionModel:
    name = path.stem if path.is_file() else path.resolve().name
    codec = make_codec(name, plan.backbone.class_name, denoiser.backbone, modules.get("vae"))
    return DiffusionModel(
        name=name,
        fingerprint=fingerprint(plan.inventory, plan.components),
        denoiser=denoiser,
        codec=codec,
        prompts=make_prompts(plan.pipeline_class, modules, denoiser.backbone, codec, plan.settings),
        pipeline_class=plan.pipeline_class,
        components=plan.components,
        modules=modules,
        settings=plan.settings,
    )
