"""Rows in batches: order, halving that lasts, and every way in which libraries say that memory ran out."""

import gc
import weakref
from itertools import chain

import pytest
import torch

from diffcore.batching import InBatches
from diffcore.errors import MachineError

CPU_WORDS = "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried to"
SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    RuntimeError(CPU_WORDS),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]


def at_most(limit: int, error: BaseException, sizes: list[int]):
    def compute(batch):
        sizes.append(len(batch))
        if len(batch) > limit:
            raise error
        return list(batch)

    return compute


@pytest.mark.parametrize("rows", [[5, 6, 7, 8, 9], range(5, 10), (5, 6, 7, 8, 9)])
def test_results_come_in_the_order_of_the_rows(rows):
    assert list(InBatches(2)(rows, list)) == [[5, 6], [7, 8], [9]]
    assert list(InBatches(2)(rows[:0], list)) == []


def test_tensors_are_sliced_by_rows():
    rows = torch.arange(10).view(5, 2)
    assert torch.equal(torch.cat(list(InBatches(2)(rows, lambda batch: batch + 1))), rows + 1)


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_batches_are_halved_and_stay_so(error):
    in_batches, sizes = InBatches(8), []
    compute = at_most(3, error, sizes)
    assert list(chain(*in_batches(range(10), compute))) == list(range(10))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert in_batches.size == 2
    assert list(chain(*in_batches(range(3), compute))) == [0, 1, 2]
    assert sizes[-2:] == [2, 1]


def test_a_row_that_does_not_fit_is_the_machines_fault():
    with pytest.raises(MachineError, match="does not hold a single row"):
        list(InBatches(4)(range(4), at_most(0, SHORTAGES[0], [])))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_pass(error):
    in_batches = InBatches(4)
    with pytest.raises(type(error), match=str(error)):
        list(in_batches(range(4), at_most(0, error, [])))
    assert in_batches.size == 4


def test_what_the_reader_of_the_results_raises_is_no_shortage():
    in_batches = InBatches(2)
    found = in_batches(range(4), list)
    next(found)
    with pytest.raises(torch.OutOfMemoryError):
        found.throw(torch.OutOfMemoryError("out of memory"))
    assert in_batches.size == 2


def test_tensors_of_a_failed_batch_are_gone_before_the_next_try():
    held: list[weakref.ref] = []

    def compute(batch):
        assert all(ref() is None for ref in held)
        large = torch.ones(3)
        held.append(weakref.ref(large))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return 1

    gc.disable()
    try:
        assert list(InBatches(4)([1], compute)) == [1]
        assert list(InBatches(4)([1, 2, 3, 4], compute)) == [1] * 4
    finally:
        gc.enable()


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="`size` is 0"):
        InBatches(0)
