"""The base model of a population or space in plain values, so that adapters are read without the model at hand."""

from collections.abc import Mapping
from typing import Any

from diffcore.adapters import Base
from diffcore.adapters.keys import BACKBONE
from w2w_space.layout import Layout


def base_to_json(base: Base) -> dict[str, Any]:
    """Returns names and shapes of a model's weights as plain values.

    Args:
        base: Weights that adapters can change.
    """
    shapes = {component: {name: list(s) for name, s in modules.items()} for component, modules in base.shapes.items()}
    return {"name": base.name, "backbone": base.backbone, "shapes": shapes, "original": dict(base.original)}


def base_from_json(values: Mapping[str, Any]) -> Base:
    """Returns the base that `base_to_json` wrote.

    Args:
        values: Plain values of a file of ours.
    """
    shapes = {
        component: {name: tuple(int(side) for side in shape) for name, shape in modules.items()}
        for component, modules in values["shapes"].items()
    }
    return Base(values["name"], values["backbone"], shapes, dict(values["original"]))


def base_of_layout(layout: Layout, name: str = "the space") -> Base:
    """Returns a base that knows the modules of a layout alone: enough for adapters that change no others.

    Args:
        layout: Table of the vectors.
        name: Name of the base in messages.
    """
    return Base(name, layout.backbone, {BACKBONE: dict(zip(layout.modules, layout.shapes, strict=True))})
