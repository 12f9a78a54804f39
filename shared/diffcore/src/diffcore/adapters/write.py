"""Writing adapters to files that every tool applies with the same effect.

Tools disagree about alpha: diffusers ignores it without its own header entry, matches its patterns against names that
some files lack, and exporters replace it by the rank. All tools agree on alpha = rank with one rank for every module.
So the strength is folded into the factors, and ranks are padded with zeros to one rank.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from diffcore.adapters.adapter import Adapter, LowRank
from diffcore.adapters.base import Base, underscored, with_text_model
from diffcore.adapters.keys import BACKBONE
from diffcore.adapters.scan import METADATA, PEFT_CONFIG, PEFT_WEIGHTS
from diffcore.adapters.settings import MAX_ALPHA, MAX_RANK
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.io.jsonfile import json_text

Format = Literal["diffusers", "kohya", "peft"]
Folded = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""Factors (down, up) of one rank whose product is the change, by component and module."""

_OWN_METADATA = ("format", METADATA, "ss_network_module", "ss_network_dim", "ss_network_alpha")
_WORST = 0.01  # relative error of a factor in a narrower type, beyond which the type does not fit


def write_adapter(
    adapter: Adapter,
    path: Path | str,
    *,
    format: Format = "diffusers",
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    scale: float = 1.0,
) -> Path:
    """Writes an adapter in one of three layouts, atomically, and returns its path.

    Args:
        adapter: The adapter to write; its strength is folded into the factors.
        path: The safetensors file to write; for "peft" the folder.
        format: "diffusers" for `load_lora_weights`, "kohya" for web UIs, "peft" for `PeftModel.from_pretrained`.
        dtype: Precision of the factors; by default the adapter's where it holds them exactly, else float32.
        base: The model it belongs to; needed for kohya's names of SDXL modules, those of original checkpoints.
        overwrite: Whether an existing adapter may be replaced.
        metadata: More entries of the header of the safetensors file, which tools pass over.
        scale: Strength alpha / rank that the file states, the same for every module. At 1 tools that read no alpha
            show the adapter too; any other is for tools that are known to read it.

    Raises:
        UserError: Something is there already, the layout cannot hold the adapter, or the type cannot hold its numbers.
        ValueError: The adapter changes nothing, or `metadata` has an entry that the layout itself writes.
        MachineError: The disk is full or failing.
    """
    path, metadata = Path(path), dict(metadata or {})
    if own := [name for name in metadata if name in _OWN_METADATA]:
        raise ValueError(f"`metadata` has {own[0]!r}, which the layout writes itself; choose another name")
    if not 0 < scale <= MAX_ALPHA:
        raise UserError(f"`scale` is {scale:g}; give a strength above 0 and at most {MAX_ALPHA:,}")
    folded = _folded(adapter, scale)
    rank = next(iter(folded.values()))[0].shape[0]
    if rank * scale > MAX_ALPHA:
        raise UserError(f"`scale` is {scale:g} at rank {rank}, an alpha above {MAX_ALPHA:,}; give a smaller one")
    folded, alpha = _typed(folded, adapter, dtype), rank * scale
    if format == "peft":
        if adapter.text_encoders:
            raise UserError(
                f"{printable(adapter.name)} changes {', '.join(adapter.text_encoders)}, and a PEFT folder holds one "
                "network; write it as diffusers or kohya"
            )
        _refuse_taken(path / PEFT_CONFIG, overwrite)
        _refuse_taken(path / PEFT_WEIGHTS, overwrite)
        # An old configuration must never stand beside new weights, were the two writes parted.
        with files.explained(path / PEFT_CONFIG):
            files.remove(path / PEFT_CONFIG)
        files.write_whole(path / PEFT_WEIGHTS, _packed(_letters(folded, "base_model.model."), metadata))
        files.write_whole(path / PEFT_CONFIG, json_text(_peft_config(adapter.modules, rank, alpha)).encode())
        return path
    if path.suffix != ".safetensors":
        raise UserError(f"{printable(path, 300)} does not end in .safetensors; name a file that does")
    _refuse_taken(path, overwrite)
    written = _kohya(adapter, folded, alpha, base) if format == "kohya" else _diffusers(adapter, folded, rank, alpha)
    files.write_whole(path, _packed(written[0], written[1] | metadata))
    return path


def _refuse_taken(path: Path, overwrite: bool) -> None:
    if not overwrite and (path.exists() or path.is_symlink()):
        raise UserError(f"{printable(path, 300)} is there already; choose another name, or pass `overwrite=True`")


def _folded(adapter: Adapter, scale: float) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    if not (changes := list(adapter)):
        raise ValueError(f"adapter {adapter.name!r} changes nothing")
    rank = max(change.rank for _, _, change in changes)
    if rank > MAX_RANK:
        raise UserError(
            f"{printable(adapter.name)} has rank {rank:,}, and files hold at most {MAX_RANK}; change fewer rows, or "
            "save the whole model"
        )
    return {(component, module): _padded(change, rank, scale) for component, module, change in changes}


