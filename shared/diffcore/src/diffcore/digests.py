"""Digests of values and tensors: they tell whether two results rest on the same things. Imports no torch."""

import hashlib
import json
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def digest_of(item: Hashable) -> str:
    """Returns 16 letters that name an item in files: of a string its own digest, else that of its `repr`."""
    text = item if isinstance(item, str) else repr(item)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def digest_of_values(values: Any) -> str:
    """Returns the sha256 of plain values, the same in whatever order their keys stand.

    Args:
        values: Lists, mappings, strings, numbers and None; of anything else its `str`.

    Example:
        >>> digest_of_values({"a": 1, "b": [2.5]}) == digest_of_values({"b": [2.5], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def add_tensors(digest: "hashlib._Hash", tensors: "Mapping[str, Tensor]") -> None:
    """Adds names, precisions, shapes and bytes of tensors to a digest, in their order.

    Args:
        digest: Digest such as `hashlib.sha256()`.
        tensors: Tensors by name, such as a state dict, on any device.
    """
    import torch

    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
