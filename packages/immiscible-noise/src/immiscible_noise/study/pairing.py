"""Which noise each sample of a training meets: a coupling as a hook of the training step."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from diffcore.noise import mix_seed, philox_normal
from diffcore.train import PairNoise, StepSampler
from diffcore.train.module import NOISE
from immiscible_noise.coupling import Coupling
from immiscible_noise.ranks import assign_drawn_across_ranks
from immiscible_noise.study.settings import FitSettings

# Streams of the run's seed, apart from those of the trainer: which rows are assigned, and candidates.
_STREAMS = {"vanilla": 0, "assignment": 101, "knn": 102, "window": 107}


@runtime_checkable
class VisitedData(Protocol):
    """A data set that makes whole batches, some parts of which may depend on the visit: whether it has a caption."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Int[Tensor, " b"]) -> dict[str, Any]:
        """Returns the batch of some samples."""
        ...

    def at_visits(self, batch: Mapping[str, Any], visits: Int[Tensor, " b"]) -> Mapping[str, Any]:
        """Returns the batch with what depends on the visits: the numbers of samples that the training took before."""
        ...


class WindowNoise:
    """Assigns noise over windows of the samples that a training will visit, whatever its batch size.

    Args:
        coupling: How noise meets the samples of a window.
        batches: Data set of the training.
        batch_size: Number of samples per step over all processes.
        seed: Seed of the training, which fixes its order.
    """

    def __init__(self, coupling: Coupling, batches: VisitedData, batch_size: int, seed: int) -> None:
        self.coupling, self.batches, self.batch_size, self.seed = coupling, batches, batch_size, seed
        self.order = StepSampler(len(batches), batch_size, seed)
        self._built: tuple[int, Tensor] | None = None

    def __call__(self, x0: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Returns the noise that the plan gives to this rank's share of a batch."""
        first = batch["step"] * self.batch_size + batch["rank"] * len(x0)
        rows = [
            self.window(visit // self.coupling.window, x0)[visit % self.coupling.window]
            for visit in range(first, first + len(x0))
        ]
        return torch.stack(rows)

    def window(self, number: int, like: Tensor) -> Tensor:
        """Returns the noises of a window's visits, in their order; the last window is kept."""
        if self._built is None or self._built[0] != number:
            size = self.coupling.window
            visits = torch.arange(number * size, (number + 1) * size)
            batch = self.batches.__getitems__(self.order.samples(int(visits[0]), int(visits[-1]) + 1))
            batch = self.batches.at_visits(batch, visits)
            drawn = philox_normal(self.seed, visits, like.shape[1:], stream=_STREAMS["window"])
            step_seed = mix_seed(self.seed, number, _STREAMS["window"])
            found = self.coupling(
                batch["x0"],
                drawn,
                labels=batch.get("labels"),
                conditions=batch.get("conditions"),
                generator=torch.Generator().manual_seed(step_seed),
            )
            self._built = (number, found.to(like))
        return self._built[1]


def pair_noise_of(coupling: Coupling, seed: int, settings: FitSettings, batches: VisitedData) -> PairNoise:
    """Returns the coupling as a hook of the training step.

    Whatever is drawn here is a function of (seed, step, rank), so that a resumed run repeats it.

    Args:
        coupling: How noise meets images.
        seed: Seed of the training.
        settings: Length and batch size of the training.
        batches: Data set of the training.
    """
    windows = WindowNoise(coupling, batches, settings.batch_size, seed) if coupling.window else None

    def pair(x0: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if batch["step"] >= coupling.until * settings.steps:
            return noise
        if windows is not None:
            return windows(x0, noise, batch)
        step_seed = mix_seed(seed, batch["step"], _STREAMS[coupling.method])
        if coupling.scope == "global":
            return _across_ranks(coupling, x0, batch, seed, mix_seed(step_seed))
        generator = torch.Generator(x0.device).manual_seed(mix_seed(step_seed, batch["rank"]))
        return coupling(
            x0,
            noise,
            labels=batch.get("labels"),
            conditions=batch.get("conditions"),
            mask=batch.get("mask"),
            generator=generator,
        )

    return pair


def _across_ranks(coupling: Coupling, x0: Tensor, batch: Mapping[str, Any], seed: int, step_seed: int) -> Tensor:
    """Returns this rank's noise, assigned over the batches of all ranks: what one process would give to its rows."""

    def draw(rows: Tensor) -> Tensor:
        noise = philox_normal(seed, rows.to(x0.device), x0.shape[1:], step=batch["step"], stream=NOISE)
        return noise.to(x0.dtype)

    assigned = assign_drawn_across_ranks(
        x0,
        draw,
        labels=None if coupling.condition == "ignore" else batch.get("labels"),
        cost=coupling.cost,
        strength=coupling.strength,
        generator=torch.Generator(x0.device).manual_seed(step_seed),
    )
    return -assigned if coupling.flip else assigned
