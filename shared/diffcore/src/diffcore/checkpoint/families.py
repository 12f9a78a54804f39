"""Determining the family of a single-file checkpoint from its tensors' names and shapes. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from diffcore.errors import IncompatibleModelError, printable

Shapes = Mapping[str, tuple[int, ...]]
PREFIX = "model.diffusion_model."

_SDXL = "conditioner.embedders.1."
_REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
_FIRST = "input_blocks.0.0.weight"
_FIRST_CROSS = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_SIZES = "label_emb.0.0.weight"
_SDXL_CROSS = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_SDXL_DEEPEST = "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"
_DIFFUSERS_NAMES = ("down_blocks.", "add_embedding.linear_1.weight", "transformer_blocks.")
_BY_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an editing, video or view model",
    9: "an inpainting model",
}
_FOREIGN = {  # a name that only they have
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": "SD3",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "clip_txt_mapper.weight": "Stable Cascade",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "cap_embedder.0.weight": "Lumina",
    "head.modulation": "Wan",
    "patchify_proj.weight": "LTX-Video",
    "t_block.1.weight": "PixArt",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "HunyuanVideo",
    "mlp_t5.0.weight": "HunyuanDiT",
}
_PARTS = {  # files that are one part of a model
    ("model_ema.",): "the averaged weights (EMA) of a network alone",
    ("first_stage_model.", "encoder.conv_in.", "decoder.conv_in."): "an autoencoder without its model",
    ("cond_stage_model.", "conditioner.", "text_model.", "text_encoders."): "a text encoder without its model",
}


def family_of(shapes: Shapes, path: Path) -> str:
    """Returns the family of a single file: sd15, sd21 or sdxl.

    Args:
        shapes: Shapes of all tensors, by name.
        path: The file that error messages name.

    Raises:
        IncompatibleModelError: The file is an adapter, of a family that is not supported as a single file, or of no
            known layout.
    """

    def side(name: str, place: int) -> int | None:
        shape = shapes.get(PREFIX + name, shapes.get(name))
        return shape[place] if shape is not None and len(shape) > 1 else None

    def refuse(what: str, advice: str) -> IncompatibleModelError:
        return IncompatibleModelError(f"{printable(path, 300)} {what}; {advice}")

    if shapes and all(_is_adapter_key(name) for name in shapes):
        raise refuse("is an adapter", "load its base model and add it with `adapter`")
    channels, sizes, cross = side(_FIRST, 1), side(_SIZES, -1), side(_FIRST_CROSS, 1)
    if channels not in (None, 4):
        kind = _BY_CHANNELS.get(channels, "a model with inputs of its own")
        raise refuse(f"takes {channels} input channels: {kind}", "models of 4 channels are supported")
    if any(name.startswith("control_model.") for name in shapes):
        raise refuse("is a ControlNet with its model", "load the model without it")
    if any(".time_stack." in name or ".motion_modules." in name for name in shapes):
        raise refuse("is a video model", "models of images are supported")
    if sizes == 2560 or (cross is None and _REFINER in shapes):
        raise refuse("is an SDXL refiner", "load the SDXL base model")
    if channels is not None and sizes is not None and cross is not None:
        kind = "Stable unCLIP, which sees an image" if cross == 1024 else "a model that takes labels"
        raise refuse(f"is {kind} besides the prompt (an embedding {sizes} wide)", "load the model it was made from")
    if channels is not None and (sizes is not None or any(name.startswith(_SDXL) for name in shapes)):
        if side(_SDXL_CROSS, 1) in (None, 2048) and sizes == 2816 and side(_SDXL_DEEPEST, 1) is None:
            raise refuse("is a smaller SDXL (SSD-1B, Vega, Koala or alike)", "load its diffusers folder")
        return "sdxl"
    if channels is not None and cross in (768, 1024):
        return "sd21" if cross == 1024 else "sd15"
    for name, kind in _FOREIGN.items():
        if PREFIX + name in shapes or name in shapes:
            raise refuse(f"is a single file of {kind}", "load its diffusers folder")
    if any(name.startswith(_DIFFUSERS_NAMES) for name in shapes):
        raise refuse(
            "has diffusers' names but no config.json", "put it into the folder it belongs to, beside that file"
        )
    for prefixes, kind in _PARTS.items():
        if any(name.startswith(prefixes) for name in shapes):
            raise refuse(f"is {kind}", "point to the model, or to a folder with all of its parts")
    keys = ", ".join(printable(name, 60) for name in list(shapes)[:3])
    raise refuse(f"matches no known layout; first keys: {keys or 'none'}", "point to an SD 1.x, 2.x or SDXL file")


def _is_adapter_key(name: str) -> bool:
    return "lora_" in name or ".lora." in name or name.endswith((".alpha", ".dora_scale"))
