"""Scores for every activation of a model without labels, from one streaming pass over the images (sections 3.2 and 9).

Each image runs through the network under two independent noise draws, and once after a random affine movement with
noise of its own. All measurements happen in the hooks: nothing is stored per image but a few samples of the first ones.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from diffusion_featsel.activation import Activation
from diffusion_featsel.forward import Condition
from diffusion_featsel.ranking import Ranking
from diffusion_featsel.survey import MEASUREMENTS, Measurement, Survey
from diffusion_featsel.views import GROUP, grouped

FEWEST = 16
"""Fewest images from which activations are ranked."""


def score(
    model: DiffusionModel,
    images: Float[Tensor, "n 3 height width"],
    activations: Sequence[Activation],
    *,
    t: float = 50.0,
    other_t: float | None = None,
    condition: Condition | None = None,
    seed: int = 0,
    measurements: Sequence[Measurement] = MEASUREMENTS,
    encode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 48,
    parts: int = 1,
    map: Map = each_unit,
) -> Ranking:
    """Measures all activations without labels, in one pass over the images.

    Args:
        model: Diffusion model that is looked into.
        images: At least 16 images with values in [0, 1], of the size that the activations were listed for.
        activations: Activations that are measured; all but attention maps and those without places.
        t: Timestep of the noise, in the units of the model's schedule.
        other_t: Second timestep, for the dependence of activations on it.
        condition: Condition of the backbone, one row for all images; by default that of the empty prompt.
        seed: Seed of noise and movements; an image's random numbers depend on the seed and its pixels.
        measurements: Names of the measurements; moments are always measured.
        encode: Turns images into x0; by default the model's own codec.
        batch_size: Largest number of rows in a forward pass; an image takes two, or three with "self".
        parts: Number of parts of the images that `map` may keep or share.
        map: Goes through the parts; see `diffcore.units.Map`.

    Returns:
        The activations in order of execution, each with its measurements, and the CKA of each pair. Activations with
        infinite or NaN values are in `broken`; constant ones are listed without scores.

    Raises:
        ValueError: There are fewer than 16 images, an activation has no places or is an attention map, or both
            timesteps are the same.

    References:
        Meng et al. 2024, section 4 for the properties; the estimators are our own.

    Example:
        >>> import torch
        >>> from diffcore.testing import tiny
        >>> from diffusion_featsel import inventory
        >>> model = tiny.model("unet2d")
        >>> names = ["mid-repeat0-res-out", "up-level0-repeat0-res-out"]
        >>> ranking = score(model, torch.rand(16, 3, 8, 8), inventory(model).named(names), t=0.2)
        >>> sorted(ranking.scores()) == names
        True
    """
    if len(images) < FEWEST:
        raise ValueError(
            f"there are {len(images)} images; ranking needs at least {FEWEST} to tell content from template"
        )
    placeless = [activation.name for activation in activations if activation.grid is None]
    if placeless:
        raise ValueError(f"{', '.join(placeless[:3])} have no image places and cannot be ranked; leave them out")
    maps = [activation.name for activation in activations if activation.kind.endswith("map")]
    if maps:
        raise ValueError(f"{', '.join(maps[:3])} are attention maps, which hold tokens and no channels; leave them out")
    if other_t == t:
        raise ValueError(f"`other_t` is {other_t}, and so is `t`; give another timestep to compare with")
    condition = model.empty_condition(1) if condition is None else condition
    encode = encode or (lambda batch: model.codec.encode(batch.to(model.device)))
    survey = Survey(model, images, tuple(activations), t, other_t, condition, seed, tuple(measurements), encode)
    in_batches = InBatches(max(1, batch_size // (GROUP * survey.rows_per_image)))
    groups = grouped(len(images))
    size = -(-len(groups) // parts)
    ranges = [tuple(groups[start : start + size]) for start in range(0, len(groups), size)]
    if len(ranges) == 1 and map is each_unit:
        return survey.ranking(survey.measured(groups, in_batches))
    total = survey.empty()
    for flat in map(
        lambda unit: [survey.measured(part, in_batches).flat().double().cpu() for part in unit],
        ranges,
        name=survey.identity,
        kind=Tensor,
    ):
        total.load(flat)
    return survey.ranking(total)
