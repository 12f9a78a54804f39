"""Diagnoses a set of samples and keeps what a report shows of it, made from the data alone, before any training."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from diffcore.data import ImageSet
from diffcore.run import Run
from immiscible_noise.assign import assign_noise
from immiscible_noise.diagnose import CouplingStatistics, diagnose
from immiscible_noise.select import select_noise
from immiscible_noise.study.recipe import PixelScale

_ROUNDS = 256

Pictures = Callable[[Tensor], Tensor]
"""Turns a few samples into pictures in [0, 1] (b, 1 or 3, h, w)."""


def diagnose_images(
    images: ImageSet, run: Run, batch_sizes: Sequence[int], k: int, normalisation: str, seed: int
) -> dict[str, Any]:
    """Measures what assigning noise does to images in pixel space; see `diagnose_samples`.

    Args:
        images: Images, with labels where the leak is to be measured.
        run: Run folder that receives the parts.
        batch_sizes: Batch sizes that are tried.
        k: Number of draws per image for nearest-of-k selection.
        normalisation: "symmetric" or "standard", as for a training.
        seed: Number that fixes batches and noise.
    """
    scale = PixelScale.of(images, normalisation)
    x0 = scale.encode(images.unit())
    return diagnose_samples(x0, images.labels, run, batch_sizes, k, seed, pictures=scale.decode, shown_as="images")


def diagnose_samples(
    x0: Float[Tensor, "n *data"],
    labels: Int[Tensor, " n"] | None,
    run: Run,
    batch_sizes: Sequence[int],
    k: int,
    seed: int,
    *,
    pictures: Pictures | None = None,
    shown_as: str = "channel means",
) -> dict[str, Any]:
    """Measures what assigning noise does to samples; saves parts `diagnosis` and `gallery`, and a table.

    Args:
        x0: Clean samples as the diffusion sees them, such as latents.
        labels: Label of each sample where the leak is to be measured.
        run: Run folder that receives the parts.
        batch_sizes: Batch sizes that are tried.
        k: Number of draws per sample for nearest-of-k selection.
        seed: Number that fixes batches and noise.
        pictures: Turns samples into pictures; without it the mean over the channels is shown, where there is one.
        shown_as: Words that say what the pictures are.

    Returns:
        The figures of `result.json`.
    """
    generator = torch.Generator().manual_seed(seed)
    diagnosis = diagnose(x0, labels=labels, batch_sizes=batch_sizes, k=k, generator=generator)
    batch_size = min(max(batch_sizes), 256, len(x0))
    shown = gallery(x0, labels, batch_size, k, seed, pictures=pictures)
    couplings = [name.removeprefix("distances/") for name in shown if name.startswith("distances/")]
    run.save("gallery", shown, batch_size=batch_size, rounds=_ROUNDS, couplings=couplings, shown_as=shown_as)
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
    x0: Float[Tensor, "n *data"],
    labels: Int[Tensor, " n"] | None,
    batch_size: int,
    k: int,
    seed: int,
    *,
    pictures: Pictures | None = None,
    count: int = 10,
) -> dict[str, Tensor]:
    """Lets a few samples meet noise again and again, in batches filled up with random others.

    Args:
        x0: Clean samples; where they are labelled, the few are of different labels.
        labels: Label of each sample.
        batch_size: Number of samples per batch.
        k: Number of draws per sample for nearest-of-k selection.
        seed: Number that fixes samples and noise.
        pictures: Turns samples into pictures.
        count: Number of samples shown; fewer where a batch does not hold so many.

    Returns:
        Pictures of the few samples as `images`; for each the average over the batches of its `independent` and of its
        `assigned` noise, in which the sample shows through; and all distances between sample and noise, by coupling, as
        `distances/NAME`. Samples that are no pictures (b, c, h, w) have the distances alone.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = _of_different_labels(len(x0), labels, min(count, batch_size), generator)
    independent, assigned = (torch.zeros(len(shown), *x0.shape[1:]) for _ in range(2))
    distances: dict[str, list[Tensor]] = {"independent": [], "assigned": [], f"nearest of {k}": []}
    for _ in range(_ROUNDS):
        others = torch.randperm(len(x0), generator=generator)
        rows = torch.cat([shown, others[~torch.isin(others, shown)]])[:batch_size]
        batch = x0[rows].float()
        noise = torch.randn(batch.shape, generator=generator)
        near = assign_noise(batch, noise)
        independent += noise[: len(shown)] / _ROUNDS
        assigned += near[: len(shown)] / _ROUNDS
        nearest = select_noise(batch, k, generator=generator)
        for kept, met in zip(distances.values(), (noise, near, nearest), strict=True):
            kept.append((batch - met).flatten(1).norm(dim=1))
    found = {f"distances/{name}": torch.cat(parts) for name, parts in distances.items()}
    if x0.ndim != 4:
        return found
    drawn = _in_range(_channel_mean(x0[shown].float())) if pictures is None else pictures(x0[shown].float()).cpu()
    size = drawn.shape[-2:]
    averages = [functional.interpolate(_channel_mean(a), size=size, mode="nearest") for a in (independent, assigned)]
    channels = max(drawn.shape[1], averages[0].shape[1])
    named = zip(("images", "independent", "assigned"), (drawn, *averages), strict=True)
    return {name: tensor.expand(-1, channels, -1, -1).contiguous() for name, tensor in named} | found


def _channel_mean(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
    """Returns one or three channels as they are, and others as their mean."""
    return x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)


def _in_range(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
    """Returns pictures around grey, on one scale for all."""
    return (0.5 + (x - x.mean()) / (4 * x.std().clamp(min=1e-6))).clamp(0, 1)


def _row(statistics: CouplingStatistics) -> dict[str, Any]:
    """Returns a row of the table, in which the leak is three numbers."""
    row = asdict(statistics)
    del row["num_pairs"]
    leak = row.pop("leak") or {}
    return row | {"leak": leak.get("accuracy"), "leak_error": leak.get("standard_error"), "chance": leak.get("chance")}


def _of_different_labels(
    total: int, labels: Int[Tensor, " n"] | None, count: int, generator: torch.Generator
) -> Int[Tensor, " m"]:
    """Returns positions of samples, one per label in turn as far as there are labels."""
    order = torch.randperm(total, generator=generator)
    if labels is None:
        return order[:count]
    ordered = labels[order]
    # The first of each label, then the rest.
    first = torch.tensor([int((ordered == label).nonzero()[0]) for label in ordered.unique()])
    rest = order[~torch.isin(torch.arange(len(order)), first)]
    return torch.cat([order[first], rest])[:count]
