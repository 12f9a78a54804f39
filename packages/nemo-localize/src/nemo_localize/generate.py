"""Pictures per caption and seed under one or more ways of mitigation, in a run that resumes."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.run import Run
from nemo_localize.images import Drawing, seen
from nemo_localize.mitigations import draw_mitigated
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.settings import Method
from nemo_localize.units import prompt_hash


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    methods: Sequence[Method],
    seeds: Sequence[int],
    drawing: Drawing,
    run: Run,
    *,
    neurons: NeuronSet | Mapping[str, NeuronSet] = NO_NEURONS,
    scale: float = 0.0,
    repeat: int = 0,
) -> dict[str, Tensor]:
    """Draws every caption from every seed under every way; what the run already has is read.

    Args:
        model: A text-conditioned U-Net.
        prompts: Captions; those given twice are drawn once.
        methods: The ways; "none" is the model as it is.
        seeds: Of the initial noise, the same for all captions and ways.
        drawing: How pictures are drawn.
        run: Where finished captions are kept, by all that their pictures depend on but the model.
        neurons: Which to switch off: one set, or one per caption.
        scale: What they are multiplied with; 0 is off.
        repeat: Number of the draw, for the ways that draw at random.

    Returns:
        By way (prompts, seeds, channels, height, width): images, or where the model has no autoencoder its latents,
        stretched to [0, 1].
    """
    chosen = {
        prompt: neurons if isinstance(neurons, NeuronSet) else neurons.get(prompt, NO_NEURONS) for prompt in prompts
    }
    keys: dict[tuple[str, Method], str] = {
        (prompt, way): _key(prompt, way, seeds, drawing, chosen[prompt], scale, repeat)
        for prompt in prompts
        for way in methods
    }
    todo = set(run.missing(dict.fromkeys(keys.values())))
    for (prompt, way), key in keys.items():
        if key in todo:
            how = {"neurons": chosen[prompt], "scale": scale, "repeat": repeat}
            x0 = draw_mitigated(model, prompt, seeds, drawing, way, **how)
            run.save(key, {"images": seen(model, x0).cpu()}, prompt=prompt, method=way, seeds=list(seeds))
    return {way: _stacked(run, [keys[prompt, way] for prompt in prompts]) for way in methods}


def _key(
    prompt: str, way: Method, seeds: Sequence[int], drawing: Drawing, neurons: NeuronSet, scale: float, repeat: int
) -> str:
    """Returns what names pictures in the run: the caption, and a digest of what else they depend on."""
    parts: list[object] = [list(seeds), drawing.guidance_scale, drawing.steps]
    parts += [repeat] if way.startswith("random") else []
    parts += [neurons.to_json(), scale] if way in ("neurons", "random-neurons") else []
    parts += ["reference"] if drawing.reference else []
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    return f"{way}-{prompt_hash(prompt)}-{digest}"


def _stacked(run: Run, keys: Sequence[str]) -> Tensor:
    return torch.stack([run.load(key).tensors["images"] for key in keys])
