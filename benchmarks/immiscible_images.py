"""Natural images of 32x32 with a small U-Net: vanilla, assigned and half-assigned noise at equal steps.

    python benchmarks/immiscible_images.py cifar10.zip --split train             # an hour of one core: a smoke run
    python benchmarks/immiscible_images.py cifar10.zip --split train --images-per-arm 2000000 --seeds 3 --width 64 \
        --device cuda                                                            # a study

The archive holds a folder for each class. Fréchet distance in the features of a small classifier against training steps
and sampling steps. An interrupted run continues. Writes `immiscible-images.json` and `.md` in benchmarks/results, a
part for each set of images, and a run folder with a report. Below a million images an arm it is called a smoke run:
such models are far from done, and their order may change.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App
from immiscible_tables import curves, record

from diffcore.data import ImageSet, load_images
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.report import write_page
from immiscible_noise.coupling import PRESETS, Preset
from immiscible_noise.study.compare import Comparison, compare
from immiscible_noise.study.settings import EvaluationSettings, TrainSettings
from immiscible_noise.study.train import recipe_for

COUPLINGS: tuple[Preset, ...] = ("vanilla", "assignment", "half")
SETTINGS = TrainSettings(
    network="unet", batch_size=128, normalisation="standard", snapshots=3, learning_rate=5e-4, ema_decay=0.99,
    gradient_clip=1.0,
)  # fmt: skip
STUDY = 1_000_000  # images an arm


def run(
    data: Path,
    *,
    split: str | None = None,
    size: int = 32,
    objective: Literal["ddpm", "flow"] = "ddpm",
    width: int = 16,
    minutes: float = 60.0,
    images_per_arm: int | None = None,
    seeds: int = 1,
    samples: int = 1000,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    out: Path = Path("runs/immiscible-images"),
) -> int:
    """Trains and measures everything.

    Args:
        data: Folder or zip of images; sub-folders are classes.
        split: Folder inside the data, such as train.
        size: Side that images are resized to.
        objective: Noise prediction sampled with DDIM, the paper's, or flow matching.
        width: Number of channels in the first level of the U-Net.
        minutes: Minutes of one core that all trainings of a seed take together, from which steps are counted.
        images_per_arm: Number of images that each training sees; overrides `minutes`.
        seeds: Number of trainings for each coupling.
        samples: Number of samples per measurement.
        device: Device that trains and samples.
        out: Run folder.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    images = load_images(data, size=size, split=split, channels=3)
    name = f"{data.stem.split('-')[0]}, {size}x{size}, {objective}"
    settings = replace(SETTINGS, objective=objective, width=width)
    inputs, folder = {"images": images.sha256}, out / name.replace(", ", "-")
    config = {"objective": objective, "width": width, "seeds": seeds, "samples": samples}
    budget = {"minutes": minutes} if images_per_arm is None else {"images": images_per_arm}
    with Run.open(folder, command="immiscible-noise compare", config=config | budget, inputs=inputs) as part:
        if not part.has("steps"):  # once, so that a resumed run is the same run
            seen = images_per_arm or 60 * minutes / len(COUPLINGS) / seconds_per_image(images, settings)
            part.save("steps", {}, steps=max(round(seen / settings.batch_size), 1))
        settings = replace(settings, steps=part.load("steps").fields["steps"])
        chosen = [PRESETS[coupling] for coupling in COUPLINGS]
        evaluation = EvaluationSettings(sampling_steps=(5, 20), num_samples=samples)
        study = compare(images, inputs, part, chosen, range(seeds), settings, evaluation, Runtime(device=device))
        part.finish(study.summary())
        write_page(part)
    title = "Natural images with assigned noise"
    record("immiscible-images", title, name, table(name, study, settings, seeds), study)
    return 0


def seconds_per_image(images: ImageSet, settings: TrainSettings) -> float:
    """Returns the CPU time that a training step takes for each of its images."""
    recipe = recipe_for(images, PRESETS["vanilla"], settings, 0)
    denoiser, x = recipe.denoiser(), recipe.scale.encode(images.unit()[: settings.batch_size])
    times = []
    for _ in range(3):
        begun = time.process_time()
        denoiser(x, torch.full((len(x),), 0.5), {}).x0.square().mean().backward()
        times.append(time.process_time() - begun)
    return min(times) / len(x)


def table(name: str, study: Comparison, settings: TrainSettings, seeds: int) -> str:
    """Returns a study's section in Markdown."""
    told = "A smoke run: the models are far from done. " if settings.steps * settings.batch_size < STUDY else ""
    head = (
        f"{told}U-Net of width {settings.width}, {settings.steps} steps of {settings.batch_size} images, {seeds} "
        f"paired seed{'s' if seeds > 1 else ''}; real against real {study.floor:.2f}. Features: {study.features}."
    )
    return "\n".join([f"## {name}", "", head, "", *curves(study), ""])


if __name__ == "__main__":
    sys.exit(App(help=__doc__, result_action="return_value", default_command=run)())
