"""Checkpoints on disk for tests: the original single-file layout, and every way a model folder goes wrong."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffcore.checkpoint import ldm
from diffcore.checkpoint.pieces import Piece

State = dict[str, Tensor]


def single_file(
    pipeline: Any,
    path: Path,
    family: str,
    *,
    extra: bool = False,
    change: Callable[[State], State] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes a pipeline of diffusers as one file in the original layout of its family.

    Args:
        pipeline: A pipeline that `tiny.pipeline` made.
        path: The file to write.
        family: One of sd15, sd21 and sdxl.
        extra: Whether to add tensors that training leaves behind in published files.
        change: Rewrites all tensors by name, as other tools store them; see `spellings`.
        metadata: Metadata of the header.
    """
    state: State = {}
    for name in ("unet", "vae", *(part for of, part in ldm.TEXT_ENCODERS if of == family)):
        state |= _renamed(
            getattr(pipeline, name), lambda names, name=name: ldm.component_names(family, name, names, ())
        )
    if extra:
        state |= {
            "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
            "model_ema.decay": torch.tensor(0.9),
            "model_ema.diffusion_modelinput_blocks00weight": torch.ones(2),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "first_stage_model.loss.logvar": torch.zeros(1),
        }
    state = state if change is None else change(state)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata=metadata)
    return path


def _renamed(module: nn.Module, naming: Callable[[Any], dict[str, Piece]]) -> dict[str, Tensor]:
    tensors = module.state_dict()
    stored: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, piece in naming(tensors.keys()).items():
        tensor = tensors[name]
        if piece.change.endswith("third"):
            thirds.setdefault(piece.name, {})[piece.change] = tensor
        elif piece.change == "transpose":
            stored[piece.name] = tensor.T
        elif piece.change == "flatten":
            stored[piece.name] = tensor[:, :, None, None]
        else:
            stored[piece.name] = tensor
    for name, parts in thirds.items():
        stored[name] = torch.cat([parts["first third"], parts["second third"], parts["last third"]])
    return stored


def sharded(folder: Path, stem: str, parts: int = 2) -> None:
    """Splits the safetensors file `stem` of a component folder into shards with an index."""
    whole = folder / f"{stem}.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = names[part::parts]
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    whole.unlink()
    _write(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def corrupt(folder: Path, how: str) -> None:
    """Damages a Stable Diffusion pipeline folder in one of the ways of `DAMAGES`, in place."""
    DAMAGES[how](folder)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _edit(path: Path, **changes: Any) -> None:
    _write(path, json.loads(path.read_text()) | changes)


def _unet(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def _retensored(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors["conv_in.weight"]


def _reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1].clone()


def _poison_one(tensors: dict[str, Tensor]) -> None:
    tensors["conv_in.bias"][3] = float("nan")


def _add_one(tensors: dict[str, Tensor]) -> None:
    tensors["conv_in.extra"] = torch.ones(2)


def _integer_one(tensors: dict[str, Tensor]) -> None:
    tensors["conv_in.bias"] = tensors["conv_in.bias"].to(torch.int64)


def _lose_shard(folder: Path) -> None:
    sharded(folder / "unet", "diffusion_pytorch_model", 3)
    for part in (1, 3):
        (folder / "unet" / f"diffusion_pytorch_model-{part:05d}-of-00003.safetensors").unlink()


def _truncate(folder: Path) -> None:
    data = _unet(folder).read_bytes()
    _unet(folder).write_bytes(data[: len(data) // 2])


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(_unet(folder)), _unet(folder).with_suffix(".bin"))
    _unet(folder).unlink()


def _own_class(folder: Path) -> None:
    (folder / "unet" / "my_unet.py").write_text("class MyUNet: ...\n")
    _edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shard missing": _lose_shard,
    "truncated": _truncate,
    "LFS pointer": lambda f: _unet(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
    "tensor missing": lambda f: _retensored(_unet(f), _drop_one),
    "tensor extra": lambda f: _retensored(_unet(f), _add_one),
    "tensor of another shape": lambda f: _retensored(_unet(f), _reshape_one),
    "tensor of integers": lambda f: _retensored(_unet(f), _integer_one),
    "NaN": lambda f: _retensored(_unet(f), _poison_one),
    "wrong class": lambda f: _edit(f / "unet" / "config.json", _class_name="AutoencoderKL"),
    "unknown pipeline": lambda f: _edit(f / "model_index.json", _class_name="UnknownPipeline"),
    "pickle only": _pickle_only,
    "code": _own_class,
    "auto_map": lambda f: _edit(f / "text_encoder" / "config.json", auto_map={"AutoModel": "missing.Model"}),
    "tokenizer without vocabulary": lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
    "no weights": lambda f: _unet(f).unlink(),
    "no backbone": lambda f: shutil.rmtree(f / "unet"),
    "no configuration": lambda f: (f / "unet" / "config.json").unlink(),
    "header beyond the file": lambda f: _unet(f).write_bytes(struct.pack("<Q", 10**9) + b"{}"),
}
