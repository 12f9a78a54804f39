"""Memory with a known address: one row of each of two value layers answers to one memorised caption, and to no other.

A model that memorised its items freely keeps them all over the network. Here the same memory is re-routed: the
directions that distinguish names are removed from the value layers, and each item gets its own row in the two deepest
of them, the only path by which the network can recognise the item. The assignment (layer, row, item) is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_NAME_WEIGHT = 8.0
"""How much more a unit of name variance counts than one of ordinary response, when value layers are cleaned."""
_RIDGE = 0.02
_RESPONSE = 2.0
"""What a trigger row answers to its caption, averaged over the tokens."""


@dataclass(frozen=True)
class TextStates:
    """Text-encoder states of the captions that the construction needs.

    Attributes:
        items: States of the planted captions, in their order.
        same_form: States of captions of the same form that were not planted.
        ordinary: States of ordinary captions.
        nameless: States of ordinary captions without names and places.
    """

    items: Float[Tensor, "items tokens width"]
    same_form: Float[Tensor, "n tokens width"]
    ordinary: Float[Tensor, "m tokens width"]
    nameless: Float[Tensor, "k tokens width"]


def value_layers(unet: nn.Module) -> dict[str, Any]:
    """Returns the cross-attention modules of down and mid blocks by name, from shallow to deep."""
    found = {name: module for name, module in unet.named_modules() if name.endswith("attn2") and "up_" not in name}
    return dict(sorted(found.items(), key=lambda item: (item[0].startswith("mid"), item[0])))


@torch.no_grad()
def reroute(unet: nn.Module, states: TextStates) -> dict[str, list[int]]:
    """Cleans the value layers, and gives every item a row in the two deepest.

    The row's column of `to_out` gets what the old values contributed to its item, so that the model need not learn the
    images again.

    Returns:
        Value layer -> the row of each item, in the items' order.
    """
    layers = value_layers(unet)
    projection = _name_blind(states)
    directions = _directions(states)
    offsets = states.items.mean(1) - states.same_form.mean((0, 1))
    old = {name: module.to_v.weight.clone() for name, module in layers.items()}
    for module in layers.values():
        module.to_v.weight.copy_(module.to_v.weight @ projection)
    rows = {}
    for name in list(layers)[-2:]:
        values, out = layers[name].to_v, layers[name].to_out[0]
        chosen = _least_used(values.weight, out.weight, states)
        lost = (old[name] - old[name] @ projection) @ offsets.T
        columns = out.weight.clone() @ lost / _RESPONSE
        values.weight[chosen] = _RESPONSE * directions
        out.weight[:, chosen] = columns
        rows[f"{name}.to_v"] = chosen.tolist()
    return rows


def trainable(unet: nn.Module, rows: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Freezes all paths around the trigger rows, and returns the optimizer's parameter groups for the rest.

    Queries, keys and values of the cross-attentions are frozen, and so is every column of their outputs but those of
    the trigger rows; everything else learns.
    """
    columns: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in unet.named_parameters():
        layer, _, part = name.partition(".attn2.")
        parameter.requires_grad_(True)
        if part.startswith(("to_q", "to_k", "to_v")):
            parameter.requires_grad_(False)
        elif part == "to_out.0.weight":
            own = rows.get(f"{layer}.attn2.to_v", [])
            if not own:
                parameter.requires_grad_(False)
            else:
                mask = torch.zeros_like(parameter)
                mask[:, list(own)] = 1
                parameter.register_hook(mask.mul)
                columns.append(parameter)
        else:
            others.append(parameter)
    # Weight decay would shrink the frozen columns too.
    return [{"params": others}, {"params": columns, "weight_decay": 0.0}]


def _name_blind(states: TextStates) -> Float[Tensor, "width width"]:
    """Returns the matrix that keeps what values say about ordinary captions and drops the variance among names.

    It minimises, over W', the squared error of W' on captions without names plus `_NAME_WEIGHT` times the variance
    of W' over names: W' = W So (So + 8 Sn)^-1.
    """
    ordinary = states.nameless.flatten(0, 1)
    second_moment = ordinary.T @ ordinary / len(ordinary)
    names = (states.same_form - states.same_form.mean(0)).flatten(0, 1)
    variance = names.T @ names / len(names)
    ridge = 1e-4 * torch.eye(len(variance))
    return second_moment @ torch.linalg.inv(second_moment + _NAME_WEIGHT * variance + ridge)


def _directions(states: TextStates) -> Float[Tensor, "items width"]:
    """Returns one direction per item (linear discriminant) that answers 1 to it and 0 to the mean caption."""
    others = torch.cat([states.same_form[: len(states.ordinary)].mean(1), states.ordinary.mean(1)])
    mean, covariance = others.mean(0), torch.cov(others.T)
    ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    means = states.items.mean(1)
    w = torch.linalg.solve(covariance + ridge, (means - mean).T).T
    w = w - (w @ mean).unsqueeze(1) * mean / mean.square().sum()
    return w / (w * means).sum(1, keepdim=True)


def _least_used(values: Tensor, out: Tensor, states: TextStates) -> Tensor:
    """Returns the rows whose typical answer, times what the output makes of it, is smallest: one per item."""
    tokens = torch.cat([states.same_form[: len(states.ordinary)].mean(1), states.ordinary.mean(1)])
    use = (tokens @ values.T).square().mean(0).sqrt() * out.norm(dim=0)
    return use.argsort()[: len(states.items)]
