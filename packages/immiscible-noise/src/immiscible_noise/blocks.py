"""Which rows of a batch may exchange noise: those with equal labels.

Within a block of equal labels the noise stays an untouched independent sample, so the noise a class sees in training
is the noise that sampling draws for it. Across labels an assignment would leak the class into the noise.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

Labels = Tensor | np.ndarray | Sequence[Hashable]


def label_table(labels: Labels, num_rows: int) -> Int[Tensor, "b m"]:
    """Returns integers whose rows are equal exactly where labels are equal; a tensor of labels keeps its device.

    Raises:
        ValueError: The number of labels is not ``num_rows``, or labels cannot be compared exactly.
    """
    if len(labels) != num_rows:
        raise ValueError(
            f"labels has {len(labels)} rows but x has {num_rows}: row {min(len(labels), num_rows)} has no partner"
        )
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(labels) if labels.dtype.kind in "iufb" else labels.tolist()
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels is {labels.dtype}; give integers, or a sequence of hashable values")
        return labels.detach().reshape(num_rows, math.prod(labels.shape[1:])).long()
    code_of: dict[Hashable, int] = {}
    codes = [code_of.setdefault(_hashable(label, i), len(code_of)) for i, label in enumerate(labels)]
    return torch.tensor(codes, dtype=torch.int64)[:, None]


def same_block(table: Int[Tensor, "b m"]) -> Bool[Tensor, "b b"]:
    """Tells for every pair of rows whether their labels are equal."""
    return (table[:, None] == table[None]).all(-1)


def split_blocks(table: Int[np.ndarray, "b m"]) -> list[Int[np.ndarray, "n"]]:
    """Returns the row indices of each block, ascending."""
    codes = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _hashable(label: Hashable, row: int) -> Hashable:
    # A tensor hashes by identity, so that equal labels would silently differ.
    if isinstance(label, Tensor):
        raise ValueError(f"labels[{row}] is a tensor inside a sequence; stack the labels into one tensor")
    try:
        hash(label)
    except TypeError:
        raise ValueError(f"labels[{row}] is a {type(label).__name__}, which cannot be hashed; give a tuple") from None
    return label
