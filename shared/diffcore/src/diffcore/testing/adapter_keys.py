"""Names of tensors in published LoRA files, expanded from patterns."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffcore.adapters import Base
from diffcore.adapters.keys import parse_key
from diffcore.testing import real_configs

FOLDER = Path(real_configs.__file__).parent / "adapters"


def published(name: str) -> dict[str, Any]:
    """Returns a listing of `real_configs/adapters`, with `keys`: every tensor's name."""
    listing = json.loads((FOLDER / f"{name}.json").read_text())
    modules = [module for pattern in listing["modules"] for module in expanded(pattern)]
    return listing | {"keys": [module + part for module in modules for part in listing["parts"]]}


def expanded(pattern: str) -> list[str]:
    """Returns the names that a pattern stands for: `{a,b}` is one of several, `{0..9}` one of a range; both nest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    found = [name for choice in _choices(match[1]) for name in expanded(head + choice + tail)]
    return list(dict.fromkeys(found))  # an inner choice leaves the outer ones beside it repeated


def _choices(text: str) -> Iterator[str]:
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        yield from map(str, range(int(span[1]), int(span[2]) + 1))
    else:
        yield from text.split(",")


def fitting_shapes(keys: list[str], base: Base, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor, from the layer that it changes.

    Raises:
        KeyError: A name belongs to no layer.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in keys:
        key = parse_key(text)
        module = base.find(key.component, key.module)
        if module is None:
            raise KeyError(text)
        outputs, *inputs = base.shapes[base.component(key.component)][module]
        kernel = [1 for _ in inputs[1:]]
        shapes[text] = {"down": (rank, *inputs), "up": (outputs, rank, *kernel), "alpha": ()}[key.part]
    return shapes


def write_hollow(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    """Writes a sparse safetensors file of these shapes in float16, whose data takes no disk space."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
