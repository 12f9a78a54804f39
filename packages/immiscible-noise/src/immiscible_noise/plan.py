"""Plans: noise assigned over a window of upcoming samples, for trainings whose batches are too small to exchange noise.

The order in which samples are visited is known ahead. A plan takes a window of M visits (`window`, 1024 by default),
draws M seeds, makes the noise of each, and assigns the noises to the samples as `assign_noise` does in a batch. What it
keeps is one seed per visit: eight bytes. The training step makes the noise of its visit again from the seed. Inside a
window the noises are exactly those that were drawn, so that each stays Gaussian, and a network batch of one gains what
a batch of M would.

Noise is made on the host, whose generator gives the same numbers beside every accelerator; another version of torch may
give others, so a plan keeps the version that it was built with.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .assign import Options, assign_noise
from .batch import mixed_seed

_FEW = 50  # samples


@dataclass(frozen=True, eq=False)
class NoisePlan:
    """Which sample each visit of a training takes, and the seed of the noise that it meets.

    Attributes:
        order: Index of the sample at each visit; a loader takes it as its `sampler`, a rank every n-th of it.
        seeds: Seed of the noise at each visit.
        window: Number of visits that exchanged their noises.
        torch_version: Version of torch that the noises were made with.

    Example:
        >>> latents = torch.randn(20, 4, 8, 8)
        >>> plan = NoisePlan.build(latents, torch.randperm(20), window=10)
        >>> visits = torch.tensor([3])                       # network batches of one
        >>> x = latents[plan.order[visits]]
        >>> noise = plan.noise(visits, like=x)               # in place of randn_like(x)
        >>> noise.shape
        torch.Size([1, 4, 8, 8])
    """

    order: Int[Tensor, " visits"]
    seeds: Int[Tensor, " visits"]
    window: int
    torch_version: str

    @classmethod
    def build(
        cls,
        samples: Tensor | Sequence[Tensor],
        order: Int[Tensor, " visits"] | Sequence[int] | None = None,
        *,
        window: int = 1024,
        seed: int = 0,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ) -> "NoisePlan":
        """Assigns noise to all visits, window by window.

        Samples of different shapes (aspect-ratio buckets) exchange noise with their like: a window holds `window`
        upcoming visits of one shape. Where samples are augmented, plan what the network sees, or accept that noise
        was assigned to another crop.

        Args:
            samples: Clean samples as the diffusion sees them, such as cached latents; anything that gives a tensor for
                an index will do, and is read window by window.
            order: Index of the sample at each visit, in the order of training; several passes over the samples may
                follow one another. None visits each once.
            window: Number of upcoming visits that exchange their noises, at least 1.
            seed: Number that fixes all noises.
            generator: Source of the assigned rows, for `strength` below 1; None lets `seed` fix them too.
            **options: Keyword arguments of `assign_noise`; `labels` holds one label per sample, `mask` one row per
                sample or one row for all.

        Warns:
            UserWarning: There are fewer than 50 samples, each of which would always meet noise from the same side; or
                a sample changes from one reading to the next, so that the plan is of other crops than the network sees.

        Raises:
            ValueError: `window` is below 1, the order names a sample that is not there, labels or masks are not one for
                each sample, or `assign_noise` refuses.
        """
        if window < 1:
            raise ValueError(f"window is {window}; give the number of visits that exchange noise, at least 1")
        visits = torch.arange(len(samples)) if order is None else torch.as_tensor(order, dtype=torch.int64)
        beyond = (visits < 0) | (visits >= len(samples))
        if bool(beyond.any()):
            place = int(beyond.nonzero()[0])
            raise ValueError(f"order[{place}] is {int(visits[place])}, but there are {len(samples)} samples")
        _check_rows(options, len(samples))
        _warn_of_samples(samples, options.get("strength", 1.0))
        seeds = _draw_seeds(seed, len(visits))
        for places in _windows(samples, visits, window):
            x = torch.stack([samples[int(i)] for i in visits[places]]).cpu()
            told: Options = {**options}
            if (labels := options.get("labels")) is not None:
                told["labels"] = _rows_of(labels, visits[places])
            if (mask := options.get("mask")) is not None:
                told["mask"] = _rows_of(mask.expand(len(samples), *mask.shape[1:]), visits[places]).cpu()
            drawn = noise_of(seeds[places], x.shape[1:])
            chosen = generator or torch.Generator().manual_seed(mixed_seed(seed, int(places[0])))
            _, info = assign_noise(x, drawn, generator=chosen, return_info=True, **told)
            seeds[places] = seeds[places][info.permutation]
        return cls(visits, seeds, window, torch.__version__)

    def __len__(self) -> int:
        return len(self.order)

    def noise(self, visits: Int[Tensor, " b"], *, like: Float[Tensor, "b *data"]) -> Float[Tensor, "b *data"]:
        """Returns the noise of some visits, whatever else is in their batch.

        Args:
            visits: Numbers of the visits, from 0: how many samples the training took before.
            like: Batch whose shape, type and device the noise takes.
        """
        return noise_of(self.seeds[visits.cpu()], like.shape[1:]).to(like)


def noise_of(seeds: Int[Tensor, " b"], shape: Sequence[int]) -> Float[Tensor, "b *data"]:
    """Returns unit Gaussian noise, one row for each seed, on the host.

    Args:
        seeds: Seed of each row.
        shape: Shape of one row.
    """
    noise, generator = torch.empty((len(seeds), *shape)), torch.Generator()
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


def _draw_seeds(seed: int, count: int) -> Tensor:
    """Returns seeds of 63 bits, which a prefix of another count shares."""
    state = np.random.SeedSequence(seed).generate_state(count, np.uint64)
    return torch.from_numpy((state >> np.uint64(1)).astype(np.int64))


def _warn_of_samples(samples: Any, strength: float) -> None:
    if 0 < len(samples) < _FEW and strength > 0.5:
        warnings.warn(
            f"there are only {len(samples)} samples: each always meets noise from its own side of noise space, and is "
            "learnt by heart sooner; give `strength` 0.5, or take select_noise with k=2",
            stacklevel=3,
        )
    if not isinstance(samples, Tensor) and len(samples) and not torch.equal(samples[0], samples[0]):
        warnings.warn(
            "a sample changes from one reading to the next, as random crops and flips do: the plan is of other samples "
            "than the network will see; plan what was augmented before, or leave the augmentation out",
            stacklevel=3,
        )


def _windows(samples: Any, visits: Tensor, window: int) -> list[Tensor]:
    """Returns the places of each window's visits, all of one shape."""
    if isinstance(samples, Tensor):
        return list(torch.arange(len(visits)).split(window))
    places: dict[tuple[int, ...], list[int]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for place, index in enumerate(visits.tolist()):
        if index not in shapes:
            shapes[index] = tuple(samples[index].shape)
        places.setdefault(shapes[index], []).append(place)
    return [part for found in places.values() for part in torch.tensor(found).split(window)]


def _check_rows(options: Options, count: int) -> None:
    for name in ("labels", "mask"):
        given = options.get(name)
        if given is not None and len(given) != count and not (name == "mask" and len(given) == 1):
            raise ValueError(f"{name} has {len(given)} rows, but there are {count} samples; give one for each")


def _rows_of(given: Any, indices: Tensor) -> Any:
    return given[indices.to(given.device)] if isinstance(given, Tensor) else [given[i] for i in indices.tolist()]
