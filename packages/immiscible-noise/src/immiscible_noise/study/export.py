"""Writes trained networks and LoRAs in diffusers' layout, so that they load without this package."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
from diffusers import UNet2DModel

from diffcore.adapters import write_adapter
from diffcore.errors import printable
from diffcore.io import artifact
from diffcore.io.jsonfile import write_json
from diffcore.models import DiffusionModel, from_pipeline
from diffcore.run import Run
from diffcore.train import snapshot_key
from immiscible_noise.consistency import ORIGINAL
from immiscible_noise.samplers import is_stochastic
from immiscible_noise.study.recipe import AnyRecipe, Recipe
from immiscible_noise.study.settings import Objective
from immiscible_noise.study.train import load_snapshot
from immiscible_noise.study.tuned_recipe import FineTuneRecipe

_LOG = logging.getLogger("diffcore.immiscible_noise")
LORA = "pytorch_lora_weights.safetensors"
"""File name that `load_lora_weights` looks for in a folder."""

_SCHEDULERS: dict[Objective, str] = {
    "flow": "FlowMatchEulerDiscreteScheduler",
    "ddpm": "DDIMScheduler",
    "edm": "EDMEulerScheduler",
    "consistency": "CMStochasticIterativeScheduler",
    "consistency-improved": "CMStochasticIterativeScheduler",
}


def export_model(recipe: Recipe, run: Run) -> Path:
    """Writes the pipeline folder `model`, with `training.json` beside its parts, into a training's run folder.

    The network is in diffusers' own time units, so that `UNet2DModel.from_pretrained` and the scheduler beside it
    predict what it predicts here, and `diffcore.load` reads the folder. `training.json` tells how pixels were scaled
    and which noise the model saw. A folder that an interrupted command left is written anew.

    Args:
        recipe: How the model was trained.
        run: Finished run folder of its training.

    Raises:
        TypeError: The network is the multilayer perceptron, which diffusers does not know.
    """
    denoiser = load_snapshot(recipe, run.folder, recipe.settings.snapshot_steps[-1])
    if not isinstance(denoiser.backbone, UNet2DModel):
        raise TypeError(f"{type(denoiser.backbone).__name__} has no layout of diffusers")
    options = {"sigma_data": recipe.sigma_data} if recipe.settings.objective == "edm" else {}
    scheduler = getattr(diffusers, _SCHEDULERS[recipe.settings.objective])
    if recipe.settings.objective == "ddpm":
        options |= {"clip_sample": True, "clip_sample_range": recipe.clip_x0, "timestep_spacing": "linspace"}
    folder = run.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    if recipe.settings.consistency:
        options = {"sigma_min": ORIGINAL.sigma_min, "sigma_max": ORIGINAL.sigma_max, "sigma_data": recipe.sigma_data}
        options |= {"clip_denoised": False}  # x0 need not lie in [-1, 1]
        one_step: Any = diffusers.ConsistencyModelPipeline(unet=denoiser.backbone, scheduler=scheduler(**options))
        one_step.save_pretrained(folder)
    else:
        pipeline: Any = diffusers.DDPMPipeline(unet=denoiser.backbone, scheduler=scheduler(**options))
        from_pipeline(pipeline).save(folder)
    write_json(
        folder / "training.json",
        {
            "objective": recipe.settings.objective,
            "noise": asdict(recipe.coupling),
            "pixels": {"x0": "(pixels - mean) / std, pixels in [0, 1]", **asdict(recipe.scale)},
            "class_labels": recipe.num_classes,
            "samplers": _samplers(recipe),
        },
    )
    return folder


def export_tuned(recipe: FineTuneRecipe, run: Run) -> Path:
    """Writes a fine-tuned model (folder `model`) or its LoRA (folder `lora`) into the run folder of its training.

    A whole model becomes the folder that it was, with its new network; plain diffusers loads it. Of a LoRA the folder
    holds the file that `load_lora_weights` reads. `training.json` beside them, and the header of the LoRA's file, tell
    which noise the model saw, as `warn_if_stochastic` reads it. A folder that an interrupted command left is written
    anew.

    Args:
        recipe: How the model was fine-tuned, with its model in memory.
        run: Run folder of the training, whose last weights are there.
    """
    assert recipe.data is not None  # by the training
    model = recipe.data.model
    facts: dict[str, Any] = {
        "base": printable(model.name),
        "base_fingerprint": model.fingerprint,
        "noise": asdict(recipe.coupling),
        "conditions": recipe.told,
        "settings": asdict(recipe.settings),
        "samplers": _samplers(recipe),
    }
    folder = run.folder / ("lora" if recipe.settings.lora_rank else "model")
    shutil.rmtree(folder, ignore_errors=True)
    if recipe.settings.lora_rank:
        folder.mkdir()
        lora = recipe.lora(_last_weights(recipe, run.folder))
        kind = "unet" if type(model.backbone).__name__.startswith("UNet") else "transformer"
        metadata = {"noise": recipe.coupling.method, "immiscible_noise": json.dumps(facts, sort_keys=True)}
        write_adapter(lora.adapter(kind, printable(model.name)), folder / LORA, metadata=metadata)
    else:
        tuned_model(recipe, run.folder).save(folder)
    if model.scheduler is not None and recipe.coupling.method != "vanilla" and is_stochastic(model.scheduler):
        _LOG.warning(
            "the scheduler of %s adds fresh noise between its steps, which is wrong for a model that was trained on %s "
            "noise; sample with a deterministic one, such as DDIMScheduler",
            printable(model.name),
            recipe.coupling.name,
        )
    write_json(folder / "training.json", facts)
    return folder


def tuned_model(recipe: FineTuneRecipe, training: Path) -> DiffusionModel:
    """Returns the fine-tuned model with its last averaged weights, in the precision of the model that it was.

    Args:
        recipe: How the model was fine-tuned, with its model in memory.
        training: Run folder of the training, whose last weights are there.
    """
    assert recipe.data is not None  # by the training
    model, step = recipe.data.model, recipe.settings.snapshot_steps[-1]
    denoiser = load_snapshot(recipe, training, step, model.device)
    weights = artifact.check(training / "parts" / snapshot_key(step), verify=False)["sha256"]
    change = f"fine-tuned to {weights}"
    return model.with_modules(change, {model.backbone_name: denoiser.backbone.to(model.dtype)})


def _last_weights(recipe: FineTuneRecipe, training: Path) -> dict[str, Any]:
    return artifact.load(training / "parts" / snapshot_key(recipe.settings.snapshot_steps[-1])).tensors


def _samplers(recipe: AnyRecipe) -> str:
    return "deterministic ones only" if recipe.coupling.method != "vanilla" else "any"
