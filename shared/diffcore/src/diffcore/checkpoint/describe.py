"""A description of a model in plain values, made before anything is loaded. Imports no torch."""

import math
from collections.abc import Sequence
from typing import Any

from diffcore.checkpoint.fingerprint import fingerprint
from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.io.tensorfile import TensorHeader


def describe(inventory: Inventory) -> dict[str, Any]:
    """Returns kind, sizes, fingerprint and warnings of a checked model, and a row per component."""
    return {
        "name": inventory.path.resolve().name,
        "layout": inventory.layout,
        "class": inventory.class_name,
        "safe_to_load": True,
        "parameters": _parameters(inventory.headers),
        "megabytes": round(inventory.num_bytes / 1e6, 3),
        "tensors": inventory.num_tensors,
        "precision": _precision(inventory.headers),
        "fingerprint": fingerprint(inventory),
        "warnings": list(inventory.warnings),
        "components": [_row(component) for component in inventory.components.values()],
    }


def _row(component: Component) -> dict[str, Any]:
    headers = component.weights
    return {
        "component": component.name,
        "role": component.role,
        "class": component.class_name,
        "parameters": _parameters(headers) or None,
        "megabytes": round(sum(header.size for header in headers) / 1e6, 3) or None,
        "precision": _precision(headers),
        "files": len(headers) or len(component.files) or None,
        "variant": component.variant,
    }


def _parameters(headers: Sequence[TensorHeader]) -> int:
    return sum(math.prod(entry.shape) for header in headers for entry in header.tensors.values())


def _precision(headers: Sequence[TensorHeader]) -> str:
    return ", ".join(sorted({entry.dtype for header in headers for entry in header.tensors.values()}))
