"""Checks of untrusted configurations: what is refused, and which settings reach a library. Imports no torch."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffcore.checkpoint.catalog import MODEL_TYPES, TEXT_CONFIG_KEYS, Role
from diffcore.errors import printable
from diffcore.io.strictjson import StrictError

MAX_INTEGER = 65_536
MAX_LIST = 64
MAX_BETAS = 10_000
MAX_LAYERS = 256
# Notes of whoever saved the file: dropped unread, never opened, whatever they name.
NOTES = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "transformers_version"})
_TYPES = frozenset({"architectures", "model_type", "torch_dtype", "dtype", "quantization_config"})
_CODE = frozenset({"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code"})
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation.*")
_WORD = re.compile(r"[A-Za-z0-9_.+ -]{0,128}")  # what settings are; addresses and paths have a colon or a slash


def cleaned(config: Mapping[str, Any], role: Role, class_name: str) -> tuple[dict[str, Any], int]:
    """Returns the settings of a component that a library may see, and how many were dropped.

    Raises:
        StrictError: A setting names code or a path, or a size beyond every real model.
    """
    refuse_code(config)
    if config.get("quantization_config") is not None:
        raise StrictError("is quantised, which is not supported; use the weights it was made from")
    settings = {key: value for key, value in config.items() if key not in NOTES and key not in _TYPES}
    dropped = 0
    if role == "text_encoder":
        kind = MODEL_TYPES[class_name]
        if config.get("model_type", kind) != kind:
            raise StrictError(f"has model_type {printable(config['model_type'])} where {kind} is expected")
        known = TEXT_CONFIG_KEYS[kind]
        dropped = len(settings.keys() - known)
        settings = {key: value for key, value in settings.items() if key in known}
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key, value in settings.items():
        _check(key, value, MAX_BETAS if role == "scheduler" else MAX_LIST)
    return settings, dropped


def refuse_code(value: Any) -> None:
    """Raises StrictError where a configuration, at any depth, asks for code of its own."""
    for key, setting in _items(value):
        if key in _CODE and setting not in (None, False, {}, []):
            raise StrictError(f"sets {key}; diffcore never runs code from model folders")
        if _IMPLEMENTATION.fullmatch(key) and setting not in (None, "eager", "sdpa"):
            raise StrictError(f"sets {printable(key)} to {printable(setting)}; only eager and sdpa are allowed")


def check_latents(config: Mapping[str, Any]) -> None:
    """Raises StrictError where an autoencoder's scales per channel are not a mean and a deviation of each."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return
    channels = config.get("latent_channels", 4)
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if not (isinstance(values, list) and len(values) == channels and all(_is_real(value) for value in values)):
            raise StrictError(f"sets {key} to {printable(values)}, not to a number for each of {channels} channels")
        if key == "latents_std" and min(values) <= 0:
            raise StrictError("sets latents_std to numbers that are not positive")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def num_layers(settings: Mapping[str, Any]) -> int:
    """Returns a lower bound of the layers that a configuration asks for: each would hold a tensor at least."""
    per_block = _largest(settings.get("layers_per_block", 1)) * _largest(
        settings.get("transformer_layers_per_block", 1)
    )
    blocks = len(settings["block_out_channels"]) if isinstance(settings.get("block_out_channels"), list) else 1
    stacked = sum(v for k, v in settings.items() if re.fullmatch(r"num_(\w+_)?layers", k) and isinstance(v, int))
    return max(per_block * blocks, stacked)


def _check(key: str, value: Any, longest: int) -> None:
    shown = printable(key)
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise StrictError(f"sets {shown} to {printable(value)!r}, which is no setting but an address or text")
    elif isinstance(value, int | float):
        limit = MAX_LAYERS if "layers" in key else MAX_INTEGER
        if isinstance(value, int) and abs(value) > limit:
            raise StrictError(f"sets {shown} to {value}; the limit is {limit}")
    elif isinstance(value, list):
        if len(value) > longest:
            raise StrictError(f"gives {len(value)} values for {shown}; the limit is {longest}")
        for item in value:
            _check(key, item, longest)
    elif isinstance(value, dict):
        if len(value) > MAX_LIST:
            raise StrictError(f"gives {len(value)} values for {shown}; the limit is {MAX_LIST}")
        for item in value.values():
            _check(key, item, longest)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from _items(item)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item)


def _largest(value: Any) -> int:
    if isinstance(value, list):
        return max((_largest(item) for item in value), default=1)
    return value if isinstance(value, int) else 1
