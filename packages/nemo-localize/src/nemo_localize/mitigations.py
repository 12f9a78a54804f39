"""Mitigations of memorisation: ablation of the found neurons, and others that it is compared with.

References:
    Random neurons and the comparison: Hintersdorf, Struppek et al. 2024, section 4. Embedding adjustment: Wen et al.,
    "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024. Attention scaling: Ren et al.,
    "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention", 2024. Random
    tokens: Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models", NeurIPS 2023.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.denoiser import Condition
from diffcore.digests import digest_of
from diffcore.hooks import Site, intervene
from diffcore.hooks.attach import put_on, require_hookable
from diffcore.models import DiffusionModel
from diffcore.noise import mix_seed, row_generator, row_noise
from nemo_localize.ablate import ablated
from nemo_localize.activations import prompt_encoder
from nemo_localize.images import generate_latents
from nemo_localize.neurons import NeuronSet
from nemo_localize.settings import ImageSettings, Mitigation
from nemo_localize.sites import value_sites

_STATES = "encoder_hidden_states"
_LEARNING_RATE, _ITERATIONS = 0.05, 10
_STOP_AT, _STOP_NUMBERS = 3.0, 4 * 4 * 64 * 64  # Wen et al.: norm over four latents of Stable Diffusion
_START_SCALE, _MASKED = 1.25, -10_000.0
_HIGHEST_TOKEN = 49_400
_NEURONS, _TOKENS = 1, 2  # streams of draws


def mitigated_latents(
    model: DiffusionModel,
    items: Sequence[tuple[str, NeuronSet]],
    seeds: Sequence[int],
    settings: ImageSettings,
    mitigation: Mitigation,
    *,
    scale: float = 0.0,
    repeat: int = 0,
) -> Float[Tensor, "prompts seeds *data"]:
    """Returns latents of prompts under one mitigation; the same noise per seed whatever the mitigation.

    Args:
        model: Model with a text-conditioned U-Net.
        items: Prompts, each with the neurons that were found for it; "random-neurons" draws as many others.
        seeds: Seeds of the initial noise.
        settings: How images are generated.
        mitigation: Mitigation under which images are generated.
        scale: Factor of the ablated neurons' outputs; 0 ablates.
        repeat: Number of the random draw, for mitigations with a random part; each prompt has its own.
    """
    prompts = [prompt for prompt, _ in items]

    def generated(texts: Sequence[str]) -> Tensor:
        return generate_latents(model, prompt_encoder(model)(texts), seeds, settings)

    def draw_of(prompt: str) -> int:
        return mix_seed(repeat, int(digest_of(prompt), 16))

    if mitigation == "none":
        return generated(prompts)
    if mitigation.startswith("random-tokens-"):
        count = int(mitigation.rpartition("-")[2])
        return generated([with_random_tokens(model, prompt, count, seed=draw_of(prompt)) for prompt in prompts])
    if mitigation == "neurons" and len({own for _, own in items}) == 1:  # all prompts share full batches
        with ablated(model.backbone, items[0][1], scale=scale):
            return generated(prompts)
    found = []
    for prompt, own in items:
        with ExitStack() as stack:
            cond = prompt_encoder(model)([prompt])
            if mitigation in ("neurons", "random-neurons"):
                neurons = own if mitigation == "neurons" else random_neurons(model, own, seed=draw_of(prompt))
                stack.enter_context(ablated(model.backbone, neurons, scale=scale))
            elif mitigation == "embedding-adjustment":
                cond = adjusted_condition(model, cond, seeds, steps=settings.steps)
            else:
                stack.enter_context(scaled_attention(model, prompt, guided=settings.guidance_scale != 1))
            found.append(generate_latents(model, cond, seeds, settings))
    return torch.cat(found)


def random_neurons(model: DiffusionModel, found: NeuronSet, *, seed: int = 0) -> NeuronSet:
    """Returns, in every layer, as many other neurons as were found there.

    The published code builds the list of neurons to exclude and does not use it; here they are excluded.
    """
    sites = value_sites(model.backbone, up=True)
    channels = {}
    for place, (site, width) in enumerate(zip(sites.sites, sites.widths, strict=True)):
        excluded = set(found[site.module])
        order = torch.randperm(width, generator=row_generator(seed, place, _NEURONS)).tolist()
        channels[site.module] = [index for index in order if index not in excluded][: len(excluded)]
    return NeuronSet.of(channels)


def adjusted_condition(model: DiffusionModel, cond: Condition, seeds: Sequence[int], *, steps: int = 50) -> Condition:
    """Returns a prompt's condition with its embedding moved towards what acts like no prompt at the first step.

    At most ten steps of AdamW on the norm, over all seeds together, of the difference between the outputs with and
    without the prompt. It ends early where the norm falls to 3 for four latents of Stable Diffusion, scaled by the root
    of the size for others. The start token's gradient is zero, as published; weight decay still moves it.

    Args:
        model: Model with a text-conditioned U-Net.
        cond: Condition of one prompt alone.
        seeds: Seeds of the latents.
        steps: Number of solver steps, which fixes the first timestep.
    """
    parameter = next(model.backbone.parameters())
    schedule = model.denoiser.schedule
    time = schedule.timesteps(steps)[:1]
    noise = row_noise(0, seeds, model.shape, device=parameter.device) * float(schedule.initial_scale(time[0]))
    t = time.to(parameter.device).float().expand(len(noise))
    empty = _repeated(prompt_encoder(model).unconditional(1), len(noise), parameter.device)
    with torch.no_grad():
        without = model.denoiser(noise, t, empty).output.float()
    stop_at = _STOP_AT * math.sqrt(without.numel() / _STOP_NUMBERS)
    states = cond[_STATES].detach().to(parameter.device, torch.float32).clone().requires_grad_()
    optimizer = torch.optim.AdamW([states], lr=_LEARNING_RATE)
    for _ in range(_ITERATIONS):
        with torch.enable_grad():
            rows = _repeated({**cond, _STATES: states.to(parameter.dtype)}, len(noise), parameter.device)
            loss = (model.denoiser(noise, t, rows).output.float() - without).norm()
        if float(loss.detach()) <= stop_at:
            break
        (gradient,) = torch.autograd.grad(loss, states)
        gradient[:, 0] = 0
        states.grad = gradient
        optimizer.step()
    return {**cond, _STATES: states.detach().to(cond[_STATES].dtype)}


@contextmanager
def scaled_attention(
    model: DiffusionModel, prompt: str, *, guided: bool, scale: float = _START_SCALE
) -> Iterator[None]:
    """Strengthens the start token in every cross-attention, and hides positions after the prompt, while the block runs.

    Scaling a token's key scales its logits. Only the branch that reads the prompt is scaled; positions are hidden in
    both branches.

    Args:
        model: Model with a text-conditioned U-Net.
        prompt: The one prompt of all rows.
        guided: Whether passes are guided, with unconditional rows before conditional ones.
        scale: Factor of the start token's logits.
    """
    attentions = [site.module.removesuffix(".to_v") for site in value_sites(model.backbone, up=True).sites]
    mask = prompt_encoder(model).tokenize([prompt]).masks[0].bool()
    bias = torch.where(mask, 0.0, _MASKED)[:, None]

    def strengthen(keys: Tensor) -> Tensor:
        return torch.cat([scale * keys[:, :1], keys[:, 1:]], 1)

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        del module
        return args, {**kwargs, "attention_mask": bias.to(args[0]).expand(len(args[0]), *bias.shape[1:])}

    require_hookable(model.backbone)
    with ExitStack() as stack:
        for name in attentions:
            stack.callback(put_on(model.backbone.get_submodule(name), hide, before=True).remove)
        keys: dict[str | Site, Any] = {Site(f"{name}.to_k"): strengthen for name in attentions}
        stack.enter_context(intervene(model.backbone, keys, branch="cond" if guided else "both"))
        yield


def with_random_tokens(model: DiffusionModel, prompt: str, count: int, *, seed: int = 0) -> str:
    """Returns a prompt with random words in random places, each the text of one random token."""
    tokenizer = prompt_encoder(model).towers[0].tokenizer
    generator = row_generator(seed, count, _TOKENS)
    highest = min(_HIGHEST_TOKEN, len(tokenizer))
    words = prompt.split(" ")
    for _ in range(count):
        token = int(torch.randint(highest, (), generator=generator))
        place = int(torch.randint(len(words) + 1, (), generator=generator))
        words.insert(place, tokenizer.decode([token]).strip())
    return " ".join(words)


def _repeated(cond: Condition, rows: int, device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device).expand(rows, *value.shape[1:]) for key, value in cond.items()}
