"""Writes a trained U-Net in diffusers' layout, so that it loads without this package."""

from dataclasses import asdict
from pathlib import Path

import diffusers
from diffusers import UNet2DModel

from diffcore.io.jsonfile import write_json
from diffcore.run import Run
from immiscible_noise.study.settings import Objective
from immiscible_noise.study.train import Recipe, load_snapshot

_SCHEDULERS: dict[Objective, str] = {
    "flow": "FlowMatchEulerDiscreteScheduler",
    "ddpm": "DDIMScheduler",
    "edm": "EDMEulerScheduler",
}


def export_model(recipe: Recipe, run: Run) -> Path:
    """Writes `model/unet`, `model/scheduler` and `model/training.json` into a training's run folder.

    The network is in diffusers' own time units, so that `UNet2DModel.from_pretrained` and the scheduler beside it
    predict what it predicts here. `training.json` tells how pixels were scaled and which noise the model saw.

    Args:
        recipe: How the model was trained.
        run: Finished run folder of its training.

    Raises:
        TypeError: The network is the multilayer perceptron, which diffusers does not know.
    """
    denoiser = load_snapshot(recipe, run.folder, recipe.settings.snapshot_steps[-1])
    if not isinstance(denoiser.backbone, UNet2DModel):
        raise TypeError(f"{type(denoiser.backbone).__name__} has no layout of diffusers")
    folder = run.folder / "model"
    denoiser.backbone.save_pretrained(folder / "unet", safe_serialization=True)
    options = {"sigma_data": recipe.sigma_data} if recipe.settings.objective == "edm" else {}
    scheduler = getattr(diffusers, _SCHEDULERS[recipe.settings.objective])
    if recipe.settings.objective == "ddpm":
        options |= {"clip_sample": True, "clip_sample_range": recipe.clip_x0, "timestep_spacing": "linspace"}
    scheduler(**options).save_pretrained(folder / "scheduler")
    write_json(
        folder / "training.json",
        {
            "objective": recipe.settings.objective,
            "noise": asdict(recipe.coupling),
            "pixels": {"x0": "(pixels - mean) / std, pixels in [0, 1]", **asdict(recipe.scale)},
            "class_labels": recipe.num_classes,
            "samplers": "deterministic ones only" if recipe.coupling.method != "vanilla" else "any",
        },
    )
    return folder
