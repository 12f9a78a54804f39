"""What an adapter can change: names and shapes of a model's weights, and the spellings under which files know them.

Imports no torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from diffcore.adapters.keys import BACKBONE

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Base:
    """The linear and convolutional weights of a model, by component and dotted module name.

    Attributes:
        name: For messages.
        backbone: What its pipeline calls the backbone.
        shapes: Of the weights: {"backbone": {module: shape}, "text_encoder": ...}.
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

    def find(self, component: str, spelled: str) -> str | None:
        """Returns the module that a file means, or None if there is none, or more than one."""
        return self._aliases.get(component, {}).get(spelled)

    def nearest(self, component: str, spelled: str) -> str | None:
        """Returns the module whose name begins and ends most like a spelling that fits none."""
        spelled = underscored(spelled)
        names = [alias for alias, module in self._aliases.get(component, {}).items() if module]
        if not names:
            return None
        return self.find(component, max(names, key=lambda alias: _in_common(underscored(alias), spelled)))

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
    """Returns a CLIP module's name as files have it: with the level that newer versions of transformers dropped."""
    return f"text_model.{name}" if name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else name


def _in_common(one: str, other: str) -> int:
    return _alike(one, other) + _alike(one[::-1], other[::-1])


def _alike(one: str, other: str) -> int:
    """Returns with how many equal characters two names begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _other_level(name: str) -> str:
    return name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
