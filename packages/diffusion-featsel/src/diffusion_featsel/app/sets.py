"""Sets of activations measured with labels: PCK of their concatenation, and mean IoU of a ridge regression."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.models import DiffusionModel
from diffusion_featsel.activation import Activation
from diffusion_featsel.app.portraits import NUM_CLASSES, Portraits
from diffusion_featsel.forward import activations_of, noised
from diffusion_featsel.gram import GramAccumulator, labels_on_grid, on_grid
from diffusion_featsel.keypoints import keypoint_scores
from diffusion_featsel.match import match_points
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.ridge import fit_ridge
from diffusion_featsel.segmentation import segmentation_scores
from diffusion_featsel.splits import Split

_BATCH = 32


@dataclass(frozen=True)
class SetScore:
    """How good a set of activations is by labels.

    Attributes:
        name: Name of the set.
        names: The activations in it.
        num_channels: Number of channels of all activations together.
        pck: Share of points within a tenth of the head's box, over all points.
        miou: Mean intersection over union on test images.
    """

    name: str
    names: tuple[str, ...]
    num_channels: int
    pck: float
    miou: float


def maps_of(
    model: DiffusionModel,
    images: Float[Tensor, "n 3 h w"],
    activations: Sequence[Activation],
    *,
    t: float = 50.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns the maps of all images, by name of the activation.

    Args:
        model: Diffusion model that is looked into.
        images: Images in [0, 1].
        activations: Activations that are taken in one pass.
        t: Timestep of the noise.
        seed: Seed of the noise.
    """
    parts: dict[str, list[Tensor]] = {activation.name: [] for activation in activations}
    for batch in images.split(_BATCH):
        x_t = noised(model, model.codec.encode(batch), image_keys(batch), t, seed=seed)
        for name, maps in activations_of(model, x_t, t, model.empty_condition(1), activations).items():
            parts[name].append(maps)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def measured_set(
    name: str, names: Sequence[str], maps: Mapping[str, Tensor], rms: Mapping[str, float], data: Portraits, split: Split
) -> SetScore:
    """Returns how good a set is.

    Args:
        name: Name of the set.
        names: The activations in it.
        maps: Maps of all images of the data, in their order there.
        rms: Root mean square of each activation, by which it is divided.
        data: Images with key points and masks.
        split: Training and test images of the segmentation.
    """
    rows = {image: row for row, image in enumerate(data.images)}
    found = []
    weights = {activation: 1 / rms[activation] for activation in names}
    for start in range(0, len(data.pairs), _BATCH):
        some = data.pairs[start : start + _BATCH]
        sides = [
            {activation: maps[activation][[rows[getattr(pair, side)] for pair in some]] for activation in names}
            for side in ("source", "target")
        ]
        points = torch.stack([pair.source_points for pair in some])
        size = some[0].source_size
        matched = match_points(
            sides[0], sides[1], points, source_size=size, target_size=size, weights=weights, center="pair"
        )
        found += list(matched.points)
    pck = keypoint_scores(data.pairs, found, num_resamples=1).share("box", "points").value
    num_channels = sum(maps[activation].shape[1] for activation in names)
    return SetScore(name, tuple(names), num_channels, pck, _miou(names, maps, data, split))


def _miou(names: Sequence[str], maps: Mapping[str, Tensor], data: Portraits, split: Split, side: int = 16) -> float:
    plain = on_grid({name: maps[name][: len(data.plain)] for name in names}, (side, side))
    sums = GramAccumulator({"": plain.shape[1]}, NUM_CLASSES, (side, side), num_pieces=4)
    train, test = list(split.train), list(split.test)
    sums.update({"": plain[train]}, data.labels[train].long())
    predicted = fit_ridge(sums.compute())(plain[test].movedim(1, 3)).argmax(-1)
    true = labels_on_grid(data.labels[test].long(), (side, side))
    return segmentation_scores(predicted, true, NUM_CLASSES).miou


def legacy_like(activations: Sequence[Activation]) -> list[str]:
    """Returns what earlier work took: the outputs of the upsamplers and of the last transformer or residual block.

    Args:
        activations: Activations of a U-Net, in the order of execution.
    """
    ups = [a.name for a in activations if a.kind == "upsampler-out"]
    last = [a.name for a in activations if a.stage == "up" and a.kind in ("vit-out", "res-out")]
    return ups + last[-1:]
