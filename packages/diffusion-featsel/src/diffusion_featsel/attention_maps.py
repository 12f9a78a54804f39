"""Attention maps as features: softmax(scale q kᵀ + mask), averaged over heads, and reduced before they are kept.

A map of self-attention has as many numbers as the square of its places, for each head: those of Stable Diffusion 1.5
take 1.33 GiB per image in half precision, those of SDXL 5.5 GiB. So it is handed, some queries at a time, to a
reduction that the caller chooses. A map of attention to text has one channel per token, which is small enough.

The paper's attention feature of a U-Net is "up-cross-map": maps of all cross-attention layers of the up stage with 32
to 64 places a side, averaged over layers of equal size, resized to the largest by nearest neighbour, and concatenated.

References:
    Meng et al. 2024, section 4, and its published code, whose layout mixes places and heads where maps are aggregated;
    here they stay apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffcore.errors import NoMatchError, UserError
from diffcore.hooks import Site, attention_probs, capture
from diffcore.models import DiffusionModel
from diffusion_featsel.activation import Activation

MapReduction = Callable[[str, Tensor], Tensor]
"""Called as (name, some rows of a map, b heads queries keys); returns b queries ..., which are joined along queries."""


@contextmanager
def watched_maps(backbone: nn.Module, activations: Sequence[Activation]) -> Iterator[dict[str, Tensor]]:
    """Yields a dictionary that holds, after the block, the maps of attention to text by name.

    Each is b tokens height width, in float32, averaged over heads. Where image and text attend jointly (SD3, Flux), it
    is the share of attention that each place of the image pays to each token of text.

    Args:
        backbone: The network that runs in the block.
        activations: Attention maps that an inventory lists.

    Raises:
        IncompatibleModelError: The network attends by means that never form a map; the message says how to change it.
    """
    found: dict[str, Tensor] = {}
    if not activations:
        yield found
        return
    modules = {activation.name: activation.modules or (activation.site.module,) for activation in activations}
    layers = list(dict.fromkeys(module for names in modules.values() for module in names))
    with attention_probs(backbone, layers, reduce="per_token") as maps:
        yield found
    for name, names in modules.items():
        if not maps.silent.intersection(names):
            found[name] = maps[names[0]] if len(names) == 1 else up_cross([maps[module] for module in names])


def up_cross(maps: Sequence[Float[Tensor, "b tokens _ _"]]) -> Float[Tensor, "b channels h w"]:
    """Returns the paper's attention feature from the maps of several layers.

    Args:
        maps: Maps of attention to text, averaged over heads, in the order of execution.

    Example:
        >>> coarse, fine = torch.ones(1, 77, 2, 2), torch.zeros(1, 77, 4, 4)
        >>> tuple(up_cross([coarse, coarse, fine]).shape)
        (1, 154, 4, 4)
    """
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for layer in maps:
        by_size.setdefault((layer.shape[2], layer.shape[3]), []).append(layer)
    size = max(by_size, key=lambda size: size[0] * size[1])
    means = [torch.stack(layers).mean(0) for layers in by_size.values()]
    return torch.cat([functional.interpolate(mean, size, mode="nearest") for mean in means], 1)


def self_maps(
    model: DiffusionModel,
    x_t: Float[Tensor, "b *data"],
    t: float,
    condition: Mapping[str, Tensor],
    activations: Sequence[Activation],
    *,
    reduce: MapReduction,
    chunk_megabytes: int = 256,
) -> dict[str, Tensor]:
    """Runs the network, and returns maps of attention as a reduction leaves them: features b c h w.

    Args:
        model: The diffusion model that is run.
        x_t: Noisy inputs of the network.
        t: Timestep of all inputs, in the units of the schedule.
        condition: Condition of the backbone; each tensor has one row for all inputs, or one for each.
        activations: Attention maps that an inventory lists for this size of x_t.
        reduce: Called as (name, probabilities of some queries, b heads queries keys); returns b queries c. For example,
            ``lambda name, probs: torch.special.entr(probs).sum(-1).mT`` gives the entropy of each head.
        chunk_megabytes: Largest part of a map, in MiB, that exists at once before it is reduced.

    Raises:
        UserError: An activation is no attention map.
        IncompatibleModelError: The network attends by means that never form a map; the message says how to change it.

    Example:
        >>> from diffcore.testing import tiny
        >>> from diffusion_featsel.inventory import inventory
        >>> model, (x_t, _, condition) = tiny.model("sd15"), tiny.inputs("sd15")
        >>> rows = inventory(model).match("up-*-self-map")[:1]
        >>> entropy = lambda name, probs: torch.special.entr(probs).sum(-1).mT
        >>> found = self_maps(model, x_t, 50.0, condition, rows, reduce=entropy)
        >>> {name: tuple(value.shape) for name, value in found.items()}
        {'up-level1-repeat0-vit-block0-self-map': (2, 8, 8, 8)}
    """
    for row in activations:
        if not row.derived or row.modules:
            raise UserError(f"{row.name} is no map of one attention layer; take it with `activations_of`")
    names = {row.site.module: row.name for row in activations}
    times = torch.full((len(x_t),), float(t), device=x_t.device)
    cond = {k: v.expand(len(x_t), *v.shape[1:]) if len(v) == 1 else v for k, v in condition.items()}
    sites = [Site(module) for module in names]

    def named(module: str, probs: Tensor) -> Tensor:
        return reduce(names[module], probs)

    with (
        torch.no_grad(),
        attention_probs(model.backbone, list(names), reduce=named, chunk_megabytes=chunk_megabytes) as maps,
        capture(model.backbone, sites, reduce=lambda name, value: None, stop=True) as found,
    ):
        model.denoiser(x_t, times, cond)
    if found.silent:
        raise NoMatchError(f"{', '.join(names[module] for module in found.silent)} did not run in this pass")
    return {row.name: _as_map(row, maps[row.site.module]) for row in activations}


def _as_map(row: Activation, reduced: Tensor) -> Tensor:
    """Returns b queries c as b c h w, without the queries of text where image and text attend jointly."""
    height, width = row.grid or (0, 0)
    flat = reduced.flatten(2) if reduced.ndim > 2 else reduced.unsqueeze(-1)
    if flat.shape[1] != height * width:
        raise UserError(
            f"{row.name} has {flat.shape[1]} queries for {height} x {width} places: image and text attend jointly; "
            "take it with `activations_of`"
        )
    return flat.mT.unflatten(2, (height, width))
