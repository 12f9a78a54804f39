"""Gradient accumulation: the micro-batches of one optimizer step exchange their noises as one batch would."""

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from .assign import Options, assign_noise
from .batch import check_pair


def assign_accumulated(
    micro_batches: Sequence[Float[Tensor, "_ *data"]],
    noises: Sequence[Float[Tensor, "_ *data"]],
    *,
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> list[Float[Tensor, "_ *data"]]:
    """Returns the noise of each micro-batch out of one assignment over all of them.

    The same as `assign_noise` of the concatenated micro-batches, whose sizes may differ, split again.

    Args:
        micro_batches: Clean micro-batches of one optimizer step, as the diffusion sees them.
        noises: Independent Gaussian noise of the shape of each.
        generator: Source of the choice of rows, for `strength` between 0 and 1.
        **options: Keyword arguments of `assign_noise`; `labels` and `mask` go on over the micro-batches, one after
            another.

    Raises:
        ValueError: The numbers of micro-batches and noises differ, the shapes of a pair differ, or `assign_noise`
            refuses; it counts the rows through all micro-batches.

    Example:
        >>> micro_batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
        >>> noises = assign_accumulated(micro_batches, [torch.randn_like(x) for x in micro_batches])
        >>> [tuple(noise.shape) for noise in noises[:2]]
        [(4, 3, 8, 8), (4, 3, 8, 8)]
    """
    if len(micro_batches) != len(noises):
        raise ValueError(f"there are {len(micro_batches)} micro-batches but {len(noises)} noises; give one for each")
    for place, (x, noise) in enumerate(zip(micro_batches, noises, strict=True)):
        try:
            check_pair(x, noise)
        except (TypeError, ValueError) as error:
            error.add_note(f"in micro-batch {place}")
            raise
        if x.shape[1:] != micro_batches[0].shape[1:]:
            raise ValueError(
                f"micro-batch {place} has rows of shape {list(x.shape[1:])}, the first of "
                f"{list(micro_batches[0].shape[1:])}; noise is exchanged only between equal shapes"
            )
    if not micro_batches:
        return []
    x, noise = (torch.cat([*parts]) if len(parts) > 1 else parts[0] for parts in (micro_batches, noises))
    assigned = assign_noise(x, noise, generator=generator, **options)
    return [*assigned.split([len(x) for x in micro_batches])]
