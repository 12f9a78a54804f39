"""The original layout of Stable Diffusion checkpoints: one file, with names of its own for the same tensors.

`first_stage_model.` holds the autoencoder, `model.diffusion_model.` the U-Net, `cond_stage_model.` (SD 1.x and 2.x) or
`conditioner.embedders.` (SDXL) the text encoders; OpenCLIP's keep query, key and value in one matrix.
"""

import re
from collections.abc import Collection

from diffcore.models.families import PREFIX
from diffcore.models.pieces import Change, Piece

HARMLESS = re.compile(
    r"model_ema\..*|loss\..*|first_stage_model\.loss\..*|(.*\.)?position_ids|(.*\.)?logit_scale|(.*\.)?attn_mask|v_pred|ztsnr|edm_.*|"
    r"(denoiser\.)?sigmas|log_sigmas|betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|"
    r"lvlb_weights|scale_factor|global_step|cond_stage_model\.model\.text_projection|"
    r"first_stage_model\.quantize\..*|model\.diffusion_model\.(num_updates|decay)"
)
"""Tensors of the training that no component needs."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_PART = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)\."
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<tail>.+)"
)
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_THIRDS: dict[str, Change] = {
    "self_attn.q_proj": "first third",
    "self_attn.k_proj": "second third",
    "self_attn.v_proj": "last third",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": Piece("token_embedding.weight"),
    "embeddings.position_embedding.weight": Piece("positional_embedding"),
    "final_layer_norm.weight": Piece("ln_final.weight"),
    "final_layer_norm.bias": Piece("ln_final.bias"),
    "text_projection.weight": Piece("text_projection", "transpose"),
}


def unet_names(module: Collection[str], stored: Collection[str] = ()) -> dict[str, Piece]:
    """Returns where a `UNet2DConditionModel` finds its tensors in an original file.

    Args:
        module: All names of its tensors.
        stored: The names in the file; bare U-Net files leave out the prefix.
    """
    prefix = PREFIX if not stored or any(name.startswith(PREFIX) for name in stored) else ""
    per_down = 1 + max((int(m[1]) for n in module if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", n))), default=0)
    attentive = {m[0] for n in module if (m := re.match(r"up_blocks\.\d+\.attentions", n))}
    return {name: Piece(prefix + _unet_name(name, per_down, attentive)) for name in module}


def _unet_name(name: str, per_down: int, attentive: set[str]) -> str:
    base, _, leaf = name.rpartition(".")
    if base in _UNET_ENDS:
        return f"{_UNET_ENDS[base]}.{leaf}"
    match = _UNET_PART.fullmatch(name)
    if match is None:
        return name  # the layout has no such tensor: it will be missed under this name
    side, level, part, index, tail = match["side"], int(match["level"] or 0), *match.group("part", "index", "tail")
    step = per_down + 1  # places per level on the way down, and on the way up
    if side is None:
        return f"middle_block.{_MIDDLE.get(f'{part}.{index}')}.{_inner(part, tail)}"
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * step}.0.op.{leaf}"
    if part == "upsamplers":
        position = 2 if f"up_blocks.{level}.attentions" in attentive else 1
        return f"output_blocks.{level * step + per_down}.{position}.conv.{leaf}"
    place = level * step + int(index)
    block = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
    return f"{block}.{0 if part == 'resnets' else 1}.{_inner(part, tail)}"


def _inner(part: str, tail: str) -> str:
    if part != "resnets":
        return tail  # transformers keep their names
    layer, _, leaf = tail.rpartition(".")
    return f"{_RESNET.get(layer, layer)}.{leaf}"


def vae_names(module: Collection[str]) -> dict[str, Piece]:
    """Returns where an `AutoencoderKL` finds its tensors in an original file."""
    last = max((int(m[1]) for n in module if (m := re.match(r"decoder\.up_blocks\.(\d+)", n))), default=0)
    return {name: _vae_piece(name, last) for name in module}


def _vae_piece(name: str, last: int) -> Piece:
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        half, layer, leaf = match.groups()
        change = "none" if layer == "group_norm" or leaf == "bias" else "flatten"
        return Piece(f"first_stage_model.{half}.mid.attn_1.{_VAE_ATTENTION.get(layer, layer)}.{leaf}", change)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
    name = re.sub(r"resnets\.(\d+)", r"block.\1", name)
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return Piece(f"first_stage_model.{name}")


def clip_names(prefix: str, module: Collection[str]) -> dict[str, Piece]:
    """Returns where a CLIP text encoder finds its tensors under a prefix, with transformers' names."""
    return {name: Piece(f"{prefix}text_model.{name.removeprefix('text_model.')}") for name in module}


def open_clip_names(prefix: str, module: Collection[str]) -> dict[str, Piece]:
    """Returns where a CLIP text encoder finds its tensors under a prefix, with OpenCLIP's names."""
    return {name: _prefixed(prefix, _open_clip_piece(name.removeprefix("text_model."))) for name in module}


def _prefixed(prefix: str, piece: Piece) -> Piece:
    return Piece(prefix + piece.name, piece.change)


def _open_clip_piece(name: str) -> Piece:
    if name in _OPEN_CLIP_ENDS:
        return _OPEN_CLIP_ENDS[name]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
    if match is None:
        return Piece(name)
    layer, part, leaf = match.groups()
    place = f"transformer.resblocks.{layer}"
    if part in _OPEN_CLIP_THIRDS:
        return Piece(f"{place}.attn.in_proj_{leaf}", _OPEN_CLIP_THIRDS[part])
    return Piece(f"{place}.{_OPEN_CLIP.get(part, part)}.{leaf}")


TEXT_PREFIXES = {
    ("sd15", "text_encoder"): ("clip", "cond_stage_model.transformer."),
    ("sd21", "text_encoder"): ("open_clip", "cond_stage_model.model."),
    ("sdxl", "text_encoder"): ("clip", "conditioner.embedders.0.transformer."),
    ("sdxl", "text_encoder_2"): ("open_clip", "conditioner.embedders.1.model."),
}
"""Where each family keeps its text encoders, and whose names they use."""


def component_names(family: str, component: str, module: Collection[str], stored: Collection[str]) -> dict[str, Piece]:
    """Returns where a component of a family finds its tensors in an original file.

    Args:
        family: sd15, sd21 or sdxl.
        component: Its name in the pipeline: unet, vae, text_encoder or text_encoder_2.
        module: Names of its tensors.
        stored: Names in the file.
    """
    if component == "unet":
        return unet_names(module, stored)
    if component == "vae":
        return vae_names(module)
    grammar, prefix = TEXT_PREFIXES[family, component]
    return clip_names(prefix, module) if grammar == "clip" else open_clip_names(prefix, module)
