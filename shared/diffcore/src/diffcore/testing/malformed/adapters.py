"""Malformed adapters: reading one must raise an error and change nothing."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from diffcore.testing.malformed.case import replaced
from diffcore.testing.malformed.disguises import contents
from diffcore.testing.malformed.headers import pack, unpack, whole_files
from diffcore.testing.sockets import make_socket

Tensors = dict[str, Tensor]

_BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1"
_WIDTH = 64  # of that block in the tiny Stable Diffusion of `testing.tiny`
_KOHYA = f"lora_unet_{_BLOCK.replace('.', '_')}_to_q"
_DOWN, _UP, _ALPHA = f"{_KOHYA}.lora_down.weight", f"{_KOHYA}.lora_up.weight", f"{_KOHYA}.alpha"
_CONV = "lora_unet_mid_block_resnets_0_conv1"


@dataclass(frozen=True)
class AdapterCase:
    """One malformed adapter.

    Attributes:
        name: Unique name that says what is wrong.
        make: Makes the adapter in an empty folder, and returns the path to read.
    """

    name: str
    make: Callable[[Path], Path]


def valid_tensors() -> Tensors:
    """Returns a valid adapter of the tiny Stable Diffusion, with kohya's names."""
    factors = {_DOWN: torch.ones(2, _WIDTH), _UP: torch.ones(_WIDTH, 2), _ALPHA: torch.tensor(1.0)}
    other = _KOHYA.replace("to_q", "to_v")
    return factors | {f"{other}.lora_down.weight": torch.ones(2, _WIDTH), f"{other}.lora_up.weight": factors[_UP] * 2}


def valid_peft(folder: Path, **changes: Any) -> Path:
    """Writes a valid PEFT folder of the same, with some of its configuration replaced."""
    (folder / "lora").mkdir()
    module = f"base_model.model.{_BLOCK}.to_q"
    factors = {f"{module}.lora_A.weight": torch.ones(2, _WIDTH), f"{module}.lora_B.weight": torch.ones(_WIDTH, 2)}
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]} | changes
    replaced(folder / "lora" / "adapter_config.json", json.dumps(config).encode())
    return folder / "lora"


def adapter_cases(seed: int = 0) -> list[AdapterCase]:
    """Returns every case, each with a name of its own."""
    return [*_files(seed), *_tensors(), *_configs(), *_headers(), *_folders()]


def _files(seed: int) -> Iterator[AdapterCase]:
    valid = save(valid_tensors())
    for name, change in whole_files(seed):
        yield AdapterCase(f"file: {name}", lambda f, c=change: _written(f / "a.safetensors", c(valid)))
    for name, data in contents():
        yield AdapterCase(f"disguise: {name}", lambda f, d=data: _written(f / "a.safetensors", d()))
        yield AdapterCase(f"disguise in .bin: {name}", lambda f, d=data: _written(f / "a.bin", d()))


def _tensors() -> Iterator[AdapterCase]:
    for name, change in _changes():
        yield AdapterCase(f"tensors: {name}", lambda f, c=change: _changed(f, c))
    for name, text in {
        "LoHa": f"{_KOHYA}.hada_w1_a",
        "LoKr": f"{_KOHYA}.lokr_w1",
        "LoKr of PEFT": f"base_model.model.{_BLOCK}.to_q.lokr_w1",
        "DoRA of kohya": f"{_KOHYA}.dora_scale",
        "DoRA of PEFT": f"base_model.model.{_BLOCK}.to_q.lora_magnitude_vector.weight",
        "a middle factor": f"{_KOHYA}.lora_mid.weight",
        "OFT": f"{_KOHYA}.oft_blocks",
        "(IA)3": f"{_KOHYA}.on_input",
        "a full difference": f"{_KOHYA}.diff",
        "a difference of biases": f"{_KOHYA}.diff_b",
        "biases": f"unet.{_BLOCK}.to_q.lora_B.bias",
        "embeddings": "base_model.model.embeddings.lora_embedding_A",
        "a saved module": "base_model.model.conv_in.modules_to_save.weight",
        "norms": f"{_KOHYA}.w_norm",
        "bundled embeddings": "bundle_emb.word.clip_l",
        "nothing known": "unknown",
        "a plain weight": f"unet.{_BLOCK}.to_q.weight",
        "a layer that is not there": "lora_unet_mid_block_attentions_7_proj_in.lora_down.weight",
        "a norm": "lora_unet_conv_norm_out.lora_down.weight",
        "a third text encoder": "lora_te3_encoder_block_0.lora_down.weight",
        "512 letters": "a" * 512,
        "512 parts": ".lora_A" * 73,
    }.items():
        yield AdapterCase(f"tensor of {name}", lambda f, t=text: _changed(f, lambda d: d.update({t: torch.ones(2, 2)})))


