"""The original layout of Stable Diffusion checkpoints: one file, with names of its own for the same tensors.

`first_stage_model.` holds the autoencoder, `model.diffusion_model.` the U-Net, `cond_stage_model.` (SD 1.x and 2.x) or
`conditioner.embedders.` (SDXL) the text encoders; OpenCLIP's keep query, key and value in one matrix.
"""

import re
from collections.abc import Collection

from diffcore.checkpoint.families import PREFIX
from diffcore.checkpoint.pieces import Change, Piece

HARMLESS = re.compile(
    r"(first_stage_model\.)?model_ema\..*|(first_stage_model\.)?loss\..*|(.*\.)?position_ids|"
    r"(.*\.)?logit_scale|(.*\.)?attn_mask|alphas_cumprod_prev|sqrt_recip\w*|log_one_minus_\w+|posterior_\w+|logvar|"
    r"lvlb_weights|global_step|model\.diffusion_model\.(num_updates|decay)|"
    r"(cond_stage_model|conditioner\.embedders\.0)\.(.+\.)?text_projection(\.weight)?"
)
"""Tensors of the training, and projections of text encoders whose pooled state no component uses."""

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
_VAE_ATTENTION = {
    "group_norm": ("norm", "group_norm"),
    "to_q": ("q", "to_q", "query"),
    "to_k": ("k", "to_k", "key"),
    "to_v": ("v", "to_v", "value"),
    "to_out.0": ("proj_out", "to_out.0", "proj_attn"),
}
"""The layout's own names first, then those that converters of several years left in their place."""
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
}


def unet_names(module: Collection[str], stored: Collection[str] = ()) -> dict[str, Piece]:
    """Returns the piece of an original file behind each tensor of a `UNet2DConditionModel`.

    Args:
        module: Names of all tensors of the module.
        stored: Names of all tensors in the file; bare U-Net files leave out the prefix.
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


def vae_names(module: Collection[str], stored: Collection[str] = ()) -> dict[str, Piece]:
    """Returns the piece of an original file behind each tensor of an `AutoencoderKL`."""
    last = max((int(m[1]) for n in module if (m := re.match(r"decoder\.up_blocks\.(\d+)", n))), default=0)
    return {name: _present(_vae_pieces(name, last), stored) for name in module}


def _vae_pieces(name: str, last: int) -> list[Piece]:
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        half, layer, leaf = match.groups()
        change = "none" if layer == "group_norm" or leaf == "bias" else "flatten"
        spellings = _VAE_ATTENTION.get(layer, (layer,))
        return [Piece(f"first_stage_model.{half}.mid.attn_1.{spelling}.{leaf}", change) for spelling in spellings]
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
    name = re.sub(r"resnets\.(\d+)", r"block.\1", name)
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return [Piece(f"first_stage_model.{name}")]


def text_names(root: str, usual: "Spelling", module: Collection[str], stored: Collection[str] = ()) -> dict[str, Piece]:
    """Returns the piece behind each tensor of a CLIP text encoder, in the spelling that fits a file best.

    Args:
        root: Prefix of all spellings, such as "cond_stage_model.".
        usual: The one of `SPELLINGS` that is taken where several fit equally well.
        module: Names of all tensors of the module.
        stored: Names of all tensors in the file.
    """
    fits = [{n: _text_piece(root, spelling, n, stored) for n in module} for spelling in (usual, *SPELLINGS)]
    return max(fits, key=lambda pieces: sum(piece.name in stored for piece in pieces.values()))


def _text_piece(root: str, spelling: "Spelling", name: str, stored: Collection[str]) -> Piece:
    level, names = spelling
    bare = name.removeprefix("text_model.")
    if bare == "text_projection.weight":
        # A plain parameter multiplies from the right, a layer's weight from the left, whoever wrote the file.
        both = [Piece("text_projection", "transpose"), Piece("text_projection.weight")]
        found = [Piece(place + piece.name, piece.change) for place in (root + level, root) for piece in both]
        return _present(found if names == "open_clip" else [found[1], found[0], *found[2:]], stored)
    piece = _open_clip_piece(bare) if names == "open_clip" else Piece(f"{names}{bare}")
    return Piece(root + level + piece.name, piece.change)


def _present(pieces: list[Piece], stored: Collection[str]) -> Piece:
    return next((piece for piece in pieces if piece.name in stored), pieces[0])


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


Spelling = tuple[str, str]
_CLIP, _OPEN = ("transformer.", "text_model."), ("model.", "open_clip")
SPELLINGS: tuple[Spelling, ...] = tuple(
    (level, names)
    for names in ("text_model.", "", "open_clip")
    for level in ("transformer.", "model.", "model.transformer.", "")
)
"""Where under its root a text encoder is, and whose names it has: those of transformers, with or without the level
text_model, or OpenCLIP's."""
TEXT_ENCODERS = {
    ("sd15", "text_encoder"): (_CLIP, ("cond_stage_model.", "conditioner.embedders.0.")),
    ("sd21", "text_encoder"): (_OPEN, ("cond_stage_model.", "conditioner.embedders.0.")),
    ("sdxl", "text_encoder"): (_CLIP, ("conditioner.embedders.0.",)),
    ("sdxl", "text_encoder_2"): (_OPEN, ("conditioner.embedders.1.",)),
}
"""The usual spelling of each family's text encoders, and the roots they are found under, the usual one first."""


def root_of(family: str, component: str, stored: Collection[str]) -> str:
    """Returns the prefix under which a file keeps a text encoder."""
    _, roots = TEXT_ENCODERS[family, component]
    return next((root for root in roots if any(name.startswith(root) for name in stored)), roots[0])


def component_names(family: str, component: str, module: Collection[str], stored: Collection[str]) -> dict[str, Piece]:
    """Returns the piece of an original file behind each tensor of a component of a family.

    Args:
        family: One of sd15, sd21 and sdxl.
        component: Its name in the pipeline: unet, vae, text_encoder or text_encoder_2.
        module: Names of all tensors of the module.
        stored: Names of all tensors in the file.
    """
    if component == "unet":
        return unet_names(module, stored)
    if component == "vae":
        return vae_names(module, stored)
    usual, _ = TEXT_ENCODERS[family, component]
    return text_names(root_of(family, component, stored), usual, module, stored)
