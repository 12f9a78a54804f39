"""How an arm acts inside a training step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore.noise import mix_seed
from diffcore.train import PairNoise
from immiscible_noise.assign import assign_noise
from immiscible_noise.select import select_noise
from immiscible_noise.settings import Arm

# Streams of the run's seed, apart from those of the trainer.
_SUBSET, _CANDIDATES = 101, 102


def pair_noise_for(arm: Arm, seed: int) -> PairNoise | None:
    """Returns what a training step does with its noise, or None where the independent draw stays.

    Whatever is drawn here is a function of (seed, step, rank), so that a resumed run repeats it.
    """
    if arm.method == "vanilla":
        return None

    def assign(x0: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return assign_noise(
            x0,
            noise,
            labels=batch.get("labels"),
            mask=batch.get("mask"),
            cost=arm.cost,
            condition=arm.condition,
            strength=arm.strength,
            generator=_generator(x0, seed, batch, _SUBSET),
        )

    def select(x0: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return select_noise(x0, arm.k, score=arm.score, generator=_generator(x0, seed, batch, _CANDIDATES))

    return assign if arm.method == "assignment" else select


def _generator(x0: Tensor, seed: int, batch: Mapping[str, Any], stream: int) -> torch.Generator:
    step_seed = mix_seed(seed, batch["step"], stream)
    return torch.Generator(x0.device).manual_seed(mix_seed(step_seed, batch["rank"]))
