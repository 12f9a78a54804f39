"""The order of samples in training, a function of (seed, step) alone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffcore.noise import mix_seed


@runtime_checkable
class BatchedDataset(Protocol):
    """A dataset that makes a whole batch at once."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Int[Tensor, " b"]) -> Mapping[str, Any]:
        """Returns the batch of `indices`: `x0`, and what else training needs."""
        ...


class StepSampler(Sampler[Tensor]):
    """Yields each step's sample indices, without end, from one shuffled pass over the data after another.

    Step s takes positions s·B … (s+1)·B of the concatenated passes; pass e is a permutation drawn from (seed, e). So
    the order can be entered at any step, and the ranks' shares put together are the batch of one process.

    Args:
        num_samples: Size of the data set, which may be smaller than a batch.
        batch_size: Samples per step over all ranks.
        seed: Number that fixes the order.
        rank: Index of the equal share of each batch to yield.
        world_size: Number of shares; must divide `batch_size`.
        first_step: Returns the step to begin with, each time iteration starts.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        first_step: Callable[[], int] = lambda: 0,
    ) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"cannot draw batches of {batch_size} from {num_samples} samples; both must be at least 1")
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} does not divide over {world_size} processes")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.first_step = rank, world_size, first_step
        self._pass: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        share = self.batch_size // self.world_size
        step = self.first_step()
        while True:
            start = step * self.batch_size + self.rank * share
            yield self.samples(start, start + share)
            step += 1

    def samples(self, start: int, stop: int) -> Int[Tensor, " visits"]:
        """Returns the samples at positions `start` to `stop` of the concatenated passes, over all ranks.

        Args:
            start: First position, counted from the beginning of training.
            stop: Position after the last.
        """
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            part = self._permutation(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if self._pass is None or self._pass[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._pass = (epoch, torch.randperm(self.num_samples, generator=generator))
        return self._pass[1]


class StepData(L.LightningDataModule):
    """Feeds a dataset to a Trainer in the order of `StepSampler`, from the iteration at which the module stands.

    Args:
        dataset: Data set that makes whole batches (`__getitems__`).
        batch_size: Samples per step over all ranks.
        seed: Number that fixes the order.
        num_workers: Number of loader processes; 0 suits data that are already in memory.
    """

    def __init__(self, dataset: BatchedDataset, batch_size: int, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.seed, self.num_workers = dataset, batch_size, seed, num_workers

    def train_dataloader(self) -> DataLoader:
        """Returns the endless loader of this rank's share."""
        trainer = self.trainer
        assert trainer is not None  # Lightning sets it before it asks for a loader
        module: Any = trainer.lightning_module
        sampler = StepSampler(
            len(self.dataset),
            self.batch_size,
            self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            first_step=lambda: module.iteration,
        )
        dataset: Dataset = self.dataset  # pyright: ignore[reportAssignmentType]  a protocol suffices at run time
        return DataLoader(
            dataset,
            batch_sampler=sampler,  # pyright: ignore[reportArgumentType]  a tensor serves where a list of ints is asked for
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _as_is(batch: Any) -> Any:
    return batch
