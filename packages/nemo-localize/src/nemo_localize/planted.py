"""U-Nets with planted memories: the answer is known, nothing is trained, a forward pass takes milliseconds.

A small U-Net with the seven searched value layers of Stable Diffusion 1.x and random weights, whose output becomes
`x + noise_gain roll(x) + 0.05 unet(x) + gain sum_p max_j relu(g_j - base_j - 1) P_p`. The P_p are fixed smooth
patterns, and g_j is the mean of neuron j where its layer's output projection receives it: so masks, hooks and edited
weights all act on it. The value row of a planted neuron responds to its prompt and hardly to others.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffcore.denoiser.library import built, library_class
from diffcore.hooks import Site, capture
from diffcore.models import DiffusionModel, from_pipeline
from diffcore.noise import row_noise
from diffcore.testing import tiny
from nemo_localize.activations import prompt_encoder
from nemo_localize.neurons import NeuronSet
from nemo_localize.sites import ValueSites, value_sites

_SCHEDULE: dict[str, Any] = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    **{"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
}
_STRUCTURE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
}
_LEAST_Z = 4.0
_RESPONSE = 2.0  # of a planted neuron to its prompt, above its response to others


@dataclass(frozen=True)
class Plant:
    """One neuron that carries a memory.

    Attributes:
        trigger: Prompt that brings the memory back.
        site: Index of its value layer: 0 to 6 are searched, 7 to 9 are in an up block.
        neuron: Channel of the neuron in that layer.
        pattern: Number of the pattern that it shows; of several neurons with one pattern the strongest counts. None is
            an innocent neuron, which stands out and shows nothing.
        z: Number of standard deviations by which it stands out for its prompt, as nearly as can be had.
        strength: Strength of the pattern for this neuron.
    """

    trigger: str
    site: int
    neuron: int
    pattern: int | None = 0
    z: float = 8.0
    strength: float = 1.0


def ordinary_captions(count: int, seed: int = 0) -> list[str]:
    """Returns prompts of three to six made-up words, all different."""
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    captions: dict[str, None] = {}
    while len(captions) < count:
        words = (
            "".join(string.ascii_lowercase[number(26)] for _ in range(2 + number(5))) for _ in range(3 + number(4))
        )
        captions[" ".join(words)] = None
    return list(captions)


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with planted memories.

    Attributes:
        model: Model that carries the memories.
        plants: Planted neurons and their prompts.
        base: Mean response of each planted neuron to other prompts, at its layer's output projection.
        patterns: Patterns that the neurons show, by number.
        noise_gain: Strength of the noise in the output.
        gain: Strength of patterns in the output.
    """

    model: DiffusionModel
    plants: tuple[Plant, ...]
    base: Float[Tensor, " plants"]
    patterns: Float[Tensor, "patterns channels height width"]
    noise_gain: float
    gain: float

    def carriers(self, trigger: str) -> NeuronSet:
        """Returns the searched neurons that show a pattern for a prompt."""
        sites = value_sites(self.model.backbone, up=True)
        searched = len(value_sites(self.model.backbone).sites)
        neurons: dict[str, list[int]] = {}
        for plant in self.plants:
            if plant.trigger == trigger and plant.pattern is not None and plant.site < searched:
                neurons.setdefault(sites.sites[plant.site].module, []).append(plant.neuron)
        return NeuronSet.of(neurons)

    def dress(self, unet: nn.Module) -> nn.Module:
        """Makes a copy of the U-Net, reloaded or edited, show the patterns as the original does; returns it."""
        sites = value_sites(unet, up=True)
        responses: dict[int, Tensor] = {}
        shown = [(place, plant) for place, plant in enumerate(self.plants) if plant.pattern is not None]

        def listen(place: int, plant: Plant) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                responses[place] = args[0][..., plant.neuron].mean(1)

            return hook

        def show(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x, raw = args[0], output[0]
            planted = x + self.noise_gain * x.roll((1, 1), (2, 3)) + 0.05 * raw
            for pattern, image in enumerate(self.patterns.to(x)):
                strengths = [
                    plant.strength * functional.relu(responses[place] - self.base[place].to(x) - 1)
                    for place, plant in shown
                    if plant.pattern == pattern
                ]
                if strengths:
                    planted = planted + self.gain * torch.stack(strengths).amax(0)[:, None, None, None] * image
            return (planted, *output[1:])

        for place, plant in shown:
            _output_projection(unet, sites, plant.site).register_forward_pre_hook(listen(place, plant))
        unet.register_forward_hook(show)
        _skip_self_attention(unet)
        return unet


def planted_model(
    plants: Sequence[Plant],
    *,
    seed: int = 0,
    side: int = 16,
    dtype: torch.dtype = torch.float32,
    noise_gain: float = 0.3,
    gain: float = 2.0,
) -> Planted:
    """Returns a text-to-image model with planted memories.

    Args:
        plants: Memories to plant; their prompts must differ enough from made-up words.
        seed: Seed of the weights and patterns.
        side: Side of the square latents.
        dtype: Precision of the whole model.
        noise_gain: Strength of the noise in the output.
        gain: Strength of patterns in the output.

    Raises:
        ValueError: A trigger is too much like made-up words.
    """
    unet = tiny.backbone("sd15", seed, sample_size=side, **_STRUCTURE)
    modules = {"unet": unet, "text_encoder": tiny.text_encoder(seed), "tokenizer": tiny.tokenizer()}
    model = assembled("planted", modules, fingerprint=f"planted {seed}")
    _skip_self_attention(unet)
    others = ordinary_captions(200, seed=1)
    _point_rows(model, plants, others, seed)
    base = _base_responses(model, plants, others[:50], seed)
    if dtype != torch.float32:
        unet.to(dtype)
        modules["text_encoder"].to(dtype)
    generator = torch.Generator().manual_seed(seed)
    count = 1 + max((plant.pattern for plant in plants if plant.pattern is not None), default=0)
    coarse = torch.randn(count, 4, 4, 4, generator=generator)
    patterns = functional.interpolate(coarse, size=(side, side), mode="bicubic")
    patterns = patterns / patterns.std((1, 2, 3), keepdim=True)
    planted = Planted(model, tuple(plants), base, patterns, noise_gain, gain)
    planted.dress(unet)
    return planted


def assembled(name: str, modules: dict[str, Any], *, fingerprint: str = "") -> DiffusionModel:
    """Returns a model of Stable Diffusion 1.x that is on no disk and has no autoencoder.

    Args:
        name: Name of the model in messages.
        modules: Its `unet`, `text_encoder` and `tokenizer`.
        fingerprint: Digest that stands for its weights.
    """
    parts: dict[str, Any] = {**modules, "scheduler": built("DDIMScheduler", _SCHEDULE)}
    parts |= dict.fromkeys(("vae", "safety_checker", "feature_extractor"))
    model = from_pipeline(library_class("StableDiffusionPipeline")(**parts, requires_safety_checker=False), name=name)
    return replace(model, fingerprint=fingerprint or model.fingerprint)


def _skip_self_attention(unet: nn.Module) -> None:
    """Replaces self-attention by zeros: it takes most of the time at this size and plays no part here."""
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.forward = lambda hidden, *args, **kwargs: torch.zeros_like(hidden)


def _output_projection(unet: nn.Module, sites: ValueSites, site: int) -> nn.Module:
    return unet.get_submodule(sites.sites[site].module.removesuffix("to_v") + "to_out.0")


@torch.no_grad()
def _point_rows(model: DiffusionModel, plants: Sequence[Plant], others: Sequence[str], seed: int) -> None:
    """Makes each planted row stand out for its prompt as far as asked: a signal, and a random part that hides it."""
    sites, encoder = value_sites(model.backbone, up=True), prompt_encoder(model)
    generator = torch.Generator().manual_seed(seed)
    triggers = list(dict.fromkeys(plant.trigger for plant in plants))
    for trigger in triggers:
        states = encoder([*others, *(t for t in triggers if t != trigger)])["encoder_hidden_states"].double()
        own = encoder([trigger])["encoder_hidden_states"].double()
        tokens = states.mean(1)
        cov = tokens.T.cov()
        cov += 1e-3 * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
        step = own.mean(1)[0] - tokens.mean(0)
        # A constant part keeps most tokens' values positive: absolute values are what is averaged.
        flat = states.flatten(0, 1)
        level = _unit(torch.linalg.solve(flat.T @ flat / len(flat) + 1e-3 * torch.eye(len(cov)), flat.mean(0)), cov)
        signal = _unit(torch.linalg.solve(cov, step), cov) + 0.25 * level
        for plant in (plant for plant in plants if plant.trigger == trigger):
            random = _unit(torch.randn(len(cov), generator=generator, dtype=torch.float64), cov)
            rows = signal + torch.logspace(-2, 1, 100, dtype=torch.float64)[:, None] * random
            usual, here = (states @ rows.T).abs().mean(1), (own @ rows.T).abs().mean(1)[0]
            z = (here - usual.mean(0)) / usual.std(0)
            best = int((z - plant.z).abs().argmin())
            if float(z[best]) < _LEAST_Z:
                raise ValueError(f"{trigger!r} is too ordinary: it stands out by {float(z[best]):.1f} at most")
            layer: Any = model.backbone.get_submodule(sites.sites[plant.site].module)
            layer.weight[plant.neuron] = (rows[best] * (_RESPONSE / (rows[best] @ step))).float()


def _unit(direction: Tensor, cov: Tensor) -> Tensor:
    """Returns the direction, scaled so that prompts vary along it by one."""
    return direction / (direction @ cov @ direction).sqrt()


@torch.no_grad()
def _base_responses(model: DiffusionModel, plants: Sequence[Plant], others: Sequence[str], seed: int) -> Tensor:
    sites = value_sites(model.backbone, up=True)
    names = sorted({sites.sites[plant.site].module.removesuffix("to_v") + "to_out.0" for plant in plants})
    if not names:
        return torch.zeros(0)
    config: Any = model.backbone.config
    side = int(config["sample_size"])
    x_t = row_noise(seed, range(len(others)), (4, side, side), stream=1)
    with capture(model.backbone, [Site(name, at="input") for name in names]) as inputs:
        model.denoiser(x_t, torch.full((len(others),), 981.0), prompt_encoder(model)(others))
    means = [
        inputs[sites.sites[plant.site].module.removesuffix("to_v") + "to_out.0"][..., plant.neuron].mean()
        for plant in plants
    ]
    return torch.stack(means)


def hard_case(seed: int = 0) -> tuple[Planted, list[str]]:
    """Returns a memory whose neuron stands out less than innocent ones: candidates in all layers, most to be dropped.

    Selection ends in the second round; refinement tests seven layers, and five neurons of the last.
    """
    trigger = "portrait of 1917 no 1"
    places = [(6, 7), (6, 8), (6, 9), (6, 10), (1, 3), (3, 3)]
    innocent = [Plant(trigger, site, neuron, None, z=7.0) for site, neuron in places]
    return planted_model([Plant(trigger, 6, 5, 0, z=4.6), *innocent], seed=seed), [trigger]


def list_case(count: int, memorised: int, seed: int = 0) -> tuple[Planted, list[str]]:
    """Returns a list of prompts, the first of them memorised, in every searched layer in turn."""
    triggers = [f"portrait of {1900 + 17 * index} no {index}" for index in range(memorised)]
    plants = [Plant(trigger, index % 7, index // 7, index, z=7.0) for index, trigger in enumerate(triggers)]
    return planted_model(plants, seed=seed), triggers + ordinary_captions(count - memorised, seed=5)
