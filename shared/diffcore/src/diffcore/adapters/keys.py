"""The names of tensors in LoRA files: several naming conventions for the same few parts. Imports no torch.

A key names the network that is changed (component), its module (as the convention spells it), and the part it holds:
the factor `down` to the rank, the factor `up` from it, or alpha. Underscored names of kohya are never taken apart, as
underscores also stand inside words: `Base.find` looks them up among the names that a model has.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from diffcore.errors import printable
from diffcore.io.strictjson import StrictError

Part = Literal["down", "up", "alpha"]
Layout = Literal["peft", "diffusers", "diffusers processors", "diffusers unprefixed", "comfyui", "kohya", "lycoris"]

BACKBONE = "backbone"
"""The component of keys that name no text encoder."""

T5 = "t5xxl"
"""The component of keys that mean the T5, whichever text encoder of the model it is."""
KOHYA_TEXT_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": T5}

_KOHYA = re.compile(r"lora_(?P<component>unet|transformer|te[123]?)_(?P<rest>[A-Za-z0-9_]+\..+)")
_LYCORIS = re.compile(r"lycoris_(?P<rest>[A-Za-z0-9_]+\..+)")
# A T5 alone may lack its name; without `text_encoders.` these are the names in ComfyUI's own state.
_COMFY_TEXT = re.compile(
    r"(?:text_encoders\.(?=transformer\.)|(?:text_encoders\.)?(?P<component>clip_[lgh]|t5xxl)\.)"
    r"(?:transformer\.)?(?P<rest>.+)"
)
_PREFIX = re.compile(
    r"(?P<component>unet|transformer|text_encoder|text_encoder_[23]|(?:model\.)?diffusion_model)\."
    r"(?:base_model\.model\.)?(?P<rest>.+)"
)
_PEFT = re.compile(r"base_model\.model\.(?P<rest>.+)")
_LEAF = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?P<processor>\.processor)?\.(?P<old>to_q|to_k|to_v|to_out)_lora"
    r"|\.lora_(?P<letter>down|up|A|B)(?:\.(?P<name>(?!weight$)[A-Za-z0-9_-]+))?"
    r"|\.lora(?:_linear_layer)?"
    r")?(?:\.(?P<side>down|up))?(?P<weight>\.weight)?(?P<alpha>\.alpha)?"
)
_OLD_MODULES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_OLD_TEXT_MODULES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_SIDES: dict[str, Part] = {"down": "down", "A": "down", "up": "up", "B": "up"}

_UNSUPPORTED = {
    r"hada_": "LoHa",
    r"lokr_": "LoKr",
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lora_mid": "a LoCon with a middle factor (Tucker)",
    r"reshape_weight$": "a LoRA that reshapes its weight",
    r"(^|\.)b?oft_|oft_(blocks|diag|R)": "OFT",
    r"ia3|on_input": "(IA)³",
    r"\.(diff|diff_b|set_weight)$": "a full difference of weights",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"lora_embedding_": "a LoRA of embeddings",
    r"lora_(A|B|up|down)(\..+)?\.bias$|\.bias_(indices|values|size)$": "a LoRA with biases",
    r"\.scalar$": "a LoRA with a trained scalar",
    r"[wb]_norm$": "changes of norms",
    r"modules_to_save|original_module": "modules saved whole",
    r"^bundle_emb": "embeddings",
    r"^lora_prior_": "Stable Cascade, under the prefix 'lora_prior_'",
    r"\.(vera|hra|gralora|c3a|bone|shira|randlora)_": "another method than LoRA",
}
_ANY_UNSUPPORTED = re.compile("|".join(f"(?:{pattern})" for pattern in _UNSUPPORTED))


def quoted(name: str) -> str:
    """Returns a name of a tensor or module for a message, cut where it is long."""
    return repr(printable(name, 120))


@dataclass(frozen=True)
class Key:
    """The parts of one tensor's name.

    Attributes:
        component: text_encoder, text_encoder_2, text_encoder_3, or "backbone"; or a text encoder by what it is: clip_l,
            clip_g, clip_h, t5xxl. `Base.component` knows which that is.
        module: The module's name as the file spells it: with dots, or with underscores as kohya does.
        part: Which part of the change the tensor holds: the factor `down`, the factor `up`, or alpha.
        layout: The naming convention that the key follows.
        adapter_name: Name that PEFT keeps between `lora_A` and `weight` in memory; usually None.
    """

    component: str
    module: str
    part: Part
    layout: Layout
    adapter_name: str | None = None


@lru_cache(1 << 16)  # adapters of one collection name the same few modules
def parse_key(text: str) -> Key:
    """Returns the parts of a tensor's name.

    Raises:
        StrictError: The name belongs to another method than LoRA, or to no known convention.
    """
    if _ANY_UNSUPPORTED.search(text):
        kind = next(kind for pattern, kind in _UNSUPPORTED.items() if re.search(pattern, text))
        raise StrictError(f"holds tensor {quoted(text)}, of {kind}, which is not supported; only LoRA is read")
    component, rest, layout = _split(text)
    match = _LEAF.fullmatch(rest)
    part = match and _part(match)
    if match is None or part is None:
        raise StrictError(f"holds tensor {quoted(text)}, which is no part of a LoRA; get a clean copy of the adapter")
    module = match["module"]
    if old := match["old"]:
        names = _OLD_MODULES if component == BACKBONE else _OLD_TEXT_MODULES
        module = f"{module}.{names[old]}"
        layout = "diffusers processors" if match["processor"] else layout
    return Key(component, module, part, layout, match["name"])


def _split(text: str) -> tuple[str, str, Layout]:
    if match := _KOHYA.fullmatch(text):
        return KOHYA_TEXT_ENCODERS.get(match["component"], BACKBONE), match["rest"], "kohya"
    if match := _LYCORIS.fullmatch(text):
        return BACKBONE, match["rest"], "lycoris"
    if match := _COMFY_TEXT.fullmatch(text):
        return match["component"] or T5, match["rest"], "comfyui"
    if match := _PEFT.fullmatch(text):
        return BACKBONE, match["rest"], "peft"
    if match := _PREFIX.fullmatch(text):
        component = match["component"]
        if component.startswith("text_encoder"):
            return component, match["rest"], "diffusers"
        return BACKBONE, match["rest"], "comfyui" if component.endswith("diffusion_model") else "diffusers"
    return BACKBONE, text, "diffusers unprefixed"


def _part(match: re.Match[str]) -> Part | None:
    if match["alpha"]:
        return "alpha"
    side = match["letter"] or match["side"]
    if match["weight"] is None or side is None or (match["letter"] and match["side"]):
        return None
    return _SIDES[side]
