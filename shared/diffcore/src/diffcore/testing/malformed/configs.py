"""Malformed configurations: broken JSON, code by name, sizes beyond reason, classes that are not what they say."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffcore.testing.malformed.case import Bases, Case, copied, edited, replaced


def config_cases() -> Iterator[Case]:
    """Yields malformed configurations of a backbone and of a pipeline."""
    for name, change in _texts():
        yield Case(f"config text: {name}", "config", lambda b, f, c=change: _backbone_text(b, f, c))
    for name, changes in _settings():
        yield Case(f"config: {name}", "config", lambda b, f, c=changes: _backbone_settings(b, f, c))
    for name, changes in _indices():
        yield Case(f"index: {name}", "config", lambda b, f, c=changes: _index(b, f, c))
    for name, make in _components():
        yield Case(f"component: {name}", "config", lambda b, f, m=make: _pipeline(b, f, m))


def _backbone_text(bases: Bases, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    model = copied(bases.backbone, folder)
    replaced(model / "config.json", change((model / "config.json").read_bytes()))
    return model


def _backbone_settings(bases: Bases, folder: Path, changes: dict[str, Any]) -> Path:
    model = copied(bases.backbone, folder)
    edited(model / "config.json", **changes)
    return model


def _index(bases: Bases, folder: Path, changes: dict[str, Any]) -> Path:
    return _pipeline(bases, folder, lambda model: edited(model / "model_index.json", **changes))


def _pipeline(bases: Bases, folder: Path, change: Callable[[Path], None]) -> Path:
    model = copied(bases.pipeline, folder)
    change(model)
    return model


def _texts() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "empty", lambda d: b""
    yield "a list", lambda d: b"[]"
    yield "a number", lambda d: b"7"
    yield "not JSON", lambda d: b"_class_name: DiTTransformer2DModel"
    yield "unfinished", lambda d: d[: len(d) // 2]
    yield "a comma too many", lambda d: d.rstrip()[:-1] + b",}"
    yield "UTF-16", lambda d: d.decode().encode("utf-16")
    yield "a byte order mark", lambda d: b"\xef\xbb\xbf" + d
    yield "broken UTF-8", lambda d: d.replace(b"gelu", b"g\xff\xfelu")
    yield "a key twice", lambda d: b'{"num_layers": 2, ' + d.lstrip()[1:]
    yield "NaN", lambda d: b'{"dropout": NaN, ' + d.lstrip()[1:]
    yield "Infinity", lambda d: b'{"dropout": -Infinity, ' + d.lstrip()[1:]
    yield "an infinite exponent", lambda d: b'{"dropout": 1e999, ' + d.lstrip()[1:]
    yield "an inexact integer", lambda d: b'{"seed": 9007199254740993, ' + d.lstrip()[1:]
    yield "an integer of 5000 digits", lambda d: b'{"seed": ' + b"9" * 5000 + b", " + d.lstrip()[1:]
    yield "65 levels", lambda d: b'{"x": ' + b"[" * 64 + b"]" * 64 + b", " + d.lstrip()[1:]
    yield "100 000 levels", lambda d: b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + d.lstrip()[1:]
    yield "a string without end", lambda d: b'{"x": "' + b'\\"' * 200_000
    yield "more than 10 MB", lambda d: d + b" " * 10_000_001
    yield "a pickle", lambda d: b"\x80\x04\x95" + bytes(40)


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "class of an autoencoder", {"_class_name": "AutoencoderKL"}
    yield "class of another backbone", {"_class_name": "FluxTransformer2DModel"}
    yield "class in a list", {"_class_name": ["missing", "Missing"]}
    yield "class that is a path", {"_class_name": "../missing.Missing"}
    yield "class of its own", {"_class_name": "Missing"}
    yield "class that is null", {"_class_name": None}
    yield "class that is a number", {"_class_name": 7}
    yield "old class of no known norm", {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}
    yield "auto_map", {"auto_map": {"AutoModel": "missing.Missing"}}
    yield "auto_map further down", {"extra": {"deep": [{"auto_map": {"AutoModel": "missing.Missing"}}]}}
    yield "custom pipeline", {"custom_pipelines": {"missing": {}}}
    yield "trust asked for", {"trust_remote_code": True}
    yield "another attention", {"_attn_implementation": "another"}
    yield "another attention under a longer key", {"_attn_implementation_internal": "another"}
    yield "other experts", {"_experts_implementation": "another"}
    yield "an address", {"activation_fn": "https://example.org/missing"}
    yield "a repository", {"activation_fn": "stranger/missing"}
    yield "a path", {"activation_fn": "..\\missing"}
    yield "a call", {"activation_fn": "gelu()"}
    yield "quantised", {"quantization_config": {"quant_method": "missing"}}
    yield "a width of 2^40", {"attention_head_dim": 2**40}
    yield "channels beyond the limit", {"in_channels": 65_537}
    yield "a layer beyond the limit", {"num_layers": 257}
    yield "256 layers and two in the file", {"num_layers": 256}
    yield "no layers", {"num_layers": 0}
    yield "negative layers", {"num_layers": -1}
    yield "patches of size 0", {"patch_size": 0}
    yield "negative patches", {"patch_size": -2}
    yield "another width", {"attention_head_dim": 16}
    yield "another number of classes", {"num_embeds_ada_norm": 11}
    yield "tables larger than the limit", {"sample_size": 4_200}
    yield "a number as text", {"num_attention_heads": "2"}
    yield "a number as a list", {"num_attention_heads": [2, 2]}
    yield "a number as an object", {"num_attention_heads": {"x": 2}}
    yield "a list of 65", {"extra": [1] * 65}
    yield "unknown activation", {"activation_fn": "missing"}
    yield "unknown norm", {"norm_type": "missing"}


def _indices() -> Iterator[tuple[str, dict[str, Any]]]:
    unet = {"unet": ["diffusers", "UNet2DConditionModel"]}
    yield "no class", {"_class_name": None}
    yield "class in a list", {"_class_name": ["pipeline", "Missing"]}
    yield "unknown class", {"_class_name": "MissingPipeline"}
    yield "class of a neighbour", {"_class_name": "StableDiffusionInpaintPipeline"}
    yield "a library that is not there", {"unet": ["missing", "Missing"]}
    yield "a library within another", {"unet": ["diffusers.missing", "Missing"]}
    yield "no library", {"unet": [None, "UNet2DConditionModel"]}
    yield "no class of a component", {"unet": ["diffusers", None]}
    yield "a library in a list", {"unet": [["diffusers"], "UNet2DConditionModel"]}
    yield "three entries", {"unet": ["diffusers", "UNet2DConditionModel", "x"]}
    yield "an object", {"unet": {"library": "diffusers"}}
    yield "a function of the library", {"unet": ["diffusers", "logging"]}
    yield "a dotted class", {"unet": ["diffusers", "utils.logging"]}
    yield "a pipeline inside", {"unet": ["diffusers", "StableDiffusionPipeline"]}
    yield "a model where the tokenizer is", {"tokenizer": ["transformers", "AutoTokenizer"]}
    yield "a component with a mark", {"unet!": unet["unet"]}
    yield "a component with a blank", {"unet x": unet["unet"]}
    yield "a component in capitals", {"Unet": unet["unet"]}
    yield "a component with a long name", {"a" * 65: unet["unet"]}
    yield "a component unknown to the class", {"controlnet": unet["unet"]}
    yield "no backbone", {"unet": [None, None]}
    yield "auto_map", {"auto_map": {"AutoModel": "missing.Missing"}}
    yield "custom pipeline", {"custom_pipeline": "stranger/missing"}
    yield "another class than the component's own", {"unet": ["diffusers", "UNet2DModel"]}
    yield "an autoencoder for a backbone", {"unet": ["diffusers", "AutoencoderKL"]}


def _components() -> Iterator[tuple[str, Callable[[Path], None]]]:
    def editing(file: str, **changes: Any) -> Callable[[Path], None]:
        return lambda model: edited(model / file, **changes)

    def writing(file: str, value: Any) -> Callable[[Path], None]:
        return lambda model: replaced(model / file, json.dumps(value).encode())

    scheduler, text = "scheduler/scheduler_config.json", "text_encoder/config.json"
    yield "scheduler of an unknown class", editing(scheduler, _class_name="MissingScheduler")
    yield "scheduler of unknown betas", editing(scheduler, beta_schedule="missing")
    yield "scheduler of 10 001 betas", editing(scheduler, trained_betas=[0.1] * 10_001)
    yield "scheduler of betas above 1", editing(scheduler, beta_end=7.0)
    yield "scheduler of negative length", editing(scheduler, num_train_timesteps=-5)
    yield "scheduler of 65 537 steps", editing(scheduler, num_train_timesteps=65_537)
    yield "scheduler of unknown prediction", editing(scheduler, prediction_type="missing")
    yield "text encoder of another type", editing(text, model_type="llama")
    yield "text encoder with auto_map", editing(text, auto_map={"AutoModel": "missing.Missing"})
    yield "text encoder too wide", editing(text, hidden_size=2**40)
    yield "text encoder of other width", editing(text, hidden_size=64)
    yield "text encoder with fewer entries", editing(text, vocab_size=100)
    yield "text encoder of unknown activation", editing(text, hidden_act="missing")
    yield "autoencoder without blocks", editing("vae/config.json", block_out_channels=[])
    yield "autoencoder with its own mean", editing("vae/config.json", latents_mean=[0.0] * 4)
    yield "autoencoder without configuration", lambda model: (model / "vae/config.json").unlink()
    yield (
        "tokenizer with auto_map",
        editing("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": "missing.M"}),
    )
    yield "tokenizer without model", writing("tokenizer/tokenizer.json", {"model": None})
    yield "tokenizer of other kind", writing("tokenizer/tokenizer.json", {"model": {"type": "Unigram", "vocab": []}})
    yield (
        "tokenizer numbered wildly",
        writing("tokenizer/tokenizer.json", {"model": {"vocab": {"a": 10**9, "b": -1}, "merges": []}}),
    )
    yield "tokenizer without ends", writing("tokenizer/tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": []}})
    yield "tokenizer with broken merges", _with_merges([["a"], "b c d"])
    yield "tokenizer with merges to nowhere", _with_merges(["a b"])
    yield "tokenizer with a token without text", _with_added({"id": 514, "content": ""})
    yield "tokenizer with a token that is a number", _with_added({"id": 514, "content": 7})
    yield "tokenizer with a token of no number", _with_added({"content": "<x>", "id": "x"})
    yield "tokenizer with a token beyond the text encoder", _with_added({"id": 514, "content": "<x>"})
    yield "tokenizer with a token numbered wildly", _with_added({"id": 10**6, "content": "<x>"})
    yield "tokenizer with a token of odd settings", _with_added({"id": 514, "content": "<x>", "lstrip": 1})
    yield "tokenizer with tokens in a word", _with_added("<x>")
    yield "tokenizer with unknown padding", editing("tokenizer/tokenizer_config.json", pad_token="missing")


def _with_added(token: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "tokenizer/tokenizer.json"
        content = json.loads(path.read_bytes())
        content["added_tokens"] = [*content["added_tokens"], token]
        replaced(path, json.dumps(content).encode())

    return change


def _with_merges(merges: list[Any]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "tokenizer/tokenizer.json"
        content = json.loads(path.read_bytes())
        content["model"]["merges"] = merges
        replaced(path, json.dumps(content).encode())

    return change
