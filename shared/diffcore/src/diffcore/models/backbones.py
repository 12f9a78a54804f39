"""The way each backbone class is called, as a `BackboneCall` for a `NetworkDenoiser`.

Users see one form, `x_t` of shape `b c h w` and a condition of plain tensors; what a class needs besides (nested
dictionaries, packed tokens, position ids, a timestep in other units) is made here. Keys are checked before the call,
because a missing one causes an unrelated error deep inside the libraries, or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.denoiser import BackboneCall, Condition
from diffcore.errors import IncompatibleModelError, printable


@dataclass(frozen=True)
class ConditionKeys:
    """The tensors that a backbone takes besides `x_t` and `t`.

    Attributes:
        required: Keys that every call must bring.
        optional: Keys that a call may bring.
        residuals: Keys of a ControlNet's residuals, of which a call may bring all or none.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()

    def check(self, cond: Condition, name: str) -> None:
        """Raises ValueError when a key is missing or unknown."""
        missing = [key for key in self.required if key not in cond]
        if any(key in cond for key in self.residuals):
            missing += [key for key in self.residuals if key not in cond]
        unknown = [key for key in cond if key not in self.required + self.optional + self.residuals]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(map(printable, unknown))}"
            known = ", ".join(self.required + self.optional) or "nothing"
            raise ValueError(f"the condition of {name} {what}; it takes {known}")


def backbone_call(backbone: nn.Module) -> BackboneCall:
    """Returns the function that calls a diffusers backbone with `(x_t, t, cond)`.

    Raises:
        IncompatibleModelError: The class is unknown, or its configuration asks for inputs that nothing here provides.
    """
    name = type(backbone).__name__
    keys = condition_keys(backbone)
    caller = _CALLERS[name]
    return partial(_checked, keys, name, caller)


def condition_keys(backbone: nn.Module) -> ConditionKeys:
    """Returns the condition keys of a diffusers backbone; raises as `backbone_call`."""
    name = type(backbone).__name__
    if name not in _KEYS:
        raise IncompatibleModelError(
            f"{printable(name)} is a backbone of unknown kind; known are {', '.join(sorted(_KEYS))}"
        )
    return _KEYS[name](_config(backbone))


