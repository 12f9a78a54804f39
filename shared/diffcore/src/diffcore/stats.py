"""Streaming means, variances and covariances, exact over batches and processes.

Sums of squares around zero lose what small variances need: on data of 30 ± 0.1 raw float32 sums are wrong by a tenth.
So each state is (count, mean, sum of squared deviations) in float64, and two of them merge exactly.

References:
    The merge: Chan, Golub and LeVeque 1983, equation 1.5.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torchmetrics import Metric


class Moments(NamedTuple):
    """Number of rows, mean and variance per column; the variance divides by num_rows - 1, and is NaN below two rows."""

    num_rows: Float64[Tensor, ""]
    mean: Float64[Tensor, " d"]
    var: Float64[Tensor, " d"]


class Covariance(NamedTuple):
    """Number of rows, mean and covariance; the covariance divides by num_rows - 1, and is NaN below two rows."""

    num_rows: Float64[Tensor, ""]
    mean: Float64[Tensor, " d"]
    cov: Float64[Tensor, "d d"]


class ExactMetric(Metric):
    """A metric whose states keep their precision when a module that holds it is cast, as trainers cast networks.

    Sums and counts in bfloat16 stop growing after some hundred rows, and torchmetrics leaves states alone only where
    the cast is spelled `half()` or `bfloat16()`, not `to(torch.bfloat16)`. Moves to another device are followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


class _Running(ExactMetric):
    """The base of both metrics: their states, the exact merge, and the reduction over processes."""

    full_state_update = True
    num_rows: Tensor
    mean: Tensor
    deviations: Tensor

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        # No reduction: states arrive stacked over ranks and are merged when read.
        self.add_state("num_rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(shape[-1], dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("deviations", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=None)

    def _add(self, count: Tensor, mean: Tensor, deviations: Tensor) -> None:
        self.num_rows, self.mean, self.deviations = _merge(
            (self.num_rows, self.mean, self.deviations), (count, mean, deviations)
        )

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.num_rows.ndim == 0:
            return self.num_rows, self.mean, self.deviations
        first, *others = zip(self.num_rows, self.mean, self.deviations, strict=True)
        for other in others:
            first = _merge(first, other)
        return first


class RunningMoments(_Running):
    """Mean and variance per column. `compute` returns `Moments`.

    Args:
        num_features: Number of columns of the rows.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__((num_features,), **options)

    def update(self, x: Float[Tensor, "b d"]) -> None:
        """Adds rows; no rows change nothing."""
        if len(x):
            rows, mean = _centred(x, self.mean)
            self._add(self.num_rows.new_tensor(float(len(x))), mean, rows.square().sum(0))

    def compute(self) -> Moments:
        """Returns the moments of all rows seen, over all processes."""
        count, mean, deviations = self._merged()
        return Moments(count, mean, _normalised(deviations, count))


class RunningCovariance(_Running):
    """Mean and covariance of rows. `compute` returns `Covariance`.

    Args:
        num_features: Number of columns of the rows; the state holds its square.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__((num_features, num_features), **options)

    def update(self, x: Float[Tensor, "b d"]) -> None:
        """Adds rows; no rows change nothing."""
        if len(x):
            rows, mean = _centred(x, self.mean)
            self._add(self.num_rows.new_tensor(float(len(x))), mean, rows.T @ rows)

    def compute(self) -> Covariance:
        """Returns the moments of all rows seen, over all processes."""
        count, mean, deviations = self._merged()
        return Covariance(count, mean, _normalised(deviations, count))


def covariance(x: Float[Tensor, "b d"]) -> Covariance:
    """Returns the moments of rows that are all at hand, in float64."""
    rows, mean = _centred(x, torch.empty(x.shape[1], dtype=torch.float64, device=x.device))
    count = mean.new_tensor(float(len(x)))
    return Covariance(count, mean, _normalised(rows.T @ rows, count))


def in_one_precision(*tensors: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], ...]:
    """Returns tensors in their widest type, float32 at least: statistics in half precision lose all their digits."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def require_finite(name: str, x: Float[Tensor, "b ..."], first_row: int = 0) -> None:
    """Raises a `ValueError` that names the rows with NaN or infinity; decisions are made on finite numbers only.

    Args:
        name: Name of the tensor in the message.
        x: One item per row. Reading it waits for the device, so once per batch is enough.
        first_row: Index of the first row over the whole data set.
    """
    bad = (~torch.isfinite(x.flatten(1)).all(1)).nonzero().flatten()
    if len(bad):
        shown = ", ".join(str(first_row + int(row)) for row in bad[:10]) + (", …" if len(bad) > 10 else "")
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(x)} rows: {shown}; leave them out")


def _centred(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] != like.shape[-1]:
        raise ValueError(f"x has {x.shape[1]} columns; {like.shape[-1]} were announced")
    x = x.detach().to(like.device, torch.float64)
    mean = x.mean(0)
    return x - mean, mean


def _merge(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    count = a[0] + b[0]
    step = b[1] - a[1]
    share = b[0] / count.clamp(min=1)
    spread = torch.outer(step, step) if a[2].ndim == 2 else step.square()
    return count, a[1] + step * share, a[2] + b[2] + spread * (a[0] * share)


def _normalised(deviations: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 1, deviations / (count - 1).clamp(min=1), torch.nan)
