"""An adapter file inspected through its header: the modules it changes, as the file spells them. Imports no torch."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcore.adapters.keys import BACKBONE, Key, Layout, parse_key, quoted
from diffcore.adapters.settings import MAX_RANK, Settings, parse_settings
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, printable
from diffcore.io.strictjson import StrictError, parse, read_untrusted
from diffcore.io.tensorfile import TensorEntry, TensorHeader, read_header

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
MARKERS = ("v_pred", "ztsnr")
"""Tensors that say what its base predicts, and change nothing in the adapter."""
METADATA = "lora_adapter_metadata"
"""The entry of a file's header in which diffusers keeps PEFT configurations."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NUMBERS = _FLOATS | {"I64", "I32", "I16", "I8", "U8"}


@dataclass(frozen=True)
class Pair:
    """The two factors, and perhaps the alpha, that change one module.

    Attributes:
        component: The network that is changed, named as in `Key.component`.
        module: The module's name as the file spells it.
        down: Name of the tensor of shape (rank, inputs, ...).
        up: Name of the tensor of shape (outputs, rank, ...).
        alpha: Name of the tensor with alpha, if there is one.
        rank: Rank that both factors share.
        inputs: Shape of `down` without the rank: inputs and, for convolutions, kernel sides.
        outputs: Number of rows of `up`.
    """

    component: str
    module: str
    down: str
    up: str
    alpha: str | None
    rank: int
    inputs: tuple[int, ...]
    outputs: int

    @property
    def spelling(self) -> str:
        """Component and module, for messages."""
        return self.module if self.component == BACKBONE else f"{self.component}: {self.module}"


@dataclass(frozen=True)
class AdapterFile:
    """A file or PEFT folder that passed the checks which need no model.

    Attributes:
        path: The file or folder that the user named.
        header: Checked header of the safetensors file.
        layout: The naming convention that its keys follow.
        pairs: Pairs of factors in the file's order.
        settings: Ranks and strengths that its configuration states, by component.
    """

    path: Path
    header: TensorHeader
    layout: Layout
    pairs: tuple[Pair, ...]
    settings: Mapping[str, Settings] = field(default_factory=dict)


def scan_adapter(path: Path | str) -> AdapterFile:
    """Reads and checks names, shapes and configuration of an adapter; touches none of its tensors.

    Args:
        path: A safetensors file, or a folder with PEFT's or diffusers' file names.

    Raises:
        ModelNotFoundError: There is no such file or folder.
        IncompatibleModelError: It is no LoRA that can be read; the message names the tensor.
    """
    path = Path(path)
    weights, config = _files_of(path)
    header = read_header(weights)
    if marked := [name for name in MARKERS if name in header.tensors]:
        told = " and ".join(marked)
        warnings.warn(f"{printable(path, 300)} is for models with the same marker: it holds {told}", stacklevel=3)
    try:
        layout, pairs = _pairs(header.tensors)
        settings = _settings_of_header(header.metadata)
    except StrictError as error:
        raise refusal(path, str(error)) from None
    if config is not None:
        values = read_untrusted(config)
        try:
            settings = {**settings, BACKBONE: parse_settings(values)}
        except StrictError as error:
            raise refusal(config, str(error)) from None
    return AdapterFile(path, header, layout, pairs, settings)


def refusal(path: Path, what: str) -> IncompatibleModelError:
    """Returns the error for a refused adapter; general advice is added where `what` gives none."""
    advice = "" if ";" in what else "; get a clean copy of the adapter"
    return IncompatibleModelError(f"{printable(path, 300)} {what}{advice}")


def _files_of(path: Path) -> tuple[Path, Path | None]:
    """Returns the weights, and the configuration beside them if they are PEFT's."""
    try:
        is_folder = path.is_dir()
        exists = os.path.lexists(path)
    except (OSError, ValueError):  # a name that no system takes
        is_folder = exists = False
    if not exists:
        raise ModelNotFoundError(f"{printable(path, 300)} does not exist; point to an adapter's file or folder")
    if not is_folder:
        if path.suffix.lower() in _PICKLES:
            raise refusal(path, "is a pickle, which can run code when read; convert it to safetensors")
        config = path.with_name(PEFT_CONFIG)
        return path, config if path.name == PEFT_WEIGHTS and config.exists() else None
    with suppress(OSError):
        names = set(os.listdir(path))
        if PEFT_CONFIG in names and PEFT_WEIGHTS in names:
            return path / PEFT_WEIGHTS, path / PEFT_CONFIG
        if PEFT_CONFIG not in names and DIFFUSERS_WEIGHTS in names:
            return path / DIFFUSERS_WEIGHTS, None
        if any(name.endswith(_PICKLES) for name in names):
            raise refusal(path, "holds a pickle in place of safetensors, which can run code when read; convert it")
    raise refusal(
        path, f"holds neither {PEFT_CONFIG} with {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}; point to the adapter's file"
    )


