"""Activations of the value neurons for a prompt, from text encoder and value matrices alone, without the U-Net.

    V = y W_v^T,   a_i = mean over tokens t of |V[t, i]|,   y the states of the text encoder

References:
    Hintersdorf, Struppek et al. 2024, section 3.2: mean over all tokens, padding included, of the absolute value.
"""

import hashlib

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from diffcore.digests import add_tensors
from diffcore.errors import IncompatibleModelError
from diffcore.hooks.attach import require_unfused
from diffcore.models import DiffusionModel, PromptEncoder
from nemo_localize.sites import ValueSites

_TOKEN_RULE = "mean over all tokens of the absolute value"


def prompt_encoder(model: DiffusionModel) -> PromptEncoder:
    """Returns a model's prompt encoder.

    Raises:
        IncompatibleModelError: The model came without its text encoder or tokenizer.
    """
    if model.prompts is None:
        raise IncompatibleModelError(
            f"{model.name} came without its text encoder or tokenizer, so prompts cannot be encoded; load them with it"
        )
    return model.prompts


@torch.no_grad()
def mean_activations(
    backbone: nn.Module, sites: ValueSites, states: Float[Tensor, "prompts tokens width"]
) -> Float64[Tensor, "prompts neurons"]:
    """Returns each neuron's mean absolute value over the tokens of each prompt, on the CPU.

    Args:
        backbone: Network that the value layers belong to.
        sites: Value layers of that network.
        states: Output of the text encoder, the U-Net's `encoder_hidden_states`.
    """
    modules = [(site, backbone.get_submodule(site.module)) for site in sites.sites]
    require_unfused(backbone, modules)
    layers = [_values(module, states).abs().mean(1) for _, module in modules]
    return torch.cat(layers, 1).cpu().double()


def text_fingerprint(model: DiffusionModel, sites: ValueSites) -> str:
    """Returns a digest of all that activations depend on: text encoders, value matrices, layers and token rule."""
    digest = hashlib.sha256(_TOKEN_RULE.encode())
    for site in sites.sites:
        digest.update(site.module.encode())
        add_tensors(digest, model.backbone.get_submodule(site.module).state_dict())
    for place, tower in enumerate(prompt_encoder(model).towers):
        digest.update(f"text encoder {place}, {tower.length} tokens".encode())
        add_tensors(digest, tower.encoder.state_dict())
    return digest.hexdigest()


def _values(module: nn.Module, states: Tensor) -> Tensor:
    parameter = next(module.parameters())
    values = module(states.to(parameter.device, parameter.dtype) if parameter.is_floating_point() else states)
    return values if values.dtype == torch.float64 else values.float()
