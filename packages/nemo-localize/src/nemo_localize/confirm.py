"""Confirmation on images: a set of neurons is widened for prompts that still generate copies with it ablated.

Refinement stops where the first step is suppressed. Of several neurons that carry one memory it may keep a single one,
and some seeds go on copying. So prompts whose images are still copies add all of their candidates to the set, as long
as the damage to ordinary prompts stays within its budget.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.generate import generate
from nemo_localize.likeness import Likeness
from nemo_localize.neurons import NeuronSet
from nemo_localize.protocol import COPY_ABOVE
from nemo_localize.results import Results
from nemo_localize.settings import ImageSettings


def confirm(
    model: DiffusionModel,
    results: Results,
    neurons: NeuronSet,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    judge: Likeness,
    settings: ImageSettings | None = None,
    originals: Mapping[str, Tensor] | None = None,
    affordable: Callable[[NeuronSet], bool] | None = None,
    map: Map = each_unit,
) -> tuple[NeuronSet, list[str]]:
    """Returns the set of neurons, widened for prompts whose images are still copies, and these prompts.

    Args:
        model: Unedited model that generates the images.
        results: Results of `localize`; candidates are taken from them.
        neurons: Set of neurons to confirm.
        prompts: Memorised prompts that are generated.
        seeds: Seeds of the images; none of localization, none of verification.
        judge: Measure that tells what a copy is.
        settings: How images are generated.
        originals: Training images; the unedited model's own images stand in for what is missing.
        affordable: Function that tells whether a set is within the budget of damage, see `within_budget`; prompts with
            fewest candidates are added first, and those that exceed it are left out.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.
    """
    candidates = {r.prompt: r.initial for r in results.distinct() if r.status == "localized"}
    images = generate(model, prompts, seeds, neurons=neurons, settings=settings, map=map)
    found = likenesses(judge, prompts, images["neurons"], images["none"], originals)
    copied = (found > COPY_ABOVE).any(1).tolist()
    stubborn = [prompt for prompt, copy in zip(prompts, copied, strict=True) if copy and prompt in candidates]
    for prompt in sorted(stubborn, key=lambda prompt: len(candidates[prompt])):
        wider = neurons.union(candidates[prompt])
        if affordable is None or affordable(wider):
            neurons = wider
    return neurons, stubborn


def likenesses(
    judge: Likeness,
    prompts: Sequence[str],
    images: Float[Tensor, "prompts seeds c height width"],
    unedited: Float[Tensor, "prompts seeds c height width"],
    originals: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "prompts seeds"]:
    """Returns how like its training image each image is, or the unedited model's image of the same seed."""
    rows = [
        judge.towards(originals[prompt], own) if originals and prompt in originals else judge.between(own, before)
        for prompt, own, before in zip(prompts, images, unedited, strict=True)
    ]
    return torch.stack(rows)
