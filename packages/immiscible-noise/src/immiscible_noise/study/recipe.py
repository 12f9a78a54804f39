"""What is needed to build a trained model again around its weights, and to draw images with it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from diffcore.data import ImageSet
from diffcore.denoiser import Denoiser, NetworkDenoiser, sample
from diffcore.errors import UserError
from diffcore.noise import row_noise
from immiscible_noise.consistency import consistency_sample, sampling_levels
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.network import build_denoiser
from immiscible_noise.study.settings import FitSettings, TrainSettings

# Streams of the run's seed, apart from those of the trainer.
GRID_STREAM, SAMPLING_STREAM = 103, 104


@runtime_checkable
class AnyRecipe(Protocol):
    """A recipe, whatever is trained: a new network on pixels (`Recipe`), or a model again (`FineTuneRecipe`)."""

    @property
    def coupling(self) -> Coupling:
        """How noise met images."""
        ...

    @property
    def settings(self) -> FitSettings:
        """Length of the training, and what is kept of it."""
        ...

    @property
    def seed(self) -> int:
        """Number that fixes weights, order and noise."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        ...

    @property
    def kept_part(self) -> str:
        """Name of the part of the denoiser whose weights are kept; all of it if empty."""
        ...

    @property
    def has_codec(self) -> bool:
        """Whether images are encoded before, and decoded after."""
        ...

    def fields(self) -> dict[str, Any]:
        """Returns the recipe as plain values, which `read_recipe` reads."""
        ...

    def denoiser(self) -> Denoiser:
        """Returns the denoiser that training starts from."""
        ...

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Returns the optimizer of the training."""
        ...

    def restored(self, weights: Mapping[str, Tensor]) -> NetworkDenoiser:
        """Returns the denoiser with weights that were kept."""
        ...

    def conditions_of(self, images: ImageSet) -> Int[Tensor, " n"] | None:
        """Returns the number of each image's condition, which `generate` takes; None for a model without any."""
        ...

    def some_conditions(self, count: int) -> Int[Tensor, " count"] | None:
        """Returns conditions for a picture of samples; None for a model without any."""
        ...

    def generate(
        self,
        denoiser: Denoiser,
        rows: Int[Tensor, " b"],
        conditions: Int[Tensor, " b"] | None,
        *,
        steps: int,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
        stream: int = SAMPLING_STREAM,
    ) -> Float[Tensor, "b c h w"]:
        """Returns an image per row, from the row's own noise, whatever else is in the batch."""
        ...


@dataclass(frozen=True)
class PixelScale:
    """Maps images in [0, 1] to model space and back: `x0 = (images - mean) / std`."""

    mean: float = 0.5
    std: float = 0.5

    @classmethod
    def of(cls, images: ImageSet, normalisation: str) -> "PixelScale":
        """Returns the fixed map to [-1, 1], or the one to mean 0 and variance 1 over all pixels of the set."""
        if normalisation == "symmetric":
            return cls()
        pixels = images.images.double() / 255
        return cls(float(pixels.mean()), float(pixels.std().clamp(min=1e-3)))

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps images to x0."""
        return (images - self.mean) / self.std

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps x0 to images, unclamped: where real pixels pile up at black, clamping would shift statistics."""
        return x0 * self.std + self.mean


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build a trained model again around its weights.

    Attributes:
        coupling: How noise met images.
        settings: Objective, network and the rest, with `network` resolved.
        scale: Map from pixels to model space.
        shape: Channels, height and width of one image.
        num_classes: Number of labels of a class-conditional model, else None.
        sigma_data: Standard deviation of x0.
        seed: Number that fixed weights, order and noise.
    """

    coupling: Coupling
    settings: TrainSettings
    scale: PixelScale
    shape: tuple[int, int, int]
    num_classes: int | None
    sigma_data: float
    seed: int

    @property
    def clip_x0(self) -> float | None:
        """The largest |x0| that a pixel can have, which DDPM and DDIM clamp to; None for the other objectives."""
        if self.settings.objective != "ddpm":
            return None
        return max(self.scale.mean, 1 - self.scale.mean) / self.scale.std

    @property
    def kept_part(self) -> str:
        """Name of the part of the denoiser whose weights are kept."""
        return "backbone"

    @property
    def has_codec(self) -> bool:
        """Whether images are encoded before, and decoded after: never in pixel space."""
        return False

    def fields(self) -> dict[str, Any]:
        """Returns the recipe as plain values."""
        return asdict(self)

    def denoiser(self) -> NetworkDenoiser:
        """Builds the untrained denoiser."""
        return build_denoiser(self.settings, self.shape, self.num_classes, self.sigma_data, self.seed)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Returns Adam over the parameters."""
        return torch.optim.Adam(parameters, lr=self.settings.learning_rate, fused=True)

    def restored(self, weights: Mapping[str, Tensor]) -> NetworkDenoiser:
        """Returns the denoiser with weights that were kept."""
        denoiser = self.denoiser()
        denoiser.backbone.load_state_dict(dict(weights))
        return denoiser

    def conditions_of(self, images: ImageSet) -> Int[Tensor, " n"] | None:
        """Returns the labels of the images for a class-conditional model, else None."""
        return None if self.num_classes is None else images.labels

    @torch.no_grad()
    def generate(
        self,
        denoiser: Denoiser,
        rows: Int[Tensor, " b"],
        conditions: Int[Tensor, " b"] | None,
        *,
        steps: int,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
        stream: int = SAMPLING_STREAM,
    ) -> Float[Tensor, "b c h w"]:
        """Returns an image per row, from the row's own noise, whatever else is in the batch.

        Consistency functions are applied `steps` times, with fresh noise between; others take DDIM steps.

        Args:
            denoiser: Trained model, around whose weights the recipe was kept.
            rows: Numbers that choose the noises.
            conditions: One label per row, for a class-conditional model.
            steps: Number of solver steps; without `eta` they are Euler's.
            eta: Share of fresh noise in each solver step.
            guidance: Strength of guidance; 1, as these models know no empty condition.
            seed: Seed of all noises.
            stream: Number that keeps these noises apart from others of the seed.

        Raises:
            UserError: Guidance is asked for.
        """
        if guidance != 1:
            raise UserError(f"`guidance` is {guidance:g}, but this model knows no empty condition; leave it out")
        device = next(denoiser.parameters()).device
        noise = row_noise(seed, rows, self.shape, stream=stream, device=device)
        cond = {} if conditions is None else {"class_labels": conditions.to(device)}
        if self.settings.consistency:
            assert isinstance(denoiser, NetworkDenoiser)  # as `denoiser` builds it
            x0 = consistency_sample(denoiser, noise, cond, sigmas=sampling_levels(steps), seeds=rows.to(device))
            return self.scale.decode(x0)
        x0 = sample(denoiser, noise, cond, steps=steps, eta=eta, seeds=rows.to(device), clip_x0=self.clip_x0)
        return self.scale.decode(x0)

    def some_conditions(self, count: int) -> Int[Tensor, " count"] | None:
        """Returns each label in turn for a class-conditional model, else None."""
        return None if self.num_classes is None else torch.arange(count) % self.num_classes

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Recipe":
        """Reads what `dataclasses.asdict` made of a recipe; earlier versions called the coupling "arm"."""
        return cls(
            coupling=Coupling(**fields.get("coupling", fields.get("arm"))),
            settings=TrainSettings(**fields["settings"]),
            scale=PixelScale(**fields["scale"]),
            shape=tuple(fields["shape"]),
            num_classes=fields["num_classes"],
            sigma_data=fields["sigma_data"],
            seed=fields["seed"],
        )