def _padded(change: LowRank, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns factors in float32 or wider, of a rank that is not smaller than theirs, for a strength alpha / rank."""
    wide = torch.promote_types(change.up.dtype, torch.float32)
    down = change.down.new_zeros(rank, *change.down.shape[1:], dtype=wide)
    up = change.up.new_zeros(change.up.shape[0], rank, dtype=wide)
    down[: change.rank] = change.down
    up[:, : change.rank] = change.up.to(wide) * (change.alpha / change.rank / scale)
    return down, up


def _typed(folded: Folded, adapter: Adapter, dtype: torch.dtype | None) -> Folded:
    if dtype is None:
        kept = adapter_dtype(adapter)
        exact = all(torch.equal(t.to(kept).to(t.dtype), t) for pair in folded.values() for t in pair)
        dtype = kept if exact else torch.promote_types(kept, torch.float32)
        return {place: (down.to(dtype), up.to(dtype)) for place, (down, up) in folded.items()}
    return {place: _narrowed(place, _balanced(*pair), dtype) for place, pair in folded.items()}


def adapter_dtype(adapter: Adapter) -> torch.dtype:
    """Returns the narrowest type that holds all of an adapter's factors."""
    dtypes = [factor.dtype for _, _, change in adapter for factor in (change.down, change.up)]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors scaled, by powers of two, to similar size, so that narrow types hold both without loss."""
    sizes = float(down.norm()), float(up.norm())
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return down, up
    power = 2.0 ** round(math.log2(sizes[0] / sizes[1]) / 2)
    return down / power, up * power


def _narrowed(place: tuple[str, str], pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    narrow = pair[0].to(dtype), pair[1].to(dtype)
    for before, after in zip(pair, narrow, strict=True):
        error = float((after.to(before.dtype) - before).norm())
        if not error <= _WORST * float(before.norm()):  # infinite where a number overflowed
            name = str(dtype).removeprefix("torch.")
            raise UserError(f"{name} does not hold the numbers of {place[1]!r}; write bfloat16 or float32")
    return narrow


def _letters(folded: Folded, prefix: str) -> dict[str, Tensor]:
    """Returns the tensors under PEFT's names, lora_A and lora_B."""
    tensors: dict[str, Tensor] = {}
    for (component, module), (down, up) in folded.items():
        name = prefix + module if component == BACKBONE else f"{component}.{with_text_model(module)}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": _with_kernel(up, down)}
    return tensors


def _diffusers(adapter: Adapter, folded: Folded, rank: int, alpha: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    config = {
        f"{adapter.backbone if component == BACKBONE else component}.{name}": value
        for component, changes in adapter.components.items()
        for name, value in _lora_config(changes, rank, alpha).items()
    }
    return _letters(folded, f"{adapter.backbone}."), {METADATA: json.dumps(config, sort_keys=True)}


def _kohya(
    adapter: Adapter, folded: Folded, alpha: float, base: Base | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if adapter.backbone != "unet":
        raise UserError(f"kohya's names are those of U-Nets, not of {adapter.name!r}; write it as diffusers or peft")
    two_towers = "text_encoder_2" in adapter.text_encoders or (base is not None and base.has_two_towers)
    prefixes = {BACKBONE: "lora_unet", "text_encoder": "lora_te1" if two_towers else "lora_te"}
    prefixes["text_encoder_2"] = "lora_te2"
    tensors: dict[str, Tensor] = {}
    for (component, module), (down, up) in folded.items():
        if component not in prefixes:
            raise UserError(f"kohya has no names for {component} of {adapter.name!r}; write it as diffusers")
        if component != BACKBONE:
            spelled = with_text_model(module)
        else:
            # Two towers mean SDXL, which kohya trains under the names of the original checkpoint.
            spelled = base.original.get(module, module) if base is not None and two_towers else module
        name = f"{prefixes[component]}_{underscored(spelled)}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": _with_kernel(up, down)}
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))  # narrower types do not hold every rank
    rank = next(iter(folded.values()))[0].shape[0]
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)}
    return tensors, metadata | {"ss_network_alpha": str(float(alpha))}


def _lora_config(changes: Mapping[str, LowRank], rank: int, alpha: float) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        # Matched by how names end: without the level that CLIP has in some versions of transformers, they fit in all.
        "target_modules": sorted(module.removeprefix("text_model.") for module in changes),
    }


def _peft_config(changes: Mapping[str, LowRank], rank: int, alpha: float) -> dict[str, object]:
    return {
        **_lora_config(changes, rank, alpha),
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }


def _with_kernel(up: Tensor, down: Tensor) -> Tensor:
    """Returns `up` with the sides of the 1x1 convolution that follows a convolution to the rank."""
    return up.reshape(*up.shape, *(1 for _ in down.shape[2:]))


def _packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file; the same tensors always give the same bytes.

    The library writes metadata in random order, so it is put in afterwards.
    """
    data = serialize({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": {"format": "pt", **metadata}, **json.loads(data[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
