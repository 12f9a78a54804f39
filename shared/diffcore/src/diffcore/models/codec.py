"""Codecs between images in [0, 1] and the x0 of a model: scaled latents, or pixels in [-1, 1]."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError, printable
from diffcore.noise import philox_normal

_STREAM = int.from_bytes(b"vae")  # keeps the draws of posteriors apart from others of the same seed


class Codec(ABC):
    """Encodes images in [0, 1] as x0, and decodes x0 to images."""

    @abstractmethod
    def encode(
        self,
        images: Float[Tensor, "b c height width"],
        *,
        sample: bool = False,
        seeds: Int[Tensor, " b"] | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "b *data"]:
        """Returns the x0 that images in [0, 1] are encoded as.

        Args:
            images: Images with values in [0, 1].
            sample: Whether x0 is drawn from the posterior instead of its mode, where there is one.
            seeds: One seed per image, needed for `sample`.
            grad: Whether to keep the graph, so that gradients flow back to the images.
        """

    @abstractmethod
    def posterior(
        self, images: Float[Tensor, "b c height width"], *, grad: bool = False
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
        """Returns mean and standard deviation of the x0 that images in [0, 1] may be encoded as.

        Args:
            images: Images with values in [0, 1].
            grad: Whether to keep the graph, so that gradients flow back to the images.
        """

    @abstractmethod
    def decode(self, x0: Float[Tensor, "b *data"]) -> Float[Tensor, "b c height width"]:
        """Returns images in [0, 1], in float32."""


class PixelCodec(Codec):
    """The codec of pixel-space models: x0 is the image in [-1, 1]."""

    def encode(
        self,
        images: Float[Tensor, "b c height width"],
        *,
        sample: bool = False,
        seeds: Int[Tensor, " b"] | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "b *data"]:
        """Returns 2 images - 1."""
        return 2 * images - 1

    def posterior(
        self, images: Float[Tensor, "b c height width"], *, grad: bool = False
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
        """Returns 2 images - 1, without any deviation."""
        return 2 * images - 1, torch.zeros_like(images)

    def decode(self, x0: Float[Tensor, "b *data"]) -> Float[Tensor, "b c height width"]:
        """Returns (x0 + 1) / 2, within [0, 1]."""
        return ((x0.float() + 1) / 2).clamp(0, 1)


class LatentCodec(Codec):
    """The codec of latent models: x0 = (z - shift) scaling, where z is what the autoencoder encodes.

    Args:
        vae: An `AutoencoderKL` of diffusers.
    """

    def __init__(self, vae: nn.Module) -> None:
        config: Any = vae.config
        self.vae = vae
        self.scaling: float | Tensor = float(config["scaling_factor"])
        self.shift: float | Tensor = float(config.get("shift_factor") or 0.0)
        if config.get("latents_mean") and config.get("latents_std"):
            self.scaling = self.scaling / torch.tensor(config["latents_std"]).view(-1, 1, 1)
            self.shift = torch.tensor(config["latents_mean"]).view(-1, 1, 1)
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    def encode(
        self,
        images: Float[Tensor, "b c height width"],
        *,
        sample: bool = False,
        seeds: Int[Tensor, " b"] | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "b *data"]:
        """Returns scaled latents: the posterior's mode, or a draw from it."""
        if sample and seeds is None:
            raise ValueError("`sample` is on without `seeds`; pass one seed per image")
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            posterior = self._posterior(images)
            z = posterior.mode().float()
            if sample and seeds is not None:
                noise = philox_normal(0, seeds, z.shape[1:], step=0, stream=_STREAM, device=z.device, dtype=z.dtype)
                z = z + posterior.std.float() * noise
            return (z - _beside(self.shift, z)) * _beside(self.scaling, z)

    def posterior(
        self, images: Float[Tensor, "b c height width"], *, grad: bool = False
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
        """Returns mean and standard deviation of scaled latents."""
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            posterior = self._posterior(images)
            z, std = posterior.mode().float(), posterior.std.float()
            scaling = _beside(self.scaling, z)
            return (z - _beside(self.shift, z)) * scaling, std * scaling

    def _posterior(self, images: Tensor) -> Any:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            near = [max(round(side / self.factor), 1) * self.factor for side in (height, width)]
            raise ValueError(
                f"images are {height}x{width}; sides must be multiples of {self.factor}, such as {near[0]}x{near[1]}"
            )
        parameter = next(self.vae.parameters())
        return self.vae.encode((2 * images - 1).to(parameter), return_dict=False)[0]  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def decode(self, x0: Float[Tensor, "b *data"]) -> Float[Tensor, "b c height width"]:
        """Returns the images that latents stand for."""
        parameter = next(self.vae.parameters())
        z = (x0.float() / _beside(self.scaling, x0) + _beside(self.shift, x0)).to(parameter)
        return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)  # pyright: ignore[reportCallIssue]


def _beside(value: float | Tensor, latents: Tensor) -> float | Tensor:
    return value.to(latents.device) if isinstance(value, Tensor) else value


class MissingCodec(Codec):
    """The codec of a latent model without an autoencoder: it refuses to encode and decode.

    Args:
        name: The model's name in error messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(
        self,
        images: Float[Tensor, "b c height width"],
        *,
        sample: bool = False,
        seeds: Int[Tensor, " b"] | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "b *data"]:
        """Raises IncompatibleModelError."""
        raise self._refusal()

    def posterior(
        self, images: Float[Tensor, "b c height width"], *, grad: bool = False
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
        """Raises IncompatibleModelError."""
        raise self._refusal()

    def decode(self, x0: Float[Tensor, "b *data"]) -> Float[Tensor, "b c height width"]:
        """Raises IncompatibleModelError."""
        raise self._refusal()

    def _refusal(self) -> IncompatibleModelError:
        return IncompatibleModelError(
            f"{printable(self.name)} came without an autoencoder; load the pipeline folder with its vae"
        )
