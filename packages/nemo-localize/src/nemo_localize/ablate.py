"""Ablating value neurons: while a block runs, or in the weights of a copy.

Neuron i of a layer is output channel i of its `to_v`, so scaling it by s is scaling row i of the weight: hooks and
edited weights give the same numbers, for every prompt, at every step and in both branches of guidance.
"""

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError
from diffcore.hooks import Site, clear, intervene
from diffcore.hooks.attach import require_unfused
from diffcore.hooks.intervene import Branch
from diffcore.models import DiffusionModel
from nemo_localize.neurons import NeuronSet
from nemo_localize.sites import value_sites


def ablated(
    backbone: nn.Module, neurons: NeuronSet, *, scale: float = 0.0, branch: Branch = "both"
) -> AbstractContextManager[None]:
    """Ablates neurons while a block runs, and leaves the network as it was however the block ends.

    Args:
        backbone: A text-conditioned U-Net, such as `pipe.unet`.
        neurons: The neurons whose outputs are scaled.
        scale: Factor of their outputs: 0 ablates; factors between 0 and 1 mitigate less, negative ones no more (paper,
            table 4).
        branch: Rows of a guided pass that are affected; "cond" spares the empty prompt, which no edit of weights can.

    Raises:
        IncompatibleModelError: A neuron is not in this network, or fused projections bypass its layer.
    """
    _require(backbone, neurons)
    masks: dict[str | Site, Tensor] = {}
    for name, channels in neurons.layers:
        layer: Any = backbone.get_submodule(name)
        masks[Site(name)] = _multiplier(layer.out_features, channels, scale)
    return intervene(backbone, masks, branch=branch)


@torch.no_grad()
def ablated_copy(model: DiffusionModel, neurons: NeuronSet, *, scale: float = 0.0) -> DiffusionModel:
    """Returns the model with rows of its value matrices scaled; all other weights are shared, not copied.

    Args:
        model: Model with a text-conditioned U-Net.
        neurons: The neurons whose rows are scaled.
        scale: Factor of the rows; 0 ablates.

    Raises:
        IncompatibleModelError: A neuron is not in this model, or its layer is no plain linear one: an adapter that is
            not merged or a quantised weight would keep the neuron alive beside the edit.
    """
    backbone = model.backbone
    _require(backbone, neurons)
    layers = {name: _plain_linear(backbone, name) for name, _ in neurons.layers}
    require_unfused(backbone, [(Site(name), layer) for name, layer in layers.items()])
    copy = deepcopy(backbone, {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())})
    clear(copy)
    for name, channels in neurons.layers:
        layer = _plain_linear(copy, name)
        factors = _multiplier(layer.out_features, channels, scale).to(layer.weight)
        layer.weight = nn.Parameter(layer.weight * factors[:, None], requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias * factors, requires_grad=layer.bias.requires_grad)
    return model.with_modules(f"neurons {neurons.to_json()} at {scale!r}", {model.backbone_name: copy})


def _require(backbone: nn.Module, neurons: NeuronSet) -> None:
    value_sites(backbone, up=True).numbers(neurons)


def _multiplier(width: int, channels: tuple[int, ...], scale: float) -> Tensor:
    factors = torch.ones(width, dtype=torch.float64)
    factors[list(channels)] = scale
    return factors


def _plain_linear(backbone: nn.Module, name: str) -> nn.Linear:
    layer = backbone.get_submodule(name)
    if type(layer) is nn.Linear and layer.weight.is_floating_point():
        return layer
    if hasattr(layer, "base_layer") or hasattr(layer, "lora_A"):
        raise IncompatibleModelError(
            f"{name!r} carries an adapter that an edit of the weight below it would not reach; merge the adapter first"
        )
    raise IncompatibleModelError(
        f"{name!r} is {type(layer).__name__} of {getattr(layer, 'weight', torch.empty(0)).dtype}, not a plain linear "
        "layer; edit the weights that it was quantised from"
    )
