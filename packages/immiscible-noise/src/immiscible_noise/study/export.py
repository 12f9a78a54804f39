"""Writes a trained U-Net in diffusers' layout, so that it loads without this package."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
from diffusers import UNet2DModel

from diffcore.io.jsonfile import write_json
from diffcore.models import from_pipeline
from diffcore.run import Run
from immiscible_noise.consistency import ORIGINAL
from immiscible_noise.study.settings import Objective
from immiscible_noise.study.train import Recipe, load_snapshot

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
            "samplers": "deterministic ones only" if recipe.coupling.method != "vanilla" else "any",
        },
    )
    return folder