def _changes() -> Iterator[tuple[str, Callable[[Tensors], object]]]:
    yield "down alone", lambda d: d.pop(_UP)
    yield "up alone", lambda d: d.pop(_DOWN)
    yield "alpha alone", lambda d: (d.pop(_UP), d.pop(_DOWN))
    yield "none", lambda d: d.clear()
    for name, value in {
        "of 0": 0.0,
        "NaN": float("nan"),
        "infinite": float("inf"),
        "of 1e38": 1e38,
        "of 65 537": 65_537.0,
        "of -1e30": -1e30,
        "of -2": -2.0,
    }.items():
        yield f"alpha {name}", lambda d, v=value: d.update({_ALPHA: torch.tensor(v)})
    yield "alpha a vector", lambda d: d.update({_ALPHA: torch.ones(2)})
    yield "alpha a truth value", lambda d: d.update({_ALPHA: torch.tensor(True)})
    for name, poison in {"NaN": float("nan"), "infinity": float("inf")}.items():
        yield f"{name} in down", lambda d, p=poison: d.update({_DOWN: _poisoned(d[_DOWN], p)})
        yield f"{name} in up", lambda d, p=poison: d.update({_UP: _poisoned(d[_UP], p)})
    for name, shape in {
        "another rank": (3, _WIDTH),
        "transposed": (_WIDTH, 2),
        "narrower": (2, _WIDTH - 1),
        "wider": (2, _WIDTH + 1),
        "a vector": (2 * _WIDTH,),
        "a number": (),
        "six sides": (2, _WIDTH, 1, 1, 1, 1),
        "a kernel on a matrix": (2, _WIDTH, 3, 3),
    }.items():
        yield f"down {name}", lambda d, s=shape: d.update({_DOWN: torch.ones(s)})
    yield "up transposed", lambda d: d.update({_UP: torch.ones(2, _WIDTH)})
    yield "up of other height", lambda d: d.update({_UP: torch.ones(_WIDTH + 1, 2)})
    yield "up with a kernel", lambda d: d.update({_UP: torch.ones(_WIDTH, 2, 3, 3)})
    yield "rank 4097", lambda d: d.update({_DOWN: torch.ones(4097, _WIDTH), _UP: torch.ones(_WIDTH, 4097)})
    for kind in (torch.int8, torch.float8_e4m3fn, torch.bool, torch.int64):
        yield f"down of {kind}", lambda d, k=kind: d.update({_DOWN: d[_DOWN].to(k)})
    yield "kernel in the wrong factor", lambda d: _pair(d, _CONV, (2, _WIDTH, 1, 1), (_WIDTH, 2, 3, 3))
    yield "kernel of another size", lambda d: _pair(d, _CONV, (2, _WIDTH, 5, 5), (_WIDTH, 2, 1, 1))
    yield "one factor spelled twice", lambda d: d.update({f"{_KOHYA}.lora.down.weight": torch.ones(2, _WIDTH)})
    yield "one layer in two layouts", lambda d: _pair(d, f"unet.{_BLOCK}.to_q", (2, _WIDTH), (_WIDTH, 2))
    yield (
        "one layer under two names",
        lambda d: _pair(d, "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", (2, _WIDTH), (_WIDTH, 2)),
    )
    yield "two adapters", lambda d: _two_adapters(d)
    yield "a text encoder too wide", lambda d: _pair(d, "lora_te_text_model_encoder_layers_0_mlp_fc1", (2, 99), (37, 2))
    yield (
        "a second text encoder",
        lambda d: _pair(d, "lora_te2_text_model_encoder_layers_0_mlp_fc1", (2, 32), (37, 2)),
    )
    yield "nothing but a second text encoder", _of_second_text_encoder
    yield "another family", _of_another_family


