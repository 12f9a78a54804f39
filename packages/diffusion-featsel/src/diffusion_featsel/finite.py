"""Numbers that are not finite: which activation has them, found with one synchronisation for a whole pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffcore.errors import UserError


class NonFiniteError(UserError):
    """Activations hold infinity or NaN.

    Attributes:
        names: Names of these activations, in the order in which they were given.
        rows: Rows of the batch, from 0, where any of them does.
    """

    def __init__(self, message: str, names: Sequence[str], rows: Sequence[int]) -> None:
        super().__init__(message)
        self.names = tuple(names)
        self.rows = tuple(rows)


def require_finite(found: Mapping[str, Tensor]) -> None:
    """Raises where a tensor has a number that is not finite; the device is waited for once, at the end.

    Args:
        found: Activations by name in the order of execution, with one row per image.

    Raises:
        NonFiniteError: There is such a number; the first activation that has one is named.

    Example:
        >>> require_finite({"mid-vit-out": torch.tensor([[1.0, 2.0], [torch.inf, 0.0]])})
        Traceback (most recent call last):
        diffusion_featsel.finite.NonFiniteError: mid-vit-out is infinite in row 1 ...
    """
    floating = {name: value for name, value in found.items() if value.is_floating_point() and value.numel()}
    if not floating:
        return
    counts = {value.shape[0] if value.ndim else 0 for value in floating.values()}
    # Maps have one row per image; other things, such as sums over a batch, are looked at as a whole.
    whole = len(counts) > 1 or 0 in counts
    device = next(iter(floating.values())).device
    flags = torch.stack([_are_finite(value, whole=whole).to(device) for value in floating.values()])
    if bool(flags.all()):
        return
    good = flags.cpu()
    names = [name for name, fine in zip(floating, good, strict=True) if not fine.all()]
    rows = [] if whole else [row for row in range(good.shape[1]) if not good[:, row].all()]
    raise NonFiniteError(_explain(names, rows, floating[names[0]]), names, rows)


def _are_finite(value: Tensor, *, whole: bool) -> Tensor:
    """Returns whether each row is finite, by its extremes: they are finite exactly if all numbers are."""
    low, high = torch.aminmax(value.reshape(1 if whole else len(value), -1), dim=1)
    return low.isfinite() & high.isfinite()


def _explain(names: Sequence[str], rows: Sequence[int], first: Tensor) -> str:
    is_nan = bool(first.isnan().any())
    what = "not a number (NaN)" if is_nan else "infinite"
    where = f" in row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:10]))}" if rows else ""
    others = f", and so are {len(names) - 1} after it" if len(names) > 1 else ""
    precision = str(first.dtype).removeprefix("torch.")
    advice = "load the model in bfloat16 or float32" if first.dtype == torch.float16 else "leave these images out"
    return f"{names[0]} is {what}{where} (precision {precision}){others}; {advice}"
