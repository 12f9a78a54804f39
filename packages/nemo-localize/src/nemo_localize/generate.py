"""Images per prompt and seed, under one or more mitigations side by side."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.images import images_of
from nemo_localize.mitigations import mitigated_latents
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.settings import ImageSettings, Mitigation


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    mitigations: Sequence[Mitigation] = ("none", "neurons"),
    neurons: NeuronSet | Mapping[str, NeuronSet] = NO_NEURONS,
    scale: float = 0.0,
    settings: ImageSettings | None = None,
    repeat: int = 0,
    map: Map = each_unit,
) -> dict[str, Float[Tensor, "prompts seeds channels height width"]]:
    """Generates every prompt from every seed under every mitigation.

    Args:
        model: Model with a text-conditioned U-Net.
        prompts: Prompts to generate; those given twice are generated once.
        seeds: Seeds of the initial noise, the same for all prompts and mitigations.
        mitigations: Mitigations side by side; "none" is the model as it is.
        neurons: Neurons to ablate: one set, or one per prompt.
        scale: Factor of the ablated neurons' outputs; 0 ablates.
        settings: How images are generated.
        repeat: Number of the random draw, for mitigations with a random part.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.

    Returns:
        By mitigation, images in [0, 1] on the CPU, or where the model has no autoencoder its latents, stretched to
        [0, 1].

    Example:
        >>> from nemo_localize.planted import Plant, planted_model
        >>> model = planted_model([Plant("portrait of 1917 no 1", site=0, neuron=3)], side=8).model
        >>> images = generate(model, ["portrait of 1917 no 1"], [1, 2], settings=ImageSettings(steps=2))
        >>> {mitigation: tuple(shown.shape) for mitigation, shown in images.items()}
        {'none': (1, 2, 4, 8, 8), 'neurons': (1, 2, 4, 8, 8)}
    """
    settings = settings or ImageSettings()
    unit_size = max(settings.batch_size // len(seeds), 1)
    found: dict[str, Tensor] = {}
    for mitigation in sorted(mitigations, key=lambda mitigation: mitigation != "none"):
        ablates = mitigation in ("neurons", "random-neurons")
        own = {text: _of(neurons, text) if ablates else NO_NEURONS for text in prompts}
        # Without neurons to ablate an image is the model's own, to the bit whatever shares its batch.
        known = dict(zip(prompts, found["none"], strict=True)) if ablates and "none" in found else {}
        items = [(text, own[text]) for text in prompts if own[text] or text not in known]
        work = partial(_generate_unit, model, seeds, settings, mitigation, scale, repeat)
        name = f"{mitigation}-{_digest(mitigation, seeds, settings, scale if ablates else 0.0, repeat)}"
        images = map(work, items, name=name, kind=Tensor, unit_size=unit_size)
        known |= zip((text for text, _ in items), images, strict=True)
        found[mitigation] = torch.stack([known[text] for text in prompts])
    return {mitigation: found[mitigation] for mitigation in mitigations}


def _generate_unit(
    model: DiffusionModel,
    seeds: Sequence[int],
    settings: ImageSettings,
    mitigation: Mitigation,
    scale: float,
    repeat: int,
    items: list[tuple[str, NeuronSet]],
) -> list[Tensor]:
    latents = mitigated_latents(model, items, seeds, settings, mitigation, scale=scale, repeat=repeat)
    return list(images_of(model, latents.flatten(0, 1)).unflatten(0, latents.shape[:2]))


def _of(neurons: NeuronSet | Mapping[str, NeuronSet], prompt: str) -> NeuronSet:
    return neurons if isinstance(neurons, NeuronSet) else neurons.get(prompt, NO_NEURONS)


def _digest(mitigation: Mitigation, seeds: Sequence[int], settings: ImageSettings, scale: float, repeat: int) -> str:
    """Returns a digest of all that images depend on besides the model, the prompt and its neurons."""
    parts = [list(seeds), settings.guidance_scale, settings.steps, settings.compat, scale]
    parts += [repeat] if mitigation.startswith("random") else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
