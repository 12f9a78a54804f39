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


class LiveAdapter:
    """The layers of a pipeline that hold an adapter of PEFT, found once, so that many adapters take its place in turn.

    Args:
        pipeline: Pipeline of diffusers with an adapter that was loaded by `load_lora_weights`.
        name: Name of the loaded adapter; diffusers calls the first one default_0.

    Raises:
        UserError: No adapter of this name is loaded.

    Example:
        >>> from diffcore.testing import tiny
        >>> from peft import LoraConfig
        >>> pipeline = tiny.pipeline("sd15")
        >>> pipeline.unet.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=["attn2.to_q"]), "alice")
        >>> module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
        >>> live = LiveAdapter(pipeline, "alice")
        >>> for strength in (0.5, 1.0):
        ...     live.put(Adapter.from_factors({module: (torch.ones(1, 64), torch.full((64, 1), strength))}))
        >>> float(pipeline.unet.get_submodule(module).lora_B["alice"].weight.mean())
        1.0
    """

    def __init__(self, pipeline: Any, name: str = "default_0") -> None:
        self.network = backbone_of(pipeline)
        self.name = name
        self.layers = _layers(self.network, name)
        if not self.layers:
            known = ", ".join(adapter_names(self.network)) or "none"
            raise UserError(f"the pipeline has no adapter {name!r}; it has {known}; load one with `load_lora_weights`")

    @torch.no_grad()
    def put(self, adapter: Adapter | Point) -> None:
        """Puts an adapter in the place of the present one; weights set by `set_adapters` stay in force.

        Args:
            adapter: Adapter or point whose factors are copied; its rank may be smaller than that of the live layers.

        Raises:
            UserError: The adapter is fused into the weights, or was deleted.
            IncompatibleModelError: The live layers lack a module of the adapter, or have another shape, a smaller rank
                or another kind of change.
        """
        name, adapter = self.name, adapter.adapter() if isinstance(adapter, Point) else adapter
        if adapter.text_encoders:
            raise IncompatibleModelError(f"{adapter.name} changes text encoders too; load it with `load_lora_weights`")
        if name not in adapter_names(self.network):
            raise UserError(f"the adapter {name!r} was deleted from the pipeline; load one with `load_lora_weights`")
        missing = sorted(set(adapter.modules) - set(self.layers))
        if missing:
            raise IncompatibleModelError(
                f"{adapter.name} changes {missing[0]!r}, which the loaded {name!r} does not; load an adapter of this "
                "kind"
            )
        live, new, ratios = list[Tensor](), list[Tensor](), list[float]()
        for module, layer in self.layers.items():
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            new_down, new_up, ratio = _factors(layer, name, module, adapter.modules.get(module), down, up)
            live += [down, up]
            new += [new_down, new_up.float()]  # scaled before they are rounded to the layer's precision
            ratios.append(ratio)
        new[1::2] = torch._foreach_mul(new[1::2], ratios)
        torch._foreach_copy_(live, new)  # only when all fit: a half-swapped network is of no use


def swap(pipeline: Any, adapter: Adapter | Point, *, name: str = "default_0") -> None:
    """Puts an adapter in the place of one that is loaded; `LiveAdapter` does it many times, and finds the layers once.

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
    LiveAdapter(pipeline, name).put(adapter)


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


def _factors(
    layer: Any, name: str, module: str, change: LowRank | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Returns what to write into A and B of a layer, and by what to multiply B, which divides the layer's scale out."""
    if layer.merged_adapters:
        raise UserError(f"{name!r} is fused into the weights of {module!r}; call `unfuse_lora` first")
    if layer.use_dora.get(name, False):
        raise IncompatibleModelError(f"{name!r} is a DoRA, whose factors alone do not make the change; load it anew")
    if change is None:
        return down, torch.zeros_like(up), 1.0
    rank, shape = down.shape[0], (up.shape[0], *down.shape[1:])
    if change.shape != shape or change.rank > rank:
        raise IncompatibleModelError(
            f"the change of {module!r} has rank {change.rank} and shape {change.shape}, the loaded layer takes rank "
            f"{rank} and shape {shape}; cut the rank, or load an adapter of this kind"
        )
    padded = change if change.rank == rank else at_rank(change, rank)[0]
    rooted = layer.use_rslora.get(name, False) if isinstance(layer.use_rslora, dict) else layer.use_rslora
    scale = layer.lora_alpha[name] / (math.sqrt(rank) if rooted else rank)
    return padded.down, padded.up.reshape(up.shape), padded.alpha / padded.rank / scale