def _pairs(tensors: Mapping[str, TensorEntry]) -> tuple[Layout, tuple[Pair, ...]]:
    keys = {text: parse_key(text) for text in tensors if text not in MARKERS}
    found: dict[tuple[str, str], dict[str, str]] = {}
    layouts: dict[str, str] = {}
    adapters: dict[str | None, str] = {}
    for text, key in keys.items():
        layouts.setdefault(_dialect(key.layout), text)
        if key.part != "alpha":
            adapters.setdefault(key.adapter_name, text)
        parts = found.setdefault((key.component, key.module), {})
        if key.part in parts:
            raise StrictError(f"gives one factor twice, as {quoted(parts[key.part])} and {quoted(text)}")
        parts[key.part] = text
    if not found:
        raise StrictError("holds no tensor; point to a LoRA file")
    for kinds, what in ((layouts, "two layouts"), (adapters, "two adapters")):
        if len(kinds) > 1:
            one, other = list(kinds.values())[:2]
            raise StrictError(f"mixes {what}, as in {quoted(one)} and {quoted(other)}; keep one of them")
    pairs = tuple(_pair(component, module, parts, tensors) for (component, module), parts in found.items())
    return _layout(list(keys.values())), pairs


def _dialect(layout: Layout) -> str:
    # One file of diffusers may hold several of its spellings, and text encoders with a prefix beside any of them.
    return {"kohya": "underscored", "lycoris": "underscored", "peft": "peft"}.get(layout, "dotted")


def _layout(keys: Sequence[Key]) -> Layout:
    return next((key for key in keys if key.component == BACKBONE), keys[0]).layout


def _pair(component: str, module: str, parts: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> Pair:
    for part, partner in (("down", "up"), ("up", "down"), ("alpha", "down")):
        if part in parts and partner not in parts:
            raise StrictError(f"holds tensor {quoted(parts[part])} without its partner ({partner})")
    down, up = (_factor(parts[part], tensors) for part in ("down", "up"))
    rank = down[0]
    if up[1] != rank or any(side != 1 for side in up[2:]):
        one, other = (f"{quoted(parts[part])} is {_shown(shape)}" for part, shape in (("down", down), ("up", up)))
        raise StrictError(f"has factors of different rank: {one}, {other}")
    if rank > MAX_RANK:
        raise StrictError(f"has tensor {quoted(parts['down'])} of rank {rank:,}; the limit is {MAX_RANK}")
    if alpha := parts.get("alpha"):
        entry = tensors[alpha]
        if entry.dtype not in _NUMBERS or any(side != 1 for side in entry.shape):
            raise StrictError(f"has tensor {quoted(alpha)}, which is not one number")
    return Pair(component, module, parts["down"], parts["up"], alpha, rank, down[1:], up[0])


def _factor(name: str, tensors: Mapping[str, TensorEntry]) -> tuple[int, ...]:
    entry = tensors[name]
    if entry.dtype not in _FLOATS:
        raise StrictError(f"has tensor {quoted(name)} of dtype {entry.dtype}; quantised adapters are not read")
    if not 2 <= len(entry.shape) <= 5 or 0 in entry.shape:
        raise StrictError(f"has tensor {quoted(name)} of shape {_shown(entry.shape)}, which is no factor of a LoRA")
    return entry.shape


def _settings_of_header(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Returns the configurations that diffusers writes into the header, one per component."""
    if METADATA not in metadata:
        return {}
    values = parse(metadata[METADATA].encode())
    if not isinstance(values, dict):
        raise StrictError(f"has {METADATA} that is no object")
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        component, dot, rest = name.rpartition(".")
        component = BACKBONE if not dot or component in ("unet", "transformer") else component
        grouped.setdefault(component, {})[rest] = value
    return {component: parse_settings(values) for component, values in grouped.items()}


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
