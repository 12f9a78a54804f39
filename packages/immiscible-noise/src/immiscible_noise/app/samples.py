"""Samples as a diffusion sees them, from a file of cached latents or from a folder of images."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffcore.errors import UserError, printable
from diffcore.io.files import sha256
from immiscible_noise.app.options import Data
from immiscible_noise.study.recipe import PixelScale

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Samples:
    """Clean samples with their labels.

    Attributes:
        x0: Samples in model space.
        labels: One label per sample; None without any.
        inputs: Digest of where they come from, by name.
        latents: Whether they are latents from a file, and not images.
        scale: Map from pixels to model space; None for latents.
    """

    x0: Tensor
    labels: Tensor | None
    inputs: dict[str, str]
    latents: bool
    scale: PixelScale | None = None


def read_samples(data: Path, images: Data, normalisation: str, *, at_least: int = 1) -> Samples:
    """Returns samples in model space, their labels if there are any, and the sha256 of where they come from.

    Args:
        data: Safetensors file with a tensor `latents` (samples, ...) and perhaps integers `labels`, or folder or zip of
            images.
        images: Settings with which images are read.
        normalisation: Map of pixels to model space.
        at_least: Number of samples that the command needs.

    Raises:
        UserError: The file holds no latents, numbers that are not finite, or labels that do not fit them.
    """
    if data.suffix != SUFFIX:
        loaded, inputs = images.read(data, at_least=at_least)
        scale = PixelScale.of(loaded, normalisation)
        return Samples(scale.encode(loaded.images.float() / 255), loaded.labels, inputs, latents=False, scale=scale)
    try:
        tensors = load_file(data)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{printable(data)} cannot be read as a safetensors file: {printable(error, 200)}") from error
    latents, labels = tensors.get("latents"), tensors.get("labels")
    if latents is None or latents.ndim < 2 or not latents.is_floating_point() or len(latents) == 0:
        raise UserError(
            f"{printable(data)} has no floating tensor `latents` with a first dimension of samples; "
            f"it has {', '.join(map(printable, sorted(tensors))) or 'nothing'}"
        )
    if len(latents) < at_least:
        raise UserError(f"{printable(data)} has {len(latents)} latent; this command needs at least {at_least}")
    finite = latents.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise UserError(f"latent {int((~finite).nonzero()[0])} of {printable(data)} holds NaN or infinite numbers")
    if labels is not None and (labels.shape != latents.shape[:1] or labels.is_floating_point()):
        raise UserError(f"`labels` of {printable(data)} are not one integer for each of {len(latents)} latents")
    return Samples(latents, labels, {printable(data.name): sha256(data)}, latents=True)
