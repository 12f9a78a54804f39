"""Images have the last word: a set of neurons is widened where captions still draw copies without it.

Refinement stops where the first step is suppressed. Of several rows that carry one memory it may keep a single one, and
single seeds go on copying. So captions whose images are still copies give all of their candidates, as far as ordinary
captions can bear it.
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
    """Returns the set, widened where images ask for it, and the captions whose images did.

    Args:
        model: Without any edit.
        results: Results of `localize`; candidates are taken from them.
        neurons: The set to confirm.
        prompts: Memorised prompts.
        seeds: Seeds of the images; none of localization, none of verification.
        judge: Measure that says what a copy is.
        settings: How images are generated.
        originals: Training images; the unedited model's own images stand in for what is missing.
        affordable: Whether ordinary captions bear a set, see `within_budget`; captions whose candidates they do not
            bear give none. Those with fewest come first.
        map: Way to go through the prompts; `diffcore.run.RunMap` resumes and shares the work.
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
        judge.towards(originals[prompt], drawn) if originals and prompt in originals else judge.between(drawn, before)
        for prompt, drawn, before in zip(prompts, images, unedited, strict=True)
    ]
    return torch.stack(rows)
