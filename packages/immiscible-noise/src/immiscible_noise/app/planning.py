"""The command plan: samples from a file or a folder, a plan into a run folder, and what it brings."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffcore.errors import UserError, printable
from diffcore.io.files import sha256
from diffcore.run import Run
from immiscible_noise.app.options import Data
from immiscible_noise.files import write_plan
from immiscible_noise.plan import NoisePlan
from immiscible_noise.study.train import PixelScale


def read_samples(data: Path, images: Data, normalisation: str) -> tuple[Tensor, Tensor | None, dict[str, str]]:
    """Returns samples in model space, their labels if there are any, and the sha256 of where they come from.

    Args:
        data: Safetensors file of latents, or folder or zip of images.
        images: Settings with which images are read.
        normalisation: Map of pixels to model space.

    Raises:
        UserError: The file holds no latents, or labels that do not fit them.
    """
    if data.suffix != ".safetensors":
        loaded, inputs = images.read(data)
        scale = PixelScale.of(loaded, normalisation)
        return scale.encode(loaded.images.float() / 255), loaded.labels, inputs
    try:
        tensors = load_file(data)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{printable(data)} cannot be read as a safetensors file: {printable(error, 200)}") from error
    latents, labels = tensors.get("latents"), tensors.get("labels")
    if latents is None or latents.ndim < 2 or not latents.is_floating_point() or len(latents) == 0:
        raise UserError(
            f"{printable(data)} has no floating tensor `latents` with a first dimension of samples; "
            f"it has {', '.join(sorted(tensors)) or 'nothing'}"
        )
    if labels is not None and (len(labels) != len(latents) or labels.is_floating_point()):
        raise UserError(f"`labels` of {printable(data)} are not one integer for each of {len(latents)} latents")
    return latents, labels, {printable(data.name): sha256(data)}


def build_plan(
    samples: Tensor, labels: Tensor | None, run: Run, *, epochs: int, window: int, strength: float, seed: int
) -> dict[str, Any]:
    """Writes the plan into the run folder and returns what it brings.

    Args:
        samples: Clean samples in model space.
        labels: One label per sample, if noise is to be exchanged inside labels only.
        run: Run folder that receives `plan.safetensors`.
        epochs: Number of shuffled passes over the samples.
        window: Number of upcoming visits that exchange their noises.
        strength: Share of each window that is assigned.
        seed: Number that fixes order and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(samples), generator=generator) for _ in range(epochs)])
    plan = NoisePlan.build(
        samples, order, window=window, seed=seed, generator=generator, strength=strength, labels=labels
    )
    path = run.folder / "plan.safetensors"
    write_plan(plan, path)
    seen = torch.arange(min(len(plan), 2048))
    x = samples[plan.order[seen]].float()
    noise = plan.noise(seen, like=x)
    planned, independent = ((x - n).flatten(1).norm(dim=1) for n in (noise, noise.roll(1, 0)))
    run.save("gallery", {"planned": planned, "independent": independent})
    told = {
        "visits": len(plan),
        "window": window,
        "distance_reduction": float(1 - planned.mean() / independent.mean()),
        "file": path.name,
        "megabytes": path.stat().st_size / 1e6,
    }
    run.save("plan", {}, **told)
    return told
