"""Plans for loading single-file checkpoints: the configurations of the family, and the tensors of each component."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffcore.checkpoint import ldm
from diffcore.checkpoint.families import PREFIX
from diffcore.checkpoint.folders import inspect_configs
from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.checkpoint.stated import CHANNELS, MARKERS, stated_by
from diffcore.checkpoint.stored import Stored
from diffcore.denoiser import DiscreteSchedule, PredictionType
from diffcore.errors import IncompatibleModelError, printable
from diffcore.models.assemble import read_schedule
from diffcore.models.buffers import CHECKED, check_buffers

CONFIGS = Path(__file__).parent / "configs"
PADS = {"sd15": ("<|endoftext|>",), "sd21": ("!",), "sdxl": ("<|endoftext|>", "!")}
"""What each family's tokenizers pad with."""
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
"""What Playground v2.5 was trained with; its files hold the scales of the latents alone."""


def plan_of(family: str, like: Path | None) -> Inventory:
    """Returns the configurations of a family: those shipped here, or those of a pipeline folder that the user names.

    Raises:
        IncompatibleModelError: The folder is of another family.
    """
    plan = inspect_configs(CONFIGS / family if like is None else like)
    wanted = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    if plan.class_name != wanted:
        raise IncompatibleModelError(
            f"{printable(like, 300)} is of class {plan.class_name}, the file needs {wanted}; name another folder"
        )
    return plan


def described_plan(
    stored: Stored,
    metadata: Mapping[str, str],
    family: str,
    like: Path | None,
    prediction_type: PredictionType | None,
) -> tuple[Inventory, str]:
    """Returns the configurations of a file by its own statements, and the place that states the prediction type.

    Args:
        stored: The tensors of the single file.
        metadata: Metadata of the file's header.
        family: One of sd15, sd21 and sdxl.
        like: Pipeline folder whose configurations are taken; None takes those shipped here.
        prediction_type: Prediction type that replaces the one in the file.

    Raises:
        IncompatibleModelError: The file contradicts itself or its family.
    """
    plan = plan_of(family, like)
    stated = stated_by(stored.where, stored.shapes, metadata)
    said = None if prediction_type else stated.prediction
    usual = printable(like / "scheduler", 300) if like is not None else f"what is usual for {family}"
    if "scheduler" not in plan.components:
        plan = _with_component(plan, plan_of(family, None).components["scheduler"])
        usual = f"what is usual for {family}"
    if _is_edm(stored):
        if prediction_type not in (None, "edm"):
            raise IncompatibleModelError(
                f"{printable(stored.where, 300)} holds edm_mean and edm_std; leave `prediction_type` out"
            )
        return _edm_plan(plan, stored), "the tensors edm_mean and edm_std"
    scheduler = plan.components["scheduler"]
    config: dict[str, Any] = dict(scheduler.config)
    if said is not None:
        config["prediction_type"] = said.prediction
    if stated.zero_snr is not None:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plan = _with_component(plan, replace(scheduler, config=config))
    _, schedule = read_schedule("UNet2DConditionModel", plan.components["scheduler"], plan.settings)
    if isinstance(schedule, DiscreteSchedule):
        codec = plan.components.get("vae")
        check_buffers(stored, schedule, codec.config.get("scaling_factor", 0.18215) if codec else None)
    return plan, said.where if said else usual


def _is_edm(stored: Stored) -> bool:
    return all(name in stored.shapes for name in CHANNELS)


def _edm_plan(plan: Inventory, stored: Stored) -> Inventory:
    """Returns a plan for Playground v2.5 and similar models: EDM's preconditioning, latents scaled channel by channel.

    Raises:
        IncompatibleModelError: The scales are none.
    """
    scales = {name: value.double().flatten() for name, value in stored.read(CHANNELS)}
    vae = plan.components.get("vae", plan_of("sdxl", None).components["vae"])
    channels = int(vae.config.get("latent_channels", 4))
    usable = all(len(value) == channels and bool(value.isfinite().all()) for value in scales.values())
    if not (usable and bool((scales["edm_std"] > 0).all())):
        raise IncompatibleModelError(
            f"{printable(stored.where, 300)} has edm_mean and edm_std that are not {channels} numbers each; "
            "download the model again"
        )
    own = {"latents_mean": scales["edm_mean"].tolist(), "latents_std": scales["edm_std"].tolist()}
    plan = _with_component(plan, replace(vae, config={**vae.config, **own, "scaling_factor": _EDM["sigma_data"]}))
    scheduler = Component("scheduler", "scheduler", "diffusers", "EDMEulerScheduler", dict(_EDM), plan.path)
    return _with_component(plan, scheduler)


def _with_component(plan: Inventory, component: Component) -> Inventory:
    return replace(plan, components={**plan.components, component.name: component})


def parts_of(stored: Stored, family: str) -> dict[str, Stored]:
    """Returns the tensors of each component that the file holds, by the component's name in the pipeline.

    Raises:
        IncompatibleModelError: Some tensors belong to no component.
    """
    bare = not any(name.startswith(PREFIX) for name in stored.shapes)
    prefixes = {"unet": "" if bare else PREFIX, "vae": "first_stage_model."}
    prefixes |= {part: ldm.root_of(of, part, stored.shapes) for of, part in ldm.TEXT_ENCODERS if of == family}
    kept = [name for name in stored.shapes if not _is_unused(name, family)]
    if bare:
        return {"unet": stored.restricted(kept)}
    parts = {part: [n for n in kept if n.startswith(prefix)] for part, prefix in prefixes.items()}
    strangers = [name for name in kept if not name.startswith(tuple(prefixes.values()))]
    if strangers:
        raise IncompatibleModelError(
            f"{printable(stored.where, 300)} holds {len(strangers)} tensors that no {family} has, such as "
            f"{printable(strangers[0])!r}; if they change what the model does it is not supported, if not save a copy "
            "without them"
        )
    return {part: stored.restricted(names) for part, names in parts.items() if names}


def _is_unused(name: str, family: str) -> bool:
    if name.removeprefix(PREFIX) in MARKERS or ldm.HARMLESS.fullmatch(name) or CHECKED.fullmatch(name):
        return True
    # OpenCLIP-H is stored whole; SD 2.x stops before its last layer.
    return family == "sd21" and _LAST_LAYER.match(name) is not None


_LAST_LAYER = re.compile(r"(cond_stage_model|conditioner\.embedders\.0)\.(\w+\.)*(resblocks|encoder\.layers)\.23\.")
