"""A check for every metric: its value equals the reference in whatever batches and order the rows arrive."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from diffcore.testing.distributed import run_forked

Batch = tuple[Any, ...]


def check_metric(
    make: Callable[[], Metric],
    batches: Sequence[Batch],
    reference: Any,
    *,
    atol: float,
    half_atol: float | None = None,
) -> None:
    """Checks that a metric equals its reference in all the ways its rows can arrive.

    The ways: as given; in small pieces; rows and batches in another order; on two processes with unequal shares, and
    with one share empty; in float64 and float16. `reset`, pickling half-way, a second `compute` and casts of a module
    that holds the metric change nothing.

    Args:
        make: Returns a fresh metric.
        batches: Positional arguments of `update`, a tuple per call; tensors in it share their first dimension.
        reference: The value of all batches, in the structure that `compute` returns: numbers, tensors, tuples.
        atol: Largest absolute difference that is allowed.
        half_atol: Largest absolute difference with inputs rounded to float16; None where the metric refuses them.

    Raises:
        AssertionError: A value differs; the message names the way.
    """

    def expect(way: str, value: Any, tolerance: float = atol) -> None:
        named = f"{type(metric).__name__}, {way}"
        found, wanted = _numbers(value), _numbers(reference)
        assert found.shape == wanted.shape, f"{named}: {len(found)} numbers where {len(wanted)} are expected"
        worst = (found - wanted).abs().max().item()
        assert worst <= tolerance, f"{named}: off by {worst:.3g}, more than {tolerance:g}; {value} for {reference}"

    metric = make()
    expect("as given", _value(metric, batches))
    expect("computed twice", metric.compute())
    metric.reset()
    expect("after reset", _value(metric, batches))
    expect("in pieces", _value(make(), [piece for batch in batches for piece in _pieces(batch)]))
    expect("in another order", _value(make(), [_reordered(batch) for batch in reversed(batches)]))
    expect("pickled half-way", _value_pickled(make(), batches))
    for dtype in (torch.bfloat16, torch.float16):
        expect(f"held by a module cast to {dtype}", _value_cast_half_way(make(), batches, dtype))
    for way, value in _values_on_two_ranks(make, batches):
        expect(way, value)
    expect("in float64", _value(make(), [_cast(batch, torch.float64) for batch in batches]))
    if half_atol is not None:
        expect("in float16", _value(make(), [_cast(batch, torch.float16) for batch in batches]), half_atol)


def _value(metric: Metric, batches: Sequence[Batch]) -> Any:
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def _value_pickled(metric: Metric, batches: Sequence[Batch]) -> Any:
    first, second = _split(batches, 0.5)
    for batch in first:
        metric.update(*batch)
    return _value(pickle.loads(pickle.dumps(metric)), second)


def _value_cast_half_way(metric: Metric, batches: Sequence[Batch], dtype: torch.dtype) -> Any:
    holder = nn.ModuleList([nn.Linear(1, 1), metric]).to(dtype)
    first, second = _split(batches, 0.5)
    for batch in first:
        metric.update(*batch)
    holder.to(dtype)
    return _value(metric, second)


def _values_on_two_ranks(make: Callable[[], Metric], batches: Sequence[Batch]) -> list[tuple[str, Any]]:
    shares = {"on two ranks, unequal shares": _split(batches, 0.3), "on two ranks, one empty": (batches, [])}

    def work(rank: int) -> list[Any]:
        return [_value(make(), share[rank]) for share in shares.values()]

    values = run_forked(work)
    return [(f"{way}, rank {rank}", values[rank][i]) for i, way in enumerate(shares) for rank in range(2)]


def _numbers(value: Any) -> Tensor:
    """Returns all numbers of a value, nested as it may be, in one float64 vector."""
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, Sequence):
        return torch.cat([_numbers(item) for item in value]) if value else torch.empty(0, dtype=torch.float64)
    return torch.as_tensor(value, dtype=torch.float64).flatten()


def _rows(batch: Batch) -> int:
    return next(len(item) for item in batch if isinstance(item, Tensor))


def _take(batch: Batch, rows: Any) -> Batch:
    return tuple(item[rows] if isinstance(item, Tensor) else item for item in batch)


def _pieces(batch: Batch) -> list[Batch]:
    """Returns a batch in pieces of 1, 2, 3 ... rows."""
    pieces, start, size = [], 0, 1
    while start < _rows(batch):
        pieces.append(_take(batch, slice(start, start + size)))
        start, size = start + size, size + 1
    return pieces


def _split(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    cuts = [round(share * _rows(batch)) for batch in batches]
    pairs = list(zip(batches, cuts, strict=True))
    return [_take(b, slice(0, cut)) for b, cut in pairs], [_take(b, slice(cut, None)) for b, cut in pairs]


def _reordered(batch: Batch) -> Batch:
    return _take(batch, torch.randperm(_rows(batch), generator=torch.Generator().manual_seed(0)))


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return tuple(i.to(dtype) if isinstance(i, Tensor) and i.is_floating_point() else i for i in batch)
