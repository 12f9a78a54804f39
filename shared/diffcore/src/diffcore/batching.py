"""Processing rows in batches, which are halved where memory runs out."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from diffcore.errors import MachineError

_LOG = logging.getLogger(__name__)
# Accelerators raise a class of torch or use these words; the CPU's allocator and the CUDA libraries have their own.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")

Rows = TypeVar("Rows", bound=Any)
Result = TypeVar("Result")


class InBatches:
    """Calls a function on consecutive slices of some rows; slices are halved when memory runs out.

    The slice that did not fit is tried again at half the size, and later slices and calls keep to the smaller size.

    Args:
        size: Largest number of rows in one batch.

    Attributes:
        size: Number of rows in the next batch; smaller than at first where memory ran out.

    Example:
        >>> in_batches = InBatches(2)
        >>> [sum(batch) for batch in in_batches([1, 2, 3, 4, 5], list)]
        [3, 7, 5]
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"`size` is {size}; give at least 1 row")
        self.size = size

    def __call__(self, rows: Rows, compute: Callable[[Rows], Result]) -> Iterator[Result]:
        """Yields what a function makes of each batch, in the order of the rows.

        Args:
            rows: Anything with a length that can be sliced: a list, a range, a tensor.
            compute: Function of one slice of the rows.

        Raises:
            MachineError: Memory is too small for a single row.
        """
        start = 0
        while start < len(rows):
            batch = rows[start : start + self.size]
            try:
                result = compute(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise MachineError(
                        "memory does not hold a single row; free some, or use a smaller precision"
                    ) from error
                self.size = len(batch) // 2
            else:
                yield result
                start += len(batch)
                continue
            # Only here, where the error is gone, nothing holds the tensors of the failed batch any more.
            _LOG.warning("out of memory; going on with %d rows at a time", self.size)
            _release()


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, on the CPU or on an accelerator.

    Example:
        >>> is_out_of_memory(RuntimeError("MPS backend out of memory"))
        True
    """
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in _WORDS)
    return isinstance(error, MemoryError)


def _release() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
