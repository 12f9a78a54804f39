"""Assignment off the critical path: a worker thread assigns the noise of the next batch while this one trains.

The exact solvers release Python's lock, so that one thread beside the training suffices.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .accumulate import assign_accumulated
from .assign import Options
from .batch import draw_noise, mixed_seed


class AssignedAhead:
    """Iterates a loader ahead of the training, and gives each batch the noise that was assigned to it meanwhile.

    Batches are mappings, or tensors. A mapping comes back as a dict with the noise under `noise_key`; a tensor comes
    back as a pair of itself and its noise. What comes out equals assigning each batch where it is used, in order. An
    error in the worker is raised where its batch would have come, with the batch's index. Under gradient accumulation,
    `accumulate` batches at a time exchange their noises.

    Each epoch iterates over it again and meets new noise: its first batch takes the index after the last of the epoch
    before, in which an optimizer step with fewer batches counts as full.

    Args:
        loader: Loader, or any other iterable, of batches whose clean samples are as the diffusion sees them: pixels, or
            cached latents.
        key: Name of the clean samples in a batch.
        noise_key: Name under which the noise is put.
        labels_key: Name of the labels in a batch, or None to give none.
        seed: Number that fixes the noise of all batches together with `first_batch`.
        first_batch: Index of the first batch that comes, for a training that is resumed: the number of optimizer steps
            before it times `accumulate`.
        accumulate: Number of batches in an optimizer step, which are assigned as one. The last step may have fewer.
        **options: Keyword arguments of `assign_noise`.

    Raises:
        ValueError: `accumulate` is below 1, or `first_batch` lies inside an optimizer step.

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
        accumulate: int = 1,
        **options: Unpack[Options],
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}; give the number of batches in an optimizer step, at least 1")
        if first_batch % accumulate:
            raise ValueError(
                f"first_batch is {first_batch}, inside an optimizer step of {accumulate} batches; resume where one "
                f"begins, at {first_batch - first_batch % accumulate}"
            )
        self.loader, self.key, self.noise_key, self.labels_key = loader, key, noise_key, labels_key
        self.seed, self.first_batch, self.accumulate, self.options = seed, first_batch, accumulate, options
        self._following = first_batch

    def __len__(self) -> int:
        return len(self.loader)  # pyright: ignore[reportArgumentType]  of loaders that have a length

    def __iter__(self) -> Iterator[Any]:
        with ThreadPoolExecutor(1, "assigned-ahead") as worker:
            waiting: _Step | None = None
            loader, index, failed, ended = iter(self.loader), self._following, None, False
            while not ended:
                batches = []
                try:
                    while len(batches) < self.accumulate:
                        batches.append(next(loader))
                except StopIteration:
                    ended = True
                except Exception as error:  # what came before it is still given
                    failed, ended = error, True
                if batches:
                    following = _Step(index, batches, worker.submit(self.noises, index, batches))
                    yield from self._with_noises(waiting)
                    waiting, index = following, index + self.accumulate
            yield from self._with_noises(waiting)
            if failed is not None:
                raise failed

    def noises(self, index: int, batches: Sequence[Any]) -> list[Tensor]:
        """Returns the noises of the batches of one optimizer step, which their indices and the seed fix.

        Args:
            index: Number of the first of the batches in the training.
            batches: Batches with their clean samples.
        """
        images = [batch[self.key] if isinstance(batch, Mapping) else batch for batch in batches]
        options: Options = {**self.options}
        if self.labels_key is not None:
            options["labels"] = _joined([batch[self.labels_key] for batch in batches])
        generators = [
            torch.Generator(x.device).manual_seed(mixed_seed(self.seed, index + place))
            for place, x in enumerate(images)
        ]
        drawn = [draw_noise(x, generator) for x, generator in zip(images, generators, strict=True)]
        return assign_accumulated(images, drawn, generator=generators[0], **options)

    def _with_noises(self, step: "_Step | None") -> Iterator[Any]:
        if step is None:
            return
        try:
            noises = step.found.result()
        except Exception as error:
            last = step.first + len(step.batches) - 1
            which = f"batch {last}" if last == step.first else f"batches {step.first} to {last}"
            error.add_note(f"the noise of {which} could not be assigned")
            raise
        self._following = step.first + self.accumulate
        for batch, noise in zip(step.batches, noises, strict=True):
            yield {**batch, self.noise_key: noise} if isinstance(batch, Mapping) else (batch, noise)


class _Step(NamedTuple):
    first: int
    batches: list[Any]
    found: "Future[list[Tensor]]"


def _joined(labels: list[Any]) -> Any:
    if all(isinstance(one, Tensor) for one in labels):
        return torch.cat(labels)
    return [label for one in labels for label in one]
