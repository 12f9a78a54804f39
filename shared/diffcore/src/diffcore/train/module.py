"""The training step of denoisers: regression of the network's output on its target."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from diffcore.denoiser import Denoiser
from diffcore.noise import philox_normal, philox_uniform
from diffcore.train.iteration import IterationModule, scheduled
from diffcore.train.timesteps import TimeSampler, default_time_sampler

Batch = Mapping[str, Any]
PairNoise = Callable[[Tensor, Tensor, Batch], Tensor]

# Streams of the counter-based generator: each kind of draw has its own.
NOISE, TIMESTEP = 0, 1


class DenoisingModule(IterationModule):
    """Trains a denoiser by mean squared error in the parameterisation of its output.

    A batch is a mapping with `x0` (b *data, model space) and, optionally, `condition` (keyword tensors of the
    backbone), `labels`, `mask`, `indices` (positions in the data set), and `noise` (b *data). Noise that the batch
    already carries is used as it is; otherwise it is drawn for (seed, iteration, row) and handed to `pair_noise`, which
    may decide which noise goes to which sample. The timesteps are drawn afterwards and independently. Target and `x_t`
    use the same noise.

    Args:
        denoiser: Denoiser that learns epsilon, sample, v, flow or EDM prediction on its own schedule: all its weights,
            or a LoRA (`train.lora`).
        optimizer: Makes the optimizer from the parameters.
        pair_noise: `(x0, noise, batch) -> noise`, with the iteration as `step` and the `rank` added to the batch; None
            keeps the independent draw.
        time_sampler: Turns uniform numbers in (0, 1) into timesteps; None takes the usual one of the schedule.
        stratified: Whether to draw one uniform number in each of as many equal slices of (0, 1) as the global batch has
            rows, which makes the loss less noisy. The rows must come in random order, as `StepSampler`'s do.
        weighting: Loss weight at each timestep, 1 everywhere if None. For EDM the regression in the network's output
            space is already EDM's loss weighting (EDM, equation 8).
        learning_rate_factor: Factor of the learning rate at each iteration; None keeps it constant.
        seed: Seed of noise and timesteps.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        pair_noise: PairNoise | None = None,
        time_sampler: TimeSampler | None = None,
        stratified: bool = False,
        weighting: Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]] | None = None,
        learning_rate_factor: Callable[[int], float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.pair_noise = pair_noise
        self.time_sampler = time_sampler or default_time_sampler(denoiser.schedule)
        self.stratified = stratified
        self.weighting = weighting
        self.seed = seed
        self._optimizer = optimizer
        self._learning_rate_factor = learning_rate_factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean loss of this rank's share of the batch at the current iteration."""
        batch = {**batch, "step": self.iteration, "rank": self.global_rank}
        x0 = batch["x0"]
        noise = batch.get("noise")
        if noise is None:
            noise = self._normal(x0, self.iteration, NOISE)
            if self.pair_noise is not None:
                noise = self.pair_noise(x0, noise, batch)
        loss = self.loss(x0, noise, self._timesteps(x0, self.iteration, TIMESTEP), batch.get("condition", {}))
        self.log("loss", loss, prog_bar=True)
        return loss

    def loss(
        self,
        x0: Float[Tensor, "b *data"],
        noise: Float[Tensor, "b *data"],
        t: Float[Tensor, " b"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, ""]:
        """Returns the weighted mean squared error of the network's output at timesteps `t`.

        On assigned noise it is lower by construction: compare losses of different couplings on independent noise only.
        """
        x_t = self.denoiser.schedule.add_noise(x0, noise, t)
        prediction = self.denoiser(x_t, t, condition)
        squared = (prediction.output.float() - prediction.target(x0, noise)).square().flatten(1).mean(1)
        return (squared if self.weighting is None else self.weighting(t) * squared).mean()

    def configure_optimizers(self) -> Any:
        """Returns the optimizer over the denoiser's parameters and, where asked for, its learning-rate schedule."""
        return scheduled(self._optimizer(self.denoiser.parameters()), self._learning_rate_factor)

    def _rows(self, x0: Tensor) -> Tensor:
        """Rows of the global batch that this rank holds: equal shares, in rank order."""
        return self.global_rank * len(x0) + torch.arange(len(x0), device=x0.device)

    def _normal(self, x0: Tensor, step: int, stream: int) -> Tensor:
        rows = self._rows(x0)
        return philox_normal(self.seed, rows, x0.shape[1:], step=step, stream=stream).to(x0.dtype)

    def _timesteps(self, x0: Tensor, step: int, stream: int) -> Tensor:
        rows = self._rows(x0)
        u = philox_uniform(self.seed, rows, (), step=step, stream=stream)
        if self.stratified:
            # The largest float below 1 may be rounded up to it.
            u = ((rows + u) / (len(rows) * self.trainer.world_size)).clamp(max=1 - torch.finfo(u.dtype).eps / 2)
        return self.time_sampler(u)
