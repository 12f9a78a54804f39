"""The first denoising step of many prompts, seeds and sets of ablated neurons, row by row in one forward pass.

A row is a prompt y, a seed s and a set S of ablated neurons. Its latent is pure noise, x_T = c z_s with z_s ~ N(0, I)
and the initial scale c of the solver; the network predicts the noise in it, and the row's noise difference is

    delta(y, s, S) = predicted noise - z_s,   each channel stretched to [0, 1].

Values of cross-attention depend on the prompt alone, so a set of neurons is a multiplier on a row's values: rows of one
batch need not share prompt, seed or set.

References:
    Hintersdorf, Struppek et al. 2024, section 3.1.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.denoiser import Condition, GuidedDenoiser
from diffcore.digests import digest_of_values
from diffcore.errors import IncompatibleModelError
from diffcore.models import DiffusionModel
from diffcore.noise import row_noise
from nemo_localize.activations import prompt_encoder
from nemo_localize.score import PUBLISHED_TORCHMETRICS, noise_difference, num_scales, stretched
from nemo_localize.score import published_similarity as _published_similarity
from nemo_localize.score import similarity as _similarity
from nemo_localize.settings import StepSettings
from nemo_localize.sites import ablated_rows, value_sites

# Ten times what a score may change with the batch it is computed in: nearer to a threshold it is computed alone.
_MARGINS = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_MARGIN = 1e-2


class Row(NamedTuple):
    """One latent through the network.

    Attributes:
        prompt: Index of the prompt in its condition.
        seed: Index of the seed.
        ablated: Numbers of the neurons whose outputs are scaled.
    """

    prompt: int
    seed: int
    ablated: frozenset[int] = frozenset()


class FirstStep:
    """The first denoising step of a model under given settings; it counts its rows and forward passes.

    Args:
        model: A text-conditioned U-Net with its text encoder.
        settings: The step and the seeds; by default those of the paper.
        batch_size: Number of rows per forward pass; halved for good where memory runs out.
        up: Search the up blocks too, which hardly matter in the paper (appendix C.8).

    Attributes:
        sites: Value layers that are searched, shallowest first.
        up: Whether layers of the up blocks are among them.
        num_rows: Rows computed so far; under guidance each one counts twice.
        num_calls: Number of forward passes so far.

    Raises:
        IncompatibleModelError: The model has no value layers or no text encoder, or its latents are too small.

    Example:
        >>> from nemo_localize.planted import planted_model
        >>> step = FirstStep(planted_model([], side=8).model)
        >>> cond, truncated, lost = step.encode(["plain words"])
        >>> deltas, troubles = step(cond, [Row(prompt=0, seed=seed) for seed in range(3)])
        >>> deltas.shape, step.num_rows, step.num_calls
        (torch.Size([3, 4, 8, 8]), 3, 1)
    """

    def __init__(
        self, model: DiffusionModel, settings: StepSettings | None = None, *, batch_size: int = 64, up: bool = False
    ) -> None:
        self.model = model
        self.settings = settings or StepSettings()
        self.up = up
        self.sites = value_sites(model.backbone, up=up)
        self.encoder = prompt_encoder(model)
        self.num_rows = self.num_calls = 0
        self.device, self.dtype, self.shape = model.device, model.dtype, model.shape
        self.scales = _fitting_scales(model)
        schedule = model.denoiser.schedule
        self.t = float(schedule.timesteps(self.settings.steps)[self.settings.at_step - 1])
        self.noise = self._draw()
        level = torch.tensor([self.t], dtype=torch.float64)
        self._x_t = self.noise * float(schedule.initial_scale(level))
        self._in_batches = InBatches(batch_size)

    @classmethod
    def of(cls, model: "DiffusionModel | FirstStep") -> "FirstStep":
        """Returns the first step of a model under the default settings, or a given `FirstStep` as it is."""
        return model if isinstance(model, FirstStep) else cls(model)

    @property
    def batch_size(self) -> int:
        """Rows per forward pass; fewer than at first where memory ran out."""
        return self._in_batches.size

    @property
    def published(self) -> bool:
        """Whether the published code is reproduced."""
        return self.settings.published

    @property
    def margin(self) -> float:
        """Distance to a threshold below which scores are computed alone; 0 where they depend on their batch anyway."""
        return 0.0 if self.published else _MARGINS.get(self.dtype, _HALF_MARGIN)

    @property
    def rows_per_row(self) -> int:
        """Number of rows that the network computes for one of ours: two under guidance, else one."""
        return 1 if self.settings.guidance_scale == 1 else 2

    @property
    def digest(self) -> str:
        """Digest of all that a threshold depends on: settings, latent shape, timestep, precision, number of scales."""
        parts = {
            **{name: value for name, value in asdict(self.settings).items() if name != "at_step"},  # t stands for it
            "shape": list(self.shape),
            "t": self.t,
            "prediction_type": self.model.denoiser.prediction_type,
            "dtype": str(self.dtype),
            "scales": self.scales,
            # The version decides whether the coarsest scale keeps its border.
            "torchmetrics": PUBLISHED_TORCHMETRICS if self.published else None,
        }
        return digest_of_values(parts)

    def encode(self, prompts: Sequence[str]) -> tuple[Condition, list[bool], list[str]]:
        """Returns the condition of prompts, whether each was truncated, and the part of each that was cut off."""
        tokens = self.encoder.tokenize(prompts)
        cond = {key: value.to(self.device) for key, value in self.encoder.encode(tokens).items()}
        return cond, tokens.truncated.tolist(), list(tokens.lost)

    @torch.no_grad()
    def __call__(
        self, cond: Condition, rows: Sequence[Row], *, scale: float = 0.0
    ) -> tuple[Float[Tensor, "rows channels height width"], dict[int, str]]:
        """Returns the noise difference of each row, and by row index why one could not be computed.

        Args:
            cond: Condition with one row for each of the prompts that the rows refer to.
            rows: Any number of rows; computed `batch_size` at a time.
            scale: Factor of the ablated neurons' outputs.

        Raises:
            MachineError: Memory does not hold a single row.
        """
        deltas, troubles = [self.noise.new_empty(0, *self.shape)], dict[int, str]()
        done = 0
        for delta in self._in_batches(rows, partial(self._forward, cond, scale)):
            unit, bad = stretched(delta)
            deltas.append(unit)
            if bool(bad.any()):
                for row, channel in bad.nonzero().tolist():
                    seed = rows[done + row].seed
                    troubles.setdefault(done + row, self._trouble(delta[row, channel], seed, channel))
            done += len(delta)
        return torch.cat(deltas), troubles

    def alone(
        self, cond: Condition, rows: Sequence[Row], *, scale: float = 0.0
    ) -> tuple[Float[Tensor, "rows channels height width"], dict[int, str]]:
        """Returns what `self(cond, rows)` does, each row computed in a batch of its own."""
        found = [self(cond, [row], scale=scale) for row in rows]
        troubles = {index: reason for index, (_, trouble) in enumerate(found) for reason in trouble.values()}
        return torch.cat([delta for delta, _ in found]), troubles

    def similarity(
        self, before: Float[Tensor, "rows channels height width"], after: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, " rows"]:
        """Returns how similar pairs of noise differences are, from 0 to 1, by the measure of the settings."""
        return (_published_similarity if self.published else _similarity)(before, after)

    def _forward(self, cond: Condition, scale: float, rows: Sequence[Row]) -> Tensor:
        seeds = torch.tensor([row.seed for row in rows], device=self.device)
        noise, x_t = self.noise[seeds], self._x_t[seeds]
        prompts = torch.tensor([row.prompt for row in rows])
        condition = {key: value[prompts.to(value.device)] for key, value in cond.items()}
        denoiser = self.model.denoiser
        ablated = self.sites.table([row.ablated for row in rows])
        if self.rows_per_row == 2:
            denoiser, condition = self._guided(condition)
            ablated = ablated.repeat(2, 1)
        some = any(row.ablated for row in rows)
        with ablated_rows(self.model.backbone, self.sites, ablated, scale=scale) if some else nullcontext():
            prediction = denoiser(x_t, torch.full((len(rows),), self.t, device=self.device), condition)
        self.num_rows += self.rows_per_row * len(rows)
        self.num_calls += 1
        return noise_difference(prediction, noise, self.model.denoiser.schedule, self.t)

    def _guided(self, condition: Condition) -> tuple[GuidedDenoiser, Condition]:
        """Returns the guided denoiser and its condition; the published code swaps the two branches."""
        empty = self.encoder.unconditional(1)
        count = len(next(iter(condition.values())))
        if self.published:
            empty = {key: value.expand(count, *value.shape[1:]) for key, value in empty.items()}
            condition, empty = empty, condition
        return GuidedDenoiser(self.model.denoiser, self.settings.guidance_scale, empty), condition

    def _draw(self) -> Tensor:
        return initial_noise(self.settings.seeds, self.model, published=self.published)

    def _trouble(self, channel_values: Tensor, seed: int, channel: int) -> str:
        where = f"seed {self.settings.seeds[seed]}, channel {channel}"
        if bool(torch.isfinite(channel_values).all()):
            return f"the noise difference of {where} is constant and cannot be stretched to [0, 1]"
        return f"the noise difference of {where} holds NaN or infinity; use `dtype` bfloat16 or float32"


def initial_noise(
    seeds: Sequence[int], model: DiffusionModel, *, published: bool = False
) -> Float[Tensor, "seeds channels height width"]:
    """Returns the initial noise z_s of each seed, of unit variance, on the model's device.

    Args:
        seeds: Seeds of the latents, each of which is drawn by itself.
        model: Model that sets the shape; noise is float64 for a float64 model and float32 for all others.
        published: Draw all latents at once from the first seed, as the published code does.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    if not published:
        return row_noise(0, seeds, model.shape, device=model.device, dtype=dtype)
    generator = torch.Generator().manual_seed(seeds[0])
    return torch.randn(len(seeds), *model.shape, generator=generator).to(model.device, dtype)


def _fitting_scales(model: DiffusionModel) -> int:
    try:
        return num_scales(min(model.shape[1:]))
    except ValueError as error:
        raise IncompatibleModelError(f"{model.name} has latents of {model.shape}: {error}") from error
