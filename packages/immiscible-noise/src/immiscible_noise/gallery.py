"""Pictures of what an assignment does, made from the data alone, before any training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.data import ImageSet
from immiscible_noise.assign import assign_noise
from immiscible_noise.select import select_noise
from immiscible_noise.train import PixelScale


@dataclass(frozen=True)
class Gallery:
    """Averages and distances over many random batches.

    Attributes:
        images: Some images, in [0, 1].
        independent: For each of them, the average over the batches of the independent noise.
        assigned: The average of the noise that the assignment gave it: the image shows through.
        distances: By pairing, the distance between image and noise of every pair.
        batch_size: Of the batches.
        rounds: Number of batches.
    """

    images: Float[Tensor, "n c h w"]
    independent: Float[Tensor, "n c h w"]
    assigned: Float[Tensor, "n c h w"]
    distances: dict[str, Float[Tensor, " pairs"]]
    batch_size: int
    rounds: int


def make_gallery(
    images: ImageSet,
    scale: PixelScale,
    *,
    batch_size: int = 256,
    rounds: int = 256,
    count: int = 10,
    k: int = 4,
    seed: int = 0,
) -> Gallery:
    """Pairs a few images with noise again and again, in batches filled up with random others.

    Args:
        images: The data; where they are labelled, the few are of different labels.
        scale: To model space.
        batch_size: Images per batch; fewer where there are not so many.
        rounds: Number of batches.
        count: Number of images shown; fewer where a batch does not hold so many.
        k: Draws per image for nearest-of-k selection.
        seed: Fixes images and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(images))
    shown = _of_different_labels(images, min(count, batch_size), generator)
    independent, assigned = (torch.zeros(len(shown), *images.images.shape[1:]) for _ in range(2))
    distances: dict[str, list[Tensor]] = {"independent": [], "assigned": [], f"nearest of {k}": []}
    for _ in range(rounds):
        others = torch.randperm(len(images), generator=generator)
        rows = torch.cat([shown, others[~torch.isin(others, shown)]])[:batch_size]
        x0 = scale.encode(images.images[rows].float() / 255)
        noise = torch.randn(x0.shape, generator=generator)
        near = assign_noise(x0, noise)
        independent += noise[: len(shown)] / rounds
        assigned += near[: len(shown)] / rounds
        nearest = select_noise(x0, k, generator=generator)
        for kept, paired in zip(distances.values(), (noise, near, nearest), strict=True):
            kept.append((x0 - paired).flatten(1).norm(dim=1))
    shown_images = images.unit()[shown]
    joined = {name: torch.cat(parts) for name, parts in distances.items()}
    return Gallery(shown_images, independent, assigned, joined, batch_size, rounds)


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
