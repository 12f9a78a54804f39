"""Collecting rows of features over batches and processes, for metrics that compare pairs of rows."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from diffcore.stats import ExactMetric, in_one_precision, require_finite


def gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Returns the rows of every process, in order of rank; a process may have none.

    For `dist_sync_fn` of `torchmetrics.Metric`, whose own function aborts where a process brings no rows: an empty list
    of rows arrives there, and here, as a vector without entries, whatever the width and type of the others'.
    """
    shapes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(shapes, (tuple(rows.shape), rows.dtype), group)
    filled = [found for found in shapes if found[0] != (0,)]
    if filled:
        width, dtype = filled[0][0][1:], reduce(torch.promote_types, (dtype for _, dtype in filled))
        rows = rows.to(dtype) if tuple(rows.shape) != (0,) else rows.new_empty((0, *width), dtype=dtype)
    return gather_all_tensors(rows, group)


class RealAndFake(ExactMetric):
    """The base of metrics that compare two sets of features row by row; it keeps all rows of both.

    Args:
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_rows} | options)
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "b d"], real: bool) -> None:
        """Adds features of real or of generated images.

        Raises:
            ValueError: Rows hold NaN or infinity; they are named.
        """
        side = self.real if real else self.fake
        require_finite("real features" if real else "fake features", features, sum(map(len, side)))
        side.append(*in_one_precision(features.detach()))

    def both(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
        """Returns all rows seen, real and fake, in one precision; inside `compute`, those of all processes.

        Raises:
            ValueError: A side has no rows.
        """
        real, fake = in_one_precision(_rows("real", self.real), _rows("fake", self.fake))
        return real, fake


def _rows(name: str, kept: Sequence[Tensor] | Tensor) -> Tensor:
    if not len(kept):
        raise ValueError(f"{name} has 0 rows; update with both real and fake features")
    return dim_zero_cat(kept if isinstance(kept, Tensor) else list(kept))
