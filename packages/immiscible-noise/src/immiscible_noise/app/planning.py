"""The command plan: a plan into a run folder, and what it brings."""

from typing import Any

import torch
from torch import Tensor

from diffcore.run import Run
from immiscible_noise.files import write_plan
from immiscible_noise.plan import NoisePlan


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
