"""The command plan: a plan into a run folder, and what it brings."""

from typing import Any

import torch
from torch import Tensor

from diffcore.run import Run
from immiscible_noise.files import write_plan
from immiscible_noise.plan import NoisePlan

_SEEN = 2048  # visits that the page shows


def build_plan(
    samples: Tensor | list[Tensor],
    labels: Tensor | None,
    run: Run,
    *,
    epochs: int,
    window: int,
    strength: float,
    seed: int,
) -> dict[str, Any]:
    """Writes the plan into the run folder and returns what it brings.

    Args:
        samples: Clean samples in model space; a list of them where they come in buckets of several shapes.
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
    planned, independent = _distances(plan, samples)
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


def _distances(plan: NoisePlan, samples: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the distances of the first samples to their noise, and to that of another sample of their shape."""
    places: dict[tuple[int, ...], list[int]] = {}
    for visit, index in enumerate(plan.order[:_SEEN].tolist()):
        places.setdefault(tuple(samples[index].shape), []).append(visit)
    found = []
    for visits in map(torch.tensor, places.values()):
        x = torch.stack([samples[index] for index in plan.order[visits].tolist()]).float()
        noise = plan.noise(visits, like=x)
        found.append(torch.stack([(x - n).flatten(1).norm(dim=1) for n in (noise, noise.roll(1, 0))]))
    planned, independent = torch.cat(found, 1)
    return planned, independent
