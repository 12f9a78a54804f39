"""Diagnoses a set of images and keeps what a report shows of it, made from the data alone, before any training."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffcore.data import ImageSet
from diffcore.run import Run
from immiscible_noise.assign import assign_noise
from immiscible_noise.diagnose import CouplingStatistics, diagnose
from immiscible_noise.select import select_noise
from immiscible_noise.study.train import PixelScale

_ROUNDS = 256


def diagnose_images(
    images: ImageSet, run: Run, batch_sizes: Sequence[int], k: int, normalisation: str, seed: int
) -> dict[str, Any]:
    """Measures what assigning noise does to images; saves parts `diagnosis` and `gallery`, and a table.

    Args:
        images: Images, with labels where the leak is to be measured.
        run: Run folder that receives the parts.
        batch_sizes: Batch sizes that are tried.
        k: Number of draws per image for nearest-of-k selection.
        normalisation: "symmetric" or "standard", as for a training.
        seed: Number that fixes batches and noise.

    Returns:
        The figures of `result.json`.
    """
    scale = PixelScale.of(images, normalisation)
    x0, generator = scale.encode(images.unit()), torch.Generator().manual_seed(seed)
    diagnosis = diagnose(x0, labels=images.labels, batch_sizes=batch_sizes, k=k, generator=generator)
    batch_size = min(max(batch_sizes), 256, len(images))
    shown = gallery(images, scale, batch_size, k, seed)
    couplings = [name.removeprefix("distances/") for name in shown if name.startswith("distances/")]
    run.save("gallery", shown, batch_size=batch_size, rounds=_ROUNDS, couplings=couplings)
    rows = [_row(statistics) for statistics in diagnosis.statistics]
    advice = diagnosis.recommendation
    run.save("diagnosis", {}, rows=rows, coupling=advice.coupling.name, why=advice.why)
    run.table("diagnosis", rows)
    named = {f"{row['coupling']}, batch {row['batch_size']}": row for row in rows}
    return {
        "recommendation": advice.why,
        "coupling": advice.coupling.name,
        "reduction": {name: row["reduction"] for name, row in named.items()},
        "leak": {name: row["leak"] for name, row in named.items() if row["leak"] is not None},
    }


def gallery(
    images: ImageSet, scale: PixelScale, batch_size: int, k: int, seed: int, *, count: int = 10
) -> dict[str, Tensor]:
    """Lets a few images meet noise again and again, in batches filled up with random others.

    Args:
        images: Images; where they are labelled, the few are of different labels.
        scale: Map from pixels to model space.
        batch_size: Number of images per batch.
        k: Number of draws per image for nearest-of-k selection.
        seed: Number that fixes images and noise.
        count: Number of images shown; fewer where a batch does not hold so many.

    Returns:
        The few `images`; for each the average over the batches of its `independent` and of its `assigned` noise, in
        which the image shows through; and all distances between image and noise, by coupling, as `distances/NAME`.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = _of_different_labels(images, min(count, batch_size), generator)
    independent, assigned = (torch.zeros(len(shown), *images.images.shape[1:]) for _ in range(2))
    distances: dict[str, list[Tensor]] = {"independent": [], "assigned": [], f"nearest of {k}": []}
    for _ in range(_ROUNDS):
        others = torch.randperm(len(images), generator=generator)
        rows = torch.cat([shown, others[~torch.isin(others, shown)]])[:batch_size]
        x0 = scale.encode(images.images[rows].float() / 255)
        noise = torch.randn(x0.shape, generator=generator)
        near = assign_noise(x0, noise)
        independent += noise[: len(shown)] / _ROUNDS
        assigned += near[: len(shown)] / _ROUNDS
        nearest = select_noise(x0, k, generator=generator)
        for kept, met in zip(distances.values(), (noise, near, nearest), strict=True):
            kept.append((x0 - met).flatten(1).norm(dim=1))
    averages = {"images": images.unit()[shown], "independent": independent, "assigned": assigned}
    return averages | {f"distances/{name}": torch.cat(parts) for name, parts in distances.items()}


def _row(statistics: CouplingStatistics) -> dict[str, Any]:
    """Returns a row of the table, in which the leak is three numbers."""
    row = asdict(statistics)
    del row["num_pairs"]
    leak = row.pop("leak") or {}
    return row | {"leak": leak.get("accuracy"), "leak_error": leak.get("standard_error"), "chance": leak.get("chance")}


def _of_different_labels(images: ImageSet, count: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Returns positions of images, one per label in turn as far as there are labels."""
    order = torch.randperm(len(images), generator=generator)
    if images.labels is None:
        return order[:count]
    labels = images.labels[order]
    # The first of each label, then the rest.
    first = torch.tensor([int((labels == label).nonzero()[0]) for label in labels.unique()])
    rest = order[~torch.isin(torch.arange(len(order)), first)]
    return torch.cat([order[first], rest])[:count]