def _pair(tensors: Tensors, stem: str, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    tensors |= {f"{stem}.lora_down.weight": torch.ones(down), f"{stem}.lora_up.weight": torch.ones(up)}


def _two_adapters(tensors: Tensors) -> None:
    tensors.clear()
    for name, part in (("one", "to_q"), ("two", "to_v")):
        stem = f"base_model.model.{_BLOCK}.{part}"
        tensors[f"{stem}.lora_A.{name}.weight"] = torch.ones(2, _WIDTH)
        tensors[f"{stem}.lora_B.{name}.weight"] = torch.ones(_WIDTH, 2)


def _of_second_text_encoder(tensors: Tensors) -> None:
    tensors.clear()
    _pair(tensors, "lora_te2_text_model_encoder_layers_0_mlp_fc1", (2, 32), (37, 2))


def _of_another_family(tensors: Tensors) -> None:
    tensors.clear()
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    tensors |= {f"{stem}.lora_A.weight": torch.ones(2, _WIDTH), f"{stem}.lora_B.weight": torch.ones(_WIDTH, 2)}


def _poisoned(tensor: Tensor, value: float) -> Tensor:
    poisoned = tensor.clone()
    poisoned.view(-1)[-1] = value
    return poisoned


def _configs() -> Iterator[AdapterCase]:
    for name, changes in {
        "another method": {"peft_type": "LOHA"},
        "no method": {"peft_type": None},
        "DoRA": {"use_dora": True},
        "rank 0": {"r": 0},
        "a negative rank": {"r": -2},
        "a rank of 2^40": {"r": 2**40},
        "a rank of 1.5": {"r": 1.5},
        "a rank that is text": {"r": "2"},
        "a rank that is true": {"r": True},
        "no rank": {"r": None},
        "another rank than the file's": {"r": 3},
        "alpha 0": {"lora_alpha": 0},
        "alpha 1e300": {"lora_alpha": 1e300},
        "a negative alpha": {"lora_alpha": -4},
        "alpha that is text": {"lora_alpha": "4"},
        "alpha that is a list": {"lora_alpha": [4]},
        "a rank pattern of lists": {"rank_pattern": {"to_q": [2]}},
        "a rank pattern that is a list": {"rank_pattern": ["to_q"]},
        "another rank by pattern": {"rank_pattern": {"attn1.to_q": 8}},
        # PEFT matches patterns as regular expressions, and the search for some never ends: none of those is here.
        "a pattern with a character that is not allowed": {"alpha_pattern": {"to_q!": 3}},
        "alpha 0 by pattern": {"alpha_pattern": {"to_q": 0}},
        "a negative alpha by pattern": {"alpha_pattern": {"to_q": -27}},
        "rsLoRA that is text": {"use_rslora": "yes"},
        "biases": {"bias": "all"},
        "transposed weights": {"fan_in_fan_out": True},
        "saved modules": {"modules_to_save": ["conv_in"]},
        "PiSSA": {"init_lora_weights": "pissa"},
        "LoftQ": {"loftq_config": {"loftq_bits": 4}},
        "a library that is not there": {"megatron_config": {"x": 1}, "megatron_core": "missing"},
        "repeated layers": {"layer_replication": [[0, 4], [2, 5]]},
        "parameters": {"target_parameters": ["weight"]},
        "tokens": {"trainable_token_indices": [1, 2]},
        "QALoRA": {"use_qalora": True},
        "a key of the future": {"use_unknown": {"x": 1}},
    }.items():
        yield AdapterCase(f"config: {name}", lambda f, c=changes: valid_peft(f, **c))
    for name, text in {
        "empty": b"",
        "a list": b"[]",
        "not JSON": b"r: 2",
        "NaN": b'{"r": 2, "lora_alpha": NaN}',
        "an infinite exponent": b'{"r": 2, "lora_alpha": 1e999}',
        "a key twice": b'{"r": 2, "r": 2, "lora_alpha": 4}',
        "100 000 levels": b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nothing": b"{}",
        "a pickle": b"\x80\x04\x95" + bytes(40),
    }.items():
        yield AdapterCase(f"config text: {name}", lambda f, t=text: _reconfigured(f, t))


def _headers() -> Iterator[AdapterCase]:
    stated = {"unet.r": 2, "unet.lora_alpha": 1}
    for name, text in {
        "not JSON": "r: 2",
        "a list": "[]",
        "NaN": '{"unet.r": 2, "unet.lora_alpha": NaN}',
        "100 000 levels": "[" * 100_000,
        "a key twice": '{"unet.r": 2, "unet.r": 2, "unet.lora_alpha": 1}',
        "no alpha": '{"unet.r": 2}',
        "another alpha than the tensor's": json.dumps(stated | {"unet.lora_alpha": 27}),
        "a negative alpha": json.dumps(stated | {"unet.lora_alpha": -1}),
        "another rank than the tensor's": json.dumps(stated | {"unet.r": 4}),
        "another method": json.dumps(stated | {"unet.peft_type": "OFT"}),
        "a pattern with a character that is not allowed": json.dumps(stated | {"unet.rank_pattern": {"to_q!": 2}}),
    }.items():
        yield AdapterCase(f"header: {name}", lambda f, t=text: _with_metadata(f, {"lora_adapter_metadata": t}))


def _folders() -> Iterator[AdapterCase]:
    def without(name: str) -> Callable[[Path], Path]:
        return lambda f: _removed(valid_peft(f), name)

    def socket(name: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            lora = _removed(valid_peft(folder), name)
            make_socket(lora / name)
            return lora

        return make

    def linked(name: str, target: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            lora = _removed(valid_peft(folder), name)
            (lora / name).symlink_to(target)
            return lora

        return make

    def foldered(name: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            lora = _removed(valid_peft(folder), name)
            (lora / name).mkdir()
            return lora

        return make

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        yield AdapterCase(f"folder: without {name}", without(name))
        yield AdapterCase(f"folder: a socket for {name}", socket(name))
        yield AdapterCase(f"folder: a device for {name}", linked(name, os.devnull))
        yield AdapterCase(f"folder: a broken link for {name}", linked(name, "nowhere"))
        yield AdapterCase(f"folder: a folder for {name}", foldered(name))
    yield AdapterCase("folder: weights in a .bin", _only_bin)
    yield AdapterCase("path: nothing there", lambda f: f / "absent.safetensors")
    yield AdapterCase("path: an empty folder", lambda f: f)
    yield AdapterCase("path: with controls", lambda f: f / "\x1b[31m\u202e.safetensors")
    yield AdapterCase("path: a device", lambda f: Path(os.devnull))
    yield AdapterCase("path: too long", lambda f: f / ("a" * 5000))


def _changed(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = valid_tensors()
    change(tensors)
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def _with_metadata(folder: Path, metadata: dict[str, str]) -> Path:
    header, data = unpack(save(valid_tensors()))
    return _written(folder / "a.safetensors", pack(json.dumps({"__metadata__": metadata, **header}).encode(), data))


def _reconfigured(folder: Path, text: bytes) -> Path:
    lora = valid_peft(folder)
    replaced(lora / "adapter_config.json", text)
    return lora


def _only_bin(folder: Path) -> Path:
    lora = valid_peft(folder)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    return lora


def _removed(lora: Path, name: str) -> Path:
    (lora / name).unlink()
    return lora


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
