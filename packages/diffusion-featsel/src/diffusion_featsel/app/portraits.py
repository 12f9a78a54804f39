"""Data with exact labels for the demo and the study: portraits of the zoo, with key points and masks.

Portraits are aligned, so that answering with the same position is right for half of the pairs. One image of each pair
is therefore warped by a random known transform.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffcore.zoo import keypoints, masks
from diffusion_featsel.pairs import Pair, warped_pairs
from diffusion_featsel.warp import STRONG, random_affine, warp_images

MODEL = "zoo:portraits-sd"
SIDE = 32
NUM_CLASSES = 11
_LABEL_SEED = 5


@dataclass(frozen=True, eq=False)
class Portraits:
    """Strangers with key points and masks, and pairs with a warped target.

    Attributes:
        images: Images in [0, 1] by name, the warped ones among them.
        plain: The images that were not warped.
        labels: Class of each pixel of the plain images.
        pairs: Pairs of a plain and a warped image of different strangers.
    """

    images: dict[str, Float[Tensor, "3 side side"]]
    plain: Float[Tensor, "n 3 side side"]
    labels: UInt8[Tensor, "n side side"]
    pairs: tuple[Pair, ...]


def portraits(count: int, num_pairs: int, *, seed: int = 0) -> Portraits:
    """Returns strangers that no model of the zoo was trained on, with exact labels.

    Args:
        count: Number of plain images.
        num_pairs: Number of pairs among them.
        seed: Seed of the strangers, the pairs and the warps.
    """
    people, found = keypoints(count, seed=_LABEL_SEED + seed)
    _, labels = masks(count, seed=_LABEL_SEED + seed)
    generator = torch.Generator().manual_seed(seed)
    affine = random_affine(num_pairs, generator, STRONG)
    sources = torch.arange(num_pairs) % count
    targets = (sources + torch.randint(1, count, (num_pairs,), generator=generator)) % count
    warped = warp_images(people.images[targets], affine, padding="border")
    names, moved = [f"{i}" for i in sources.tolist()], [f"{i} warped {n}" for n, i in enumerate(targets.tolist())]
    images = {f"{i}": image for i, image in enumerate(people.images)} | dict(zip(moved, warped, strict=True))
    heads = _boxes(found.positions, found.visible)
    pairs = warped_pairs(names, moved, found.positions[targets], affine, (SIDE, SIDE), boxes=heads[targets])
    pairs = [
        Pair(
            pair.source,
            pair.target,
            found.positions[source],
            pair.target_points,
            pair.source_size,
            pair.target_size,
            pair.target_box,
            None,
            "",
            found.visible[source] & found.visible[target],
        )
        for pair, source, target in zip(pairs, sources.tolist(), targets.tolist(), strict=True)
    ]
    return Portraits(images, people.images, labels, tuple(pairs))


def _boxes(positions: Tensor, visible: Tensor) -> Tensor:
    """Returns left, top, right and bottom of the visible key points of each image."""
    low = positions.masked_fill(~visible[..., None], torch.inf).amin(1)
    high = positions.masked_fill(~visible[..., None], -torch.inf).amax(1)
    return torch.cat([low, high], 1)
