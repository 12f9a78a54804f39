"""Fingerprints of models: digests of configurations, tensor headers, and samples of the weights themselves.

Headers alone cannot tell two fine-tunes of one model apart. Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.io import files
from diffcore.io.tensorfile import TensorHeader

NUM_BLOCKS = 8
BLOCK_BYTES = 64 * 2**10
# safetensors' names of the kinds of numbers; it writes the tensors of later kinds first.
_KINDS = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.int16": "I16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.int64": "I64",
}
_ORDER = list(_KINDS.values())


def fingerprint(inventory: Inventory, components: Mapping[str, Component] | None = None) -> str:
    """Returns the hex digest of a model: the same for a copy elsewhere, another for a fine-tune.

    Args:
        inventory: The checked content of a folder or file, as `inspect_model` returns it.
        components: Parts that the model is built from, where the inventory of a single file does not list them.
    """
    digest = hashlib.sha256()
    for name, component in sorted((components or inventory.components).items()):
        _add(digest, name, [component.class_name, dict(component.config)])
        for header in component.weights:
            _add_weights(digest, header)
        _add_files(digest, component)
    if inventory.header is not None:
        _add_weights(digest, inventory.header)
    if inventory.layout == "pickle":
        _add(digest, inventory.path.suffix, files.sha256(inventory.path))
    _add(digest, "settings", dict(inventory.settings))
    return digest.hexdigest()


def fingerprint_of_modules(
    components: Mapping[str, Component], modules: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    """Returns the fingerprint that a pipeline in memory would have, if the libraries saved it in its own precision.

    Networks so large that the libraries would save them in several files get another fingerprint.

    Args:
        components: Descriptions of the pipeline's parts, with the vocabulary files of its tokenizers.
        modules: The parts themselves, by the same names.
        settings: Scalar settings of the pipeline.
    """
    digest = hashlib.sha256()
    for name, component in sorted(components.items()):
        _add(digest, name, [component.class_name, dict(component.config)])
        if hasattr(modules[name], "state_dict"):
            _add_tensors(digest, modules[name].state_dict())
        _add_files(digest, component)
    _add(digest, "settings", dict(settings))
    return digest.hexdigest()


def _add_files(digest: Any, component: Component) -> None:
    for path in (*component.files, *component.pickles):
        _add(digest, path.name, files.sha256(path))
    if component.added:
        _add(digest, "added", [token.to_json() for token in component.added])


def _add_tensors(digest: Any, state: Mapping[str, Any]) -> None:
    """Adds tensors in memory as `_add_weights` adds those of the file that they would be saved to."""
    named = {state[name].data_ptr(): name for name in reversed(list(state))}  # tied weights are saved once
    kinds = {name: _KINDS[str(state[name].dtype)] for name in named.values()}
    _add(digest, "tensors", sorted((name, kind, tuple(state[name].shape)) for name, kind in kinds.items()))
    order = sorted(kinds, key=lambda name: (-_ORDER.index(kinds[name]), name))
    tensors = [state[name].detach().flatten() for name in order]
    ends = list(accumulate(tensor.nbytes for tensor in tensors))
    for start in _starts(0, ends[-1] if ends else 0):
        for tensor, end in zip(tensors, ends, strict=True):
            offset = start - (end - tensor.nbytes)
            if start < end and offset + BLOCK_BYTES > 0:
                digest.update(_bytes_of(tensor, max(offset, 0), offset + BLOCK_BYTES))


def _bytes_of(tensor: Any, start: int, stop: int) -> bytes:
    """Returns some bytes of a flat tensor; only the numbers that hold them leave the device."""
    import torch

    size = tensor.itemsize
    first = start // size
    numbers = tensor[first : -(-stop // size)].cpu().view(torch.uint8).numpy().tobytes()
    return numbers[start - first * size : stop - first * size]


def _add_weights(digest: Any, header: TensorHeader) -> None:
    tensors = sorted((name, entry.dtype, entry.shape) for name, entry in header.tensors.items())
    _add(digest, "tensors", tensors)
    for block in _blocks(header.path, header.data_start, header.size):
        digest.update(block)


def _blocks(path: Path, start: int, size: int) -> Iterable[bytes]:
    """Yields blocks at fixed fractions of a file's data, the first and the last bytes among them."""
    with files.explained(path, reading=True), path.open("rb") as file:
        for position in _starts(start, size):
            file.seek(position)
            yield file.read(BLOCK_BYTES)


def _starts(start: int, size: int) -> Iterable[int]:
    last = max(size - BLOCK_BYTES, start)
    return (start + (last - start) * index // (NUM_BLOCKS - 1) for index in range(NUM_BLOCKS))


def _add(digest: Any, key: str, value: Any) -> None:
    digest.update(json.dumps([key, value], sort_keys=True).encode() + b"\n")
