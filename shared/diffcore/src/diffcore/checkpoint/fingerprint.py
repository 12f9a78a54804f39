"""What tells two models apart: configurations, tensor headers, and samples of the weights themselves.

Headers alone cannot tell two fine-tunes of one model apart. Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.io import files
from diffcore.io.tensorfile import TensorHeader

NUM_BLOCKS = 8
BLOCK_BYTES = 64 * 2**10


def fingerprint(inventory: Inventory, components: Mapping[str, Component] | None = None) -> str:
    """Returns the hex digest of a model: the same for a copy elsewhere, another for a fine-tune.

    Args:
        inventory: Of the gate.
        components: What the model is built from, where the inventory of a single file does not say.
    """
    digest = hashlib.sha256()
    for name, component in sorted((components or inventory.components).items()):
        _add(digest, name, [component.class_name, dict(component.config)])
        for header in component.weights:
            _add_weights(digest, header)
        for path in (*component.files, *component.pickles):
            _add(digest, path.name, files.sha256(path))
        if component.added:
            _add(digest, "added", [token.to_json() for token in component.added])
    if inventory.header is not None:
        _add_weights(digest, inventory.header)
    if inventory.layout == "pickle":
        _add(digest, inventory.path.suffix, files.sha256(inventory.path))
    _add(digest, "settings", dict(inventory.settings))
    return digest.hexdigest()


def _add_weights(digest: Any, header: TensorHeader) -> None:
    tensors = sorted((name, entry.dtype, entry.shape) for name, entry in header.tensors.items())
    _add(digest, "tensors", tensors)
    for block in _blocks(header.path, header.data_start, header.size):
        digest.update(block)


def _blocks(path: Path, start: int, size: int) -> Iterable[bytes]:
    """Yields blocks at fixed fractions of a file's data, the first and the last bytes among them."""
    last = max(size - BLOCK_BYTES, start)
    with files.explained(path, reading=True), path.open("rb") as file:
        for index in range(NUM_BLOCKS):
            file.seek(start + (last - start) * index // (NUM_BLOCKS - 1))
            yield file.read(BLOCK_BYTES)


def _add(digest: Any, key: str, value: Any) -> None:
    digest.update(json.dumps([key, value], sort_keys=True).encode() + b"\n")
