"""Rank and strength in a PEFT configuration, read by rules and never evaluated. Imports no torch.

PEFT takes names of modules for regular expressions and names of libraries for modules to import. Here the modules come
from the tensors' names; of the configuration only plain numbers and names are used. A name may be anchored, as
diffusers writes it since 2025: `^name` means this module alone, not every module whose name ends in it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffcore.errors import printable
from diffcore.io.strictjson import StrictError

MAX_RANK = 4096
MAX_ALPHA = 65_536

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.-]{1,512}")
_USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path"}
_OF_TRAINING = {  # nothing in them changes what the tensors mean
    "auto_mapping",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other ways to begin (PiSSA, OLoRA, LoftQ, CorDA) change the base weights as well, which the file does not hold.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "megatron_core": ("megatron.core",),
}


@dataclass(frozen=True)
class Settings:
    """Ranks and strengths of one network's adapter.

    Attributes:
        rank: Rank of the modules that no pattern in `ranks` matches.
        alpha: Alpha of the modules that no pattern in `alphas` matches.
        ranks: Ranks by the end of a module's name or, with `^` before it, by the whole name.
        alphas: Alphas by the name of a module, or by its end.
        root_scaled: Whether the strength is alpha / sqrt(rank) (rsLoRA) instead of alpha / rank.
        base_model: The base model that the file names; it is shown, never opened.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    root_scaled: bool = False
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        """Returns the rank that the configuration gives a module."""
        return _matching(self.ranks, module, self.rank)

    def alpha_of(self, module: str, rank: int) -> float:
        """Returns the alpha of a module whose strength is alpha / rank."""
        return _matching(self.alphas, module, self.alpha) * (math.sqrt(rank) if self.root_scaled else 1)


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Returns the settings of a PEFT configuration.

    Raises:
        StrictError: The configuration is of another method than LoRA, is not supported, or holds impossible numbers.
    """
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise StrictError(f"has peft_type {printable(kind)}, which is not supported; only LoRA is read")
    if "r" not in values or "lora_alpha" not in values:
        raise StrictError("does not say r and lora_alpha")
    for name, value in values.items():
        if name not in _USED | _OF_TRAINING and not _is_default(name, value):
            raise StrictError(f"sets {printable(name)} to {printable(value, 40)}, which is not supported")
    if not isinstance(values.get("use_rslora", False), bool | None):
        raise StrictError(f"sets use_rslora to {printable(values['use_rslora'], 40)}, which is neither true nor false")
    base = values.get("base_model_name_or_path")
    return Settings(
        rank=checked_rank(values["r"], "r"),
        alpha=checked_alpha(values["lora_alpha"], "lora_alpha"),
        ranks={n: checked_rank(v, f"rank_pattern of {n}") for n, v in _pattern(values, "rank_pattern").items()},
        alphas={n: checked_alpha(v, f"alpha_pattern of {n}") for n, v in _pattern(values, "alpha_pattern").items()},
        root_scaled=bool(values.get("use_rslora")),
        base_model=base if isinstance(base, str) else None,
    )


def checked_rank(value: Any, what: str) -> int:
    """Returns a rank; raises StrictError unless it is a whole number from 1 to 4096."""
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise StrictError(f"has {what} = {printable(value, 40)}; ranks are whole numbers from 1 to {MAX_RANK}")
    return value


def checked_alpha(value: Any, what: str) -> float:
    """Returns an alpha; raises StrictError unless it is above 0 and at most 65 536.

    An alpha of 0 means "no effect" to some tools and "alpha = rank" to others. No trainer writes one below 0: such a
    file is damaged or made by hand, and would reverse the effect of the adapter.
    """
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:  # not a number fails as well
        raise StrictError(
            f"has {what} = {printable(value, 40)}; alphas are above 0 and at most {MAX_ALPHA}, a negative strength is "
            "asked for by the scale"
        )
    return float(value)


def _pattern(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, dict):
        raise StrictError(f"has a {name} that is no object")
    plain: dict[str, Any] = {}
    for key, value in pattern.items():
        unescaped = re.sub(r"\\([._-])", r"\1", key).removesuffix("$")
        if not _PLAIN.fullmatch(unescaped):
            raise StrictError(f"has a {name} for {printable(key)!r}; only plain names of modules are read")
        plain.setdefault(unescaped, value)
    return plain


def _is_default(name: str, value: Any) -> bool:
    return value in (None, False, "") or value == [] or value == {} or value in _DEFAULTS.get(name, ())


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    # The first that fits wins, as in PEFT.
    return next((value for name, value in pattern.items() if _fits(name, module)), default)


def _fits(name: str, module: str) -> bool:
    # A level of CLIP that some versions of transformers have, and files with or without.
    whole, module = name.removeprefix("^").removeprefix("text_model."), module.removeprefix("text_model.")
    return module == whole or (not name.startswith("^") and module.endswith(f".{whole}"))
