"""Projections that run fused as one: their own modules stay in the network and are silent, so the fused one is read.

Self-attention fuses query, key and value into `to_qkv`; cross-attention fuses key and value alone, into `to_kv`.
"""

from typing import Any, cast

from torch import Tensor, nn

from diffcore.hooks import Site
from diffcore.hooks.attach import is_fused

PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
"""Names of the projections inside each fused one, in their order."""


def running_site(network: nn.Module, site: Site) -> tuple[Site, slice]:
    """Returns where the tensor of a site is while the network runs, and which of the channels there it has.

    Args:
        network: The network as it is now.
        site: Place of the tensor while nothing is fused.

    Example:
        >>> from diffcore.testing import tiny
        >>> unet = tiny.backbone("sd15")
        >>> unet.fuse_qkv_projections()
        >>> site, channels = running_site(unet, Site("mid_block.attentions.0.transformer_blocks.0.attn1.to_k"))
        >>> site.module.rpartition(".")[2], channels
        ('to_qkv', slice(64, 128, None))
    """
    parent, _, last = site.module.rpartition(".")
    attention = network.get_submodule(parent)
    if not is_fused(attention):
        return site, slice(None)
    for fused, parts in PARTS.items():
        if last in parts and getattr(attention, fused, None) is not None:
            widths = [int(cast(Any, getattr(attention, part)).out_features) for part in parts]
            start = sum(widths[: parts.index(last)])
            taken = slice(None) if site.at == "input" else slice(start, start + widths[parts.index(last)])
            return Site(f"{parent}.{fused}", site.at, site.key), taken
    return site, slice(None)


def part_of(tensor: Tensor, channels: slice) -> Tensor:
    """Returns the channels of one projection from the result of the fused one."""
    return tensor if channels == slice(None) else tensor[..., channels]