def pack(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens packed"]:
    """Returns each 2x2 patch of pixels as one token of 4c channels, row by row: Flux's layout."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"`x_t` is {h}x{w}; its sides must be even")
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Float[Tensor, "b tokens packed"], height: int, width: int) -> Float[Tensor, "b c height width"]:
    """Returns the image that `pack` made into tokens."""
    b, _, packed = tokens.shape
    grid = tokens.reshape(b, height // 2, width // 2, packed // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, packed // 4, height, width)


def _checked(
    keys: ConditionKeys, name: str, caller: BackboneCall, backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition
) -> Tensor:
    keys.check(cond, name)
    # Embeddings follow the network's precision; class labels and pixel counts are numbers of their own.
    cast = {k: v.to(x_t.dtype) if v.is_floating_point() and k not in _EXACT else v for k, v in cond.items()}
    return caller(backbone, x_t, t, cast)


def _call_unet(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return backbone(x_t, t, return_dict=False, **cond)[0]


def _call_conditional_unet(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    plain, added = _parted(cond, ("text_embeds", "time_ids"))
    down = [key for key in control_keys(_config(backbone))[:-1] if key in plain]
    residuals = {"down_block_additional_residuals": tuple(plain.pop(key) for key in down)} if down else {}
    return backbone(x_t, t, added_cond_kwargs=added or None, return_dict=False, **plain, **residuals)[0]


def control_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the condition's keys for the residuals of a ControlNet: one per skip connection, and the middle last.

    Args:
        config: Configuration of a `UNet2DConditionModel`.

    Example:
        >>> config = {"block_out_channels": (32, 64), "layers_per_block": 1}
        >>> len(control_keys(config)), control_keys(config)[-2:]
        (5, ('down_block_additional_residual_3', 'mid_block_additional_residual'))
    """
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    per_level = [layers] * levels if isinstance(layers, int) else list(layers)
    skips = 1 + sum(per_level) + levels - 1
    return (*(f"down_block_additional_residual_{index}" for index in range(skips)), "mid_block_additional_residual")


def _call_pixart(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    plain, added = _parted(cond, ("resolution", "aspect_ratio"))
    added = {"resolution": None, "aspect_ratio": None} | added
    return backbone(x_t, timestep=t, added_cond_kwargs=added, return_dict=False, **plain)[0]


def _call_transformer(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return backbone(x_t, timestep=t, return_dict=False, **cond)[0]


def _call_sd3(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    return backbone(x_t, timestep=1000 * t, return_dict=False, **cond)[0]


def _call_flux(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    height, width = x_t.shape[-2:]
    states = cond["encoder_hidden_states"]
    row = torch.arange(height // 2, device=x_t.device).repeat_interleave(width // 2)
    column = torch.arange(width // 2, device=x_t.device).repeat(height // 2)
    image_ids = torch.stack([torch.zeros_like(row), row, column], dim=1).to(x_t.dtype)
    text_ids = image_ids.new_zeros(states.shape[1], 3)
    tokens = backbone(
        pack(x_t), timestep=t.to(x_t.dtype), img_ids=image_ids, txt_ids=text_ids, return_dict=False, **cond
    )[0]
    return unpack(tokens, height, width)


def _parted(cond: Condition, added: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {k: v for k, v in cond.items() if k not in added}, {k: cond[k] for k in added if k in cond}


def _unet_keys(config: Mapping[str, Any]) -> ConditionKeys:
    return ConditionKeys(("class_labels",) if config.get("num_class_embeds") else ())


def _conditional_unet_keys(config: Mapping[str, Any]) -> ConditionKeys:
    for key, allowed in {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
    }.items():
        if config.get(key) not in allowed:
            raise IncompatibleModelError(
                f"UNet2DConditionModel has {key} = {printable(config[key])}, a condition that is not supported"
            )
    added = ("text_embeds", "time_ids") if config.get("addition_embed_type") else ()
    labels = ("class_labels",) if config.get("num_class_embeds") else ()
    return ConditionKeys(("encoder_hidden_states", *added, *labels), ("encoder_attention_mask",), control_keys(config))


def _pixart_keys(config: Mapping[str, Any]) -> ConditionKeys:
    # An absent setting means what the library makes of it: conditions on size at 1024 pixels.
    sized = config.get("use_additional_conditions")
    sized = config.get("sample_size") == 128 if sized is None else sized
    extra = ("resolution", "aspect_ratio") if sized else ()
    return ConditionKeys(("encoder_hidden_states", *extra), ("encoder_attention_mask",))


def _flux_keys(config: Mapping[str, Any]) -> ConditionKeys:
    guidance = ("guidance",) if config.get("guidance_embeds") else ()
    return ConditionKeys(("encoder_hidden_states", "pooled_projections", *guidance))


def _config(backbone: nn.Module) -> Mapping[str, Any]:
    config = getattr(backbone, "config", {})
    return config if isinstance(config, Mapping) else {}


_EXACT = ("time_ids", "resolution", "aspect_ratio")

_KEYS = {
    "UNet2DModel": _unet_keys,
    "UNet2DConditionModel": _conditional_unet_keys,
    "DiTTransformer2DModel": lambda config: ConditionKeys(("class_labels",)),
    "PixArtTransformer2DModel": _pixart_keys,
    "SD3Transformer2DModel": lambda config: ConditionKeys(("encoder_hidden_states", "pooled_projections")),
    "FluxTransformer2DModel": _flux_keys,
}

_CALLERS: dict[str, BackboneCall] = {
    "UNet2DModel": _call_unet,
    "UNet2DConditionModel": _call_conditional_unet,
    "DiTTransformer2DModel": _call_transformer,
    "PixArtTransformer2DModel": _call_pixart,
    "SD3Transformer2DModel": _call_sd3,
    "FluxTransformer2DModel": _call_flux,
}


def latent_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Returns channels, height and width of the samples that a backbone was trained for."""
    config: Any = backbone.config
    channels = int(config["in_channels"])
    if type(backbone).__name__ == "FluxTransformer2DModel":
        channels //= 4  # the network sees 2x2 patches as channels
    trained = config.get("sample_size") or 64
    height, width = trained if isinstance(trained, list | tuple) else (trained, trained)
    return channels, int(height), int(width)
