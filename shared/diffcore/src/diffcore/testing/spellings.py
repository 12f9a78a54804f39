"""Single files of the same weights under the tensor names and metadata that other tools write."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
Change = Callable[[State], State]

_THIRDS = ("q_proj", "k_proj", "v_proj")
_HF = {
    r"transformer\.resblocks\.(\d+)\.ln_(\d)": r"encoder.layers.\1.layer_norm\2",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj": r"encoder.layers.\1.self_attn.out_proj",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc": r"encoder.layers.\1.mlp.fc1",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj": r"encoder.layers.\1.mlp.fc2",
    r"^token_embedding": "embeddings.token_embedding",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^ln_final": "final_layer_norm",
}


def replaced(old: str, new: str) -> Change:
    """Returns a change of every name that starts with `old`."""
    return lambda state: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in state.items()
    }


def added(**tensors: Tensor) -> Change:
    """Returns a change that adds tensors; two underscores stand for a dot."""
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def as_transformers(root: str, level: str) -> Change:
    """Returns a change of an OpenCLIP text encoder under `root` to the names of transformers, `level` above them."""

    def change(state: State) -> State:
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(root)}
        for name, tensor in state.items():
            bare = name.removeprefix(root)
            if name in kept:
                continue
            if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", bare):
                for part, third in zip(_THIRDS, tensor.chunk(3), strict=True):
                    kept[f"{level}text_model.encoder.layers.{match[1]}.self_attn.{part}.{match[2]}"] = third
            elif bare == "text_projection":
                kept[f"{level}text_projection.weight"] = tensor.T
            else:
                for old, new in _HF.items():
                    bare = re.sub(old, new, bare)
                kept[f"{level}text_model.{bare}"] = tensor
        return kept

    return change


def _vae_attention(spelling: dict[str, str], *, flat: bool) -> Change:
    def change(state: State) -> State:
        changed = {}
        for name, tensor in state.items():
            if match := re.fullmatch(r"(first_stage_model\.\w+\.mid\.attn_1\.)(\w+)(\.\w+)", name):
                name = match[1] + spelling.get(match[2], match[2]) + match[3]
                tensor = tensor[:, :, 0, 0] if flat and tensor.ndim == 4 else tensor
            changed[name] = tensor
        return changed

    return change


def _turned(pattern: str, *, flat: bool) -> Change:
    """Returns a change between matrices and 1x1 convolutions of the tensors that a pattern matches."""

    def change(state: State) -> State:
        def turned(tensor: Tensor) -> Tensor:
            return tensor.flatten(1) if flat else tensor[:, :, None, None]

        return {name: turned(tensor) if re.search(pattern, name) else tensor for name, tensor in state.items()}

    return change


def _projected_by_a_layer(state: State) -> State:
    key = "conditioner.embedders.1.model.text_projection"
    return {f"{key}.weight" if name == key else name: t.T if name == key else t for name, t in state.items()}


_CLIP, _OPEN, _FIRST = "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0."
_TODAY = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
_OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
SPELLINGS: dict[str, tuple[str, Change]] = {
    "text encoder without text_model": ("sd15", replaced(f"{_CLIP}text_model.", _CLIP)),
    "text encoder without the level transformer": ("sd15", replaced(_CLIP, "cond_stage_model.")),
    "text encoder of the generative-models layout": ("sd15", replaced("cond_stage_model.", _FIRST)),
    "left-over projection and scale": (
        "sd15",
        added(
            cond_stage_model__transformer__text_projection__weight=torch.ones(4, 4),
            cond_stage_model__logit_scale=torch.tensor(4.6),
        ),
    ),
    "autoencoder with today's attention names": (
        "sd15",
        _vae_attention(
            {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}, flat=True
        ),
    ),
    "autoencoder with old attention names": (
        "sd15",
        _vae_attention(_OLD, flat=False),
    ),
    "matrices in place of 1x1 convolutions": ("sd15", _turned(r"\.1\.proj_(in|out)\.weight", flat=True)),
    "SD 2.x with convolutions in place of matrices": ("sd21", _turned(r"\.1\.proj_(in|out)\.weight", flat=False)),
    "SD 2.x with transformers' names": ("sd21", as_transformers(_OPEN, _CLIP)),
    "SD 2.x with transformers' names under model": ("sd21", as_transformers(_OPEN, f"{_OPEN}transformer.")),
    "SD 2.x of the generative-models layout": ("sd21", replaced("cond_stage_model.", _FIRST)),
    "SD 2.x whole, with its last layer and projection": (
        "sd21",
        added(
            cond_stage_model__model__transformer__resblocks__23__ln_1__weight=torch.ones(4),
            cond_stage_model__model__text_projection=torch.ones(4, 4),
            cond_stage_model__model__logit_scale=torch.tensor(4.6),
            cond_stage_model__model__attn_mask=torch.ones(4, 4),
        ),
    ),
    "SDXL projected by a layer": ("sdxl", _projected_by_a_layer),
    "SDXL with transformers' names": (
        "sdxl",
        as_transformers("conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."),
    ),
    "SDXL with transformers' names under model": (
        "sdxl",
        as_transformers("conditioner.embedders.1.model.", "conditioner.embedders.1.model."),
    ),
    "SDXL without text_model": (
        "sdxl",
        replaced(f"{_FIRST}transformer.text_model.", f"{_FIRST}transformer."),
    ),
    "SDXL with left-over projection and scale": (
        "sdxl",
        lambda state: (
            state
            | {f"{_FIRST}transformer.text_projection.weight": torch.ones(4, 4), f"{_FIRST}logit_scale": torch.ones(())}
            | {"conditioner.embedders.1.model.logit_scale": torch.ones(())}
        ),
    ),
}
"""By what is unusual about them: the family, and how its usual file is changed."""
