"""The family of a single-file checkpoint, told from the names and shapes of its tensors. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from diffcore.errors import IncompatibleModelError, printable

Shapes = Mapping[str, tuple[int, ...]]
PREFIX = "model.diffusion_model."

_SDXL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
_FIRST_CROSS = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_SIZES = "label_emb.0.0.weight"
_DIFFUSERS_NAMES = ("down_blocks.", "add_embedding.linear_1.weight", "transformer_blocks.")


def family_of(shapes: Shapes, path: Path) -> str:
    """Returns sd15, sd21 or sdxl.

    Args:
        shapes: Of all tensors, by name.
        path: For messages.

    Raises:
        IncompatibleModelError: The file is an adapter, of a family that is not supported as a single file, or of no
            known layout.
    """

    def shape(name: str) -> tuple[int, ...] | None:
        return shapes.get(PREFIX + name, shapes.get(name))

    def refuse(what: str, advice: str) -> IncompatibleModelError:
        return IncompatibleModelError(f"{printable(path, 300)} {what}; {advice}")

    if shapes and all(_is_adapter_key(name) for name in shapes):
        raise refuse("is an adapter", "load its base model and add it with --adapter")
    first = shape("input_blocks.0.0.weight")
    if first is not None and len(first) > 1 and first[1] != 4:
        raise refuse(f"takes {first[1]} input channels (an inpainting or editing model)", "only 4 are supported")
    sizes = shape(_SIZES)
    if _REFINER in shapes or (sizes is not None and sizes[-1:] == (2560,)):
        raise refuse("is an SDXL refiner", "load the SDXL base model")
    if first is not None and (_SDXL in shapes or sizes is not None):
        return "sdxl"
    cross = shape(_FIRST_CROSS)
    if first is not None and cross is not None and len(cross) == 2:
        if cross[1] == 1024:
            return "sd21"
        if cross[1] == 768:
            return "sd15"
    for family, key in {
        "SD3": "joint_blocks.0.context_block.adaLN_modulation.1.bias",
        "Flux": "double_blocks.0.img_attn.norm.key_norm.scale",
    }.items():
        if shape(key) is not None:
            raise refuse(f"is a single file of {family}", "load its diffusers folder")
    if any(name.startswith(_DIFFUSERS_NAMES) for name in shapes):
        raise refuse(
            "has diffusers' names but no config.json", "put it into the folder it belongs to, beside that file"
        )
    keys = ", ".join(printable(name, 60) for name in list(shapes)[:3])
    raise refuse(f"matches no known layout; first keys: {keys or 'none'}", "point to an SD 1.x, 2.x or SDXL file")


def _is_adapter_key(name: str) -> bool:
    return "lora_" in name or ".lora." in name or name.endswith((".alpha", ".dora_scale"))


def marked_prediction(shapes: Shapes) -> str | None:
    """Returns "v_prediction" where a file carries the marker tensors of web UIs, else None."""
    return "v_prediction" if "v_pred" in shapes else None


def is_zero_snr(shapes: Shapes) -> bool:
    """Whether a file carries the marker of a schedule with zero terminal SNR."""
    return "ztsnr" in shapes
