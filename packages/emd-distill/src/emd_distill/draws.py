"""All random numbers of a training as functions of seed, iteration and row: nothing else need be stored to go on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffcore.denoiser import Condition
from diffcore.noise import philox_normal, philox_uniform
from diffcore.train.timesteps import TimeSampler
from emd_distill.chain import ChainNoise

# Streams of the counter-based generator: each kind of draw has its own, so that K changes no other draw.
_TIME, _Z, _EPS, _CHAIN_EPS, _CHAIN_Z, CONDITION, _NULL, WARM_Z, WARM_REST = range(9)
_UPDATES = 64  # streams kept apart for each further update of the student score in one iteration

Conditions = Callable[[int, Int[Tensor, " b"]], Condition]
"""Conditions of an iteration: (iteration, rows) to keyword tensors of the backbone, one row for each row."""


@dataclass(frozen=True)
class Drawn:
    """The draws of one iteration.

    Attributes:
        z: Latents of the rows, standard normal.
        eps: Noise in the shape of samples, standard normal.
        t: Noise level of each row.
        condition: Keyword tensors of the backbones.
        nulls: Rows on which the student score learns without their condition; None where it learns all with it.
        uncond: Keyword tensors of no condition, one row; None where there are no such rows.
    """

    z: Float[Tensor, "b *latent"]
    eps: Float[Tensor, "b *data"]
    t: Float[Tensor, " b"]
    condition: Condition | None
    nulls: Bool[Tensor, " b"] | None = None
    uncond: Condition | None = None

    @property
    def student_condition(self) -> Condition | None:
        """What the student score learns under: the conditions, left out in some rows where it is guided."""
        if self.nulls is None or self.condition is None or self.uncond is None:
            return self.condition
        found = {}
        for name, value in self.condition.items():
            places = self.nulls.view(-1, *[1] * (value.ndim - 1))
            found[name] = torch.where(places, self.uncond[name].to(value), value)
        return found


@dataclass(frozen=True)
class Draws:
    """All random numbers, as functions of seed, iteration and row: nothing else need be stored to go on.

    Attributes:
        seed: Seed that the user chose.
        shape: Shape of one latent.
        time_sampler: Distribution of noise levels.
        conditions: Conditions of each iteration; None for a model without any.
        data_shape: Shape of one sample, where it differs from that of a latent.
        uncond: Keyword tensors of no condition, one row; None where the student score is not guided.
        null_share: Share of rows on which a guided student score learns without their condition.
    """

    seed: int
    shape: tuple[int, ...]
    time_sampler: TimeSampler
    conditions: Conditions | None = None
    data_shape: tuple[int, ...] | None = None
    uncond: Condition | None = None
    null_share: float = 0.0

    def __call__(self, step: int, rows: Int[Tensor, " b"], update: int = 0) -> Drawn:
        """Returns the draws of an iteration.

        Args:
            step: Number of finished iterations.
            rows: Places of the rows in the whole batch.
            update: Number of student updates that follow in the iteration; 0 for the last, which the chain shares.
        """

        def normal(stream: int, shape: tuple[int, ...]) -> Tensor:
            return philox_normal(self.seed, rows, shape, step=step, stream=stream + _UPDATES * update)

        def uniform(stream: int) -> Tensor:
            return philox_uniform(self.seed, rows, (), step=step, stream=stream + _UPDATES * update)

        condition = None if self.conditions is None else self.conditions(step + update * 2**20, rows)
        z, eps = normal(_Z, self.shape), normal(_EPS, self.data_shape or self.shape)
        nulls = None if self.uncond is None else uniform(_NULL) < self.null_share
        return Drawn(z, eps, self.time_sampler(uniform(_TIME)), condition, nulls, self.uncond)

    def chain(self, step: int, rows: Int[Tensor, " b"], count: int, moves: bool) -> ChainNoise:
        """Returns the noise of a chain; more steps change none of the first ones' noise.

        Args:
            step: Number of finished iterations.
            rows: Places of the rows in the whole batch.
            count: Number of Langevin steps.
            moves: Whether z moves along the chain.
        """
        data = self.data_shape or self.shape
        eps = philox_normal(self.seed, rows, (count, *data), step=step, stream=_CHAIN_EPS)
        z = philox_normal(self.seed, rows, (count, *self.shape), step=step, stream=_CHAIN_Z) if moves else None
        return ChainNoise(eps, z)
