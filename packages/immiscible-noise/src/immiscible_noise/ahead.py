"""Assignment off the critical path: a worker thread assigns the noise of the next batch while this one trains.

The exact solvers release Python's lock, so that one thread beside the training suffices.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Unpack

import torch
from torch import Tensor

from .assign import Options, assign_noise
from .batch import draw_noise


class AssignedAhead:
    """Iterates a loader one batch ahead, and gives each batch the noise that was assigned to it meanwhile.

    Batches are mappings, or tensors. A mapping comes back as a dict with the noise under `noise_key`; a tensor comes
    back as a pair of itself and its noise. What comes out equals assigning each batch where it is used, in order. An
    error in the worker is raised where its batch would have come, with the batch's index.

    Args:
        loader: Loader, or any other iterable, of batches whose clean samples are as the diffusion sees them: pixels, or
            cached latents.
        key: Name of the clean samples in a batch.
        noise_key: Name under which the noise is put.
        labels_key: Name of the labels in a batch, or None to give none.
        seed: Number that fixes the noise of all batches together with `first_batch`.
        first_batch: Index of the first batch that comes, for a training that is resumed.
        **options: Keyword arguments of `assign_noise`.

    Example:
        >>> batches = [{"latents": torch.randn(4, 4, 8, 8)} for _ in range(3)]
        >>> [batch["noise"].shape[0] for batch in AssignedAhead(batches, key="latents", seed=0)]
        [4, 4, 4]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        key: str = "pixel_values",
        noise_key: str = "noise",
        labels_key: str | None = None,
        seed: int = 0,
        first_batch: int = 0,
        **options: Unpack[Options],
    ) -> None:
        self.loader, self.key, self.noise_key, self.labels_key = loader, key, noise_key, labels_key
        self.seed, self.first_batch, self.options = seed, first_batch, options

    def __len__(self) -> int:
        return len(self.loader)  # pyright: ignore[reportArgumentType]  of loaders that have a length

    def __iter__(self) -> Iterator[Any]:
        with ThreadPoolExecutor(1, "assigned-ahead") as worker:
            waiting: tuple[int, Any, Future[Tensor]] | None = None
            loader, index, failed = iter(self.loader), self.first_batch, None
            while True:
                try:
                    batch = next(loader)
                except StopIteration:
                    break
                except Exception as error:  # what came before it is still given
                    failed = error
                    break
                following = (index, batch, worker.submit(self.noise, index, batch))
                if waiting is not None:
                    yield self._with_noise(*waiting)
                waiting, index = following, index + 1
            if waiting is not None:
                yield self._with_noise(*waiting)
            if failed is not None:
                raise failed

    def noise(self, index: int, batch: Any) -> Tensor:
        """Returns the noise of a batch, which its index and the seed fix.

        Args:
            index: Number of the batch in the training.
            batch: Batch with its clean samples.
        """
        x = batch[self.key] if isinstance(batch, Mapping) else batch
        options: Options = {**self.options}
        if self.labels_key is not None:
            options["labels"] = batch[self.labels_key]
        generator = torch.Generator(x.device).manual_seed((self.seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        return assign_noise(x, draw_noise(x, generator), generator=generator, **options)

    def _with_noise(self, index: int, batch: Any, found: "Future[Tensor]") -> Any:
        try:
            noise = found.result()
        except Exception as error:
            error.add_note(f"the noise of batch {index} could not be assigned")
            raise
        return {**batch, self.noise_key: noise} if isinstance(batch, Mapping) else (batch, noise)
