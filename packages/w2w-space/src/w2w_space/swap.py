"""Another adapter in a loaded pipeline, in place: its factors are copied into the live layers of PEFT.

The published code reloads the whole U-Net to change an adapter. Here only the factors are written, some hundred
thousand numbers; compiled networks and optimisers that hold the layers see the new values.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.adapters import Adapter, LowRank
from diffcore.errors import IncompatibleModelError, UserError
from w2w_space.ranks import at_rank
from w2w_space.space import Point


@torch.no_grad()
def swap(pipeline: Any, adapter: Adapter | Point, *, name: str = "default_0") -> None:
    """Puts an adapter in the place of one that is loaded; weights set by `set_adapters` stay in force.

    Args:
        pipeline: Pipeline of diffusers with an adapter that was loaded by `load_lora_weights`.
        adapter: Adapter or point whose factors are copied; its rank may be smaller than that of the live layers.
        name: Name of the loaded adapter; diffusers calls the first one default_0.

    Raises:
        UserError: No adapter of this name is loaded, or it is fused into the weights.
        IncompatibleModelError: The live layers lack a module of the adapter, or have another shape, a smaller rank or
            another kind of change.

    Example:
        >>> from diffcore.testing import tiny
        >>> from peft import LoraConfig
        >>> pipeline = tiny.pipeline("sd15")
        >>> pipeline.unet.add_adapter(LoraConfig(r=1, target_modules=["attn2.to_q"]), "alice")
        >>> module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
        >>> adapter = Adapter.from_factors({module: (torch.ones(1, 64), torch.ones(64, 1))})
        >>> swap(pipeline, adapter, name="alice")
        >>> bool((pipeline.unet.get_submodule(module).lora_A["alice"].weight == 1).all())
        True
    """
    adapter = adapter.adapter() if isinstance(adapter, Point) else adapter
    if adapter.text_encoders:
        raise IncompatibleModelError(f"{adapter.name} changes text encoders too; load it with `load_lora_weights`")
    network = backbone_of(pipeline)
    layers = _layers(network, name)
    if not layers:
        known = ", ".join(adapter_names(network)) or "none"
        raise UserError(f"the pipeline has no adapter {name!r}; it has {known}; load one with `load_lora_weights`")
    missing = sorted(set(adapter.modules) - set(layers))
    if missing:
        raise IncompatibleModelError(
            f"{adapter.name} changes {missing[0]!r}, which the loaded {name!r} does not; load an adapter of this kind"
        )
    values = [(layer, *_factors(layer, name, module, adapter.modules.get(module))) for module, layer in layers.items()]
    for layer, down, up in values:  # only when all fit: a half-swapped network is of no use
        layer.lora_A[name].weight.copy_(down)
        layer.lora_B[name].weight.copy_(up)


def backbone_of(pipeline: Any) -> Any:
    """Returns the U-Net or transformer of a pipeline.

    Args:
        pipeline: Pipeline of diffusers whose network takes adapters.
    """
    for name in ("unet", "transformer"):
        network = getattr(pipeline, name, None)
        if network is not None:
            return network
    raise IncompatibleModelError(f"{type(pipeline).__name__} has neither a unet nor a transformer")


def adapter_names(network: nn.Module) -> list[str]:
    """Returns the names of the adapters that are loaded into a network.

    Args:
        network: U-Net or transformer of a pipeline.
    """
    return list(getattr(network, "peft_config", {}))


def _layers(network: nn.Module, name: str) -> dict[str, Any]:
    """Returns the live layers of an adapter by the names of the modules that they wrap."""
    # A plain walk: the nested generators of `named_modules` take most of the time of a swap.
    found, ahead = dict[str, Any](), [("", network)]
    while ahead:
        prefix, module = ahead.pop()
        for word, child in module.named_children():
            path = f"{prefix}.{word}" if prefix else word
            factors = getattr(child, "lora_A", None)
            if isinstance(factors, nn.ModuleDict):
                if name in factors:
                    found[path] = child
            else:
                ahead.append((path, child))
    return found


def _factors(layer: Any, name: str, module: str, change: LowRank | None) -> tuple[Tensor, Tensor]:
    """Returns what to write into a layer, whose own scale is divided out of B."""
    if layer.merged:
        raise UserError(f"{name!r} is fused into the weights of {module!r}; call `unfuse_lora` first")
    if layer.use_dora.get(name, False):
        raise IncompatibleModelError(f"{name!r} is a DoRA, whose factors alone do not make the change; load it anew")
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    rank = down.shape[0]
    if change is None:
        return down, torch.zeros_like(up)
    shape = (up.shape[0], *down.shape[1:])
    if change.shape != shape or change.rank > rank:
        raise IncompatibleModelError(
            f"the change of {module!r} has rank {change.rank} and shape {change.shape}, the loaded layer takes rank "
            f"{rank} and shape {shape}; cut the rank, or load an adapter of this kind"
        )
    padded = change if change.rank == rank else at_rank(change, rank)[0]
    rooted = layer.use_rslora.get(name, False) if isinstance(layer.use_rslora, dict) else layer.use_rslora
    scale = layer.lora_alpha[name] / (math.sqrt(rank) if rooted else rank)
    return padded.down, (padded.up.float() * (padded.alpha / padded.rank / scale)).reshape(up.shape)
