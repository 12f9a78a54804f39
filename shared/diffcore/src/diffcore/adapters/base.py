"""The weights that an adapter can change: their names and shapes in a model, and their spellings in adapter files.

Imports no torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from diffcore.adapters.keys import BACKBONE, T5

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Base:
    """The linear and convolutional weights of a model, by component and dotted module name.

    Attributes:
        name: The model's name in error messages.
        backbone: Name of the backbone in the pipeline, "unet" or "transformer".
        shapes: Shapes of the weights: {"backbone": {module: shape}, "text_encoder": ...}.
        original: The backbone's modules in the names of original checkpoints, which kohya's SDXL files use; empty where
            there are none.
    """

    name: str
    backbone: Literal["unet", "transformer"]
    shapes: Mapping[str, Mapping[str, Shape]]
    original: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_two_towers(self) -> bool:
        """Whether prompts go through two text encoders, as in SDXL: kohya's names then differ."""
        return "text_encoder_2" in self.shapes

    def component(self, named: str) -> str:
        """Returns the component that a file names, by its place in the pipeline or by its kind (clip_l, t5xxl)."""
        return self._by_kind.get(named, named)

    def find(self, component: str, spelled: str) -> str | None:
        """Returns the module that a spelling stands for; None if there is none, or more than one."""
        return self._aliases.get(self.component(component), {}).get(spelled)

    def unread_prefix(self, spelled: str) -> str | None:
        """Returns the unknown prefix that a spelling puts before the name of a module; None if it has none."""
        if any(self.find(component, spelled) for component in self.shapes):
            return None
        starts = [match.end() for match in re.finditer(r"[._]", spelled)][:-3]  # three words at least are no chance
        fitting = (start for start in starts if any(self.find(component, spelled[start:]) for component in self.shapes))
        return next((spelled[:start] for start in fitting), None)

    def nearest(self, component: str, spelled: str) -> str | None:
        """Returns the module whose name begins and ends most like a spelling that fits none."""
        spelled = underscored(spelled)
        names = [alias for alias, module in self._aliases.get(self.component(component), {}).items() if module]
        if not names:
            return None
        return self.find(component, max(names, key=lambda alias: _in_common(underscored(alias), spelled)))

    @cached_property
    def _by_kind(self) -> dict[str, str]:
        texts = sorted(component for component in self.shapes if component != BACKBONE)
        t5 = next((c for c in texts if any("SelfAttention" in module for module in self.shapes[c])), None)
        clips = [component for component in texts if component != t5]
        kinds = {T5: t5, "clip_l": clips[0], "clip_h": clips[0]} if clips else {T5: t5}
        if "text_encoder_2" in clips:
            kinds["clip_g"] = "text_encoder_2"
        return {kind: component for kind, component in kinds.items() if component is not None}

    @cached_property
    def _aliases(self) -> dict[str, dict[str, str | None]]:
        return {component: self._aliases_of(component) for component in self.shapes}

    def _aliases_of(self, component: str) -> dict[str, str | None]:
        modules = self.shapes[component]
        aliases: dict[str, str | None] = {name: name for name in modules}
        for spelling in self._spellings(component):
            level: dict[str, str | None] = {}
            for alias, name in spelling:
                # Two modules under one spelling: neither is meant for sure.
                level[alias] = name if level.get(alias, name) == name else None
            aliases = level | aliases  # exact names win
        return aliases

    def _spellings(self, component: str) -> Iterator[list[tuple[str, str]]]:
        modules = self.shapes[component]
        yield [(underscored(name), name) for name in modules]
        if component == BACKBONE:
            yield [(alias, name) for name, alias in self.original.items()]
            yield [(underscored(alias), name) for name, alias in self.original.items()]
        else:
            yield [(_other_level(name), name) for name in modules]
            yield [(underscored(_other_level(name)), name) for name in modules]


def underscored(name: str) -> str:
    """Returns a module's name as kohya writes it."""
    return name.replace(".", "_")


def with_text_model(name: str) -> str:
    """Returns a CLIP module's name with the level `text_model`, which files have and newer transformers dropped."""
    return f"text_model.{name}" if name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else name


def _in_common(one: str, other: str) -> int:
    return _alike(one, other) + _alike(one[::-1], other[::-1])


def _alike(one: str, other: str) -> int:
    """Returns the length of the prefix that two names share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _other_level(name: str) -> str:
    return name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
