"""The first denoising step of many captions, seeds and sets of switched-off neurons, row by row in one forward pass.

Values depend on the caption alone, so a set of neurons is a multiplier on a row's values: rows of one batch need not
share caption, seed or set.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import Condition, GuidedDenoiser
from diffcore.errors import IncompatibleModelError, MachineError
from diffcore.models import DiffusionModel
from diffcore.noise import row_noise
from nemo_localize.activations import prompt_encoder
from nemo_localize.score import PUBLISHED_TORCHMETRICS, noise_difference, num_scales, stretched
from nemo_localize.settings import StepSettings
from nemo_localize.sites import switched_off, value_sites

_LOG = logging.getLogger(__name__)
# How far a score may move with the batch it is computed in, ten times over: nearer to a threshold it is computed alone.
_MARGINS = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_MARGIN = 1e-2
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class Row(NamedTuple):
    """One latent through the network.

    Attributes:
        prompt: Index of the caption in its condition.
        seed: Index of the seed.
        off: Numbers of the neurons that are off.
    """

    prompt: int
    seed: int
    off: frozenset[int] = frozenset()


class FirstStep:
    """What a model makes of pure noise, as its captions and value neurons have it. Counts what it costs.

    Args:
        model: A text-conditioned U-Net with its text encoder.
        settings: The step and the seeds.
        batch_size: Rows per forward pass; halved for good where memory runs out.
        up: Search the up blocks too.

    Attributes:
        sites: The value layers.
        num_rows: Rows computed so far; guidance costs two for one.
        num_calls: Forward passes so far.

    Raises:
        IncompatibleModelError: The model has no value layers or no text encoder, or its latents are too small.
    """

    def __init__(
        self, model: DiffusionModel, settings: StepSettings, *, batch_size: int = 64, up: bool = False
    ) -> None:
        self.model = model
        self.settings = settings
        self.batch_size = batch_size
        self.sites = value_sites(model.backbone, up=up)
        self.encoder = prompt_encoder(model)
        self.num_rows = self.num_calls = 0
        parameter = next(model.backbone.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.shape = model.shape
        self.scales = _fitting_scales(model, self.shape)
        schedule = model.denoiser.schedule
        self.t = float(schedule.timesteps(settings.steps)[settings.at_step - 1])
        self.noise = self._draw()
        level = torch.tensor([self.t], dtype=torch.float64)
        self._x_t = self.noise * float(schedule.initial_scale(level))

    @property
    def reference(self) -> bool:
        """Whether the published code is reproduced."""
        return self.settings.compat == "reference"

    @property
    def margin(self) -> float:
        """Scores nearer than this to a threshold are computed alone; 0 where scores depend on their batch anyway."""
        return 0.0 if self.reference else _MARGINS.get(self.dtype, _HALF_MARGIN)

    @property
    def rows_per_row(self) -> int:
        """Rows that the network sees for one of ours: guidance needs two."""
        return 1 if self.settings.guidance_scale == 1 else 2

    @property
    def digest(self) -> str:
        """What a threshold depends on, as a digest: settings, latents, timestep, precision, number of scales."""
        parts = {
            **{name: value for name, value in asdict(self.settings).items() if name != "at_step"},  # t says it
            "shape": list(self.shape),
            "t": self.t,
            "prediction_type": self.model.denoiser.prediction_type,
            "dtype": str(self.dtype),
            "scales": self.scales,
            # Whose border the coarsest scale has.
            "torchmetrics": PUBLISHED_TORCHMETRICS if self.reference else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def __call__(
        self, cond: Condition, rows: Sequence[Row], *, scale: float = 0.0
    ) -> tuple[Float[Tensor, "rows channels height width"], dict[int, str]]:
        """Returns the stretched noise difference of each row, and for rows without one the reason.

        Args:
            cond: Of the captions that rows refer to.
            rows: Any number; computed `batch_size` at a time.
            scale: What neurons that are off are multiplied with.

        Raises:
            MachineError: Memory does not hold a single row.
        """
        deltas, troubles = [self.noise.new_empty(0, *self.shape)], dict[int, str]()
        start = 0
        while start < len(rows):
            batch = rows[start : start + self.batch_size]
            try:
                delta = self._forward(cond, batch, scale)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                self._halve(error)
                continue
            unit, bad = stretched(delta)
            deltas.append(unit)
            if bool(bad.any()):
                for row, channel in bad.nonzero().tolist():
                    troubles.setdefault(start + row, self._trouble(delta[row, channel], batch[row].seed, channel))
            start += len(batch)
        return torch.cat(deltas), troubles

    def alone(
        self, cond: Condition, rows: Sequence[Row], *, scale: float = 0.0
    ) -> tuple[Float[Tensor, "rows channels height width"], dict[int, str]]:
        """Returns what `self(cond, rows)` does, each row computed in a batch of its own."""
        found = [self(cond, [row], scale=scale) for row in rows]
        troubles = {index: reason for index, (_, trouble) in enumerate(found) for reason in trouble.values()}
        return torch.cat([delta for delta, _ in found]), troubles

    def _forward(self, cond: Condition, rows: Sequence[Row], scale: float = 0.0) -> Tensor:
        seeds = torch.tensor([row.seed for row in rows], device=self.device)
        noise, x_t = self.noise[seeds], self._x_t[seeds]
        prompts = torch.tensor([row.prompt for row in rows])
        condition = {key: value[prompts.to(value.device)] for key, value in cond.items()}
        denoiser = self.model.denoiser
        off = self.sites.table([row.off for row in rows])
        if self.rows_per_row == 2:
            denoiser, condition = self._guided(condition)
            off = off.repeat(2, 1)
        some = any(row.off for row in rows)
        blocked = switched_off(self.model.backbone, self.sites, off, scale=scale) if some else nullcontext()
        with blocked:
            prediction = denoiser(x_t, torch.full((len(rows),), self.t, device=self.device), condition)
        self.num_rows += self.rows_per_row * len(rows)
        self.num_calls += 1
        return noise_difference(prediction, noise, self.model.denoiser.schedule, self.t)

    def _guided(self, condition: Condition) -> tuple[GuidedDenoiser, Condition]:
        """Returns the guided denoiser and its condition; the published code takes the two branches for one another."""
        empty = self.encoder.unconditional(1)
        count = len(next(iter(condition.values())))
        if self.reference:
            empty = {key: value.expand(count, *value.shape[1:]) for key, value in empty.items()}
            condition, empty = empty, condition
        return GuidedDenoiser(self.model.denoiser, self.settings.guidance_scale, empty), condition

    def _draw(self) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.reference:
            generator = torch.Generator().manual_seed(self.settings.first_seed)
            drawn = torch.randn(self.settings.num_seeds, *self.shape, generator=generator)
            return drawn.to(self.device, dtype)
        return row_noise(0, self.settings.seeds, self.shape, device=self.device, dtype=dtype)

    def _halve(self, error: RuntimeError) -> None:
        # Accelerators say it in a class or in words, the CPU in words of its own.
        if not (isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _OUT_OF_MEMORY)):
            raise error
        if self.batch_size == 1:
            raise MachineError("memory does not hold a single row; free some, or use a smaller precision") from error
        self.batch_size //= 2
        _LOG.warning("out of memory; going on with %d rows at a time", self.batch_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _trouble(self, channel_values: Tensor, seed: int, channel: int) -> str:
        where = f"seed {self.settings.seeds[seed]}, channel {channel}"
        if bool(torch.isfinite(channel_values).all()):
            return f"the noise difference of {where} is constant and cannot be stretched to [0, 1]"
        return f"the noise difference of {where} holds NaN or infinity; use --dtype bfloat16 or float32"


def _fitting_scales(model: DiffusionModel, shape: tuple[int, int, int]) -> int:
    try:
        return num_scales(min(shape[1:]))
    except ValueError as error:
        raise IncompatibleModelError(f"{model.name} cannot be scored: {error}") from None
