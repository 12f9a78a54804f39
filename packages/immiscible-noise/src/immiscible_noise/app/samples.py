"""Samples as a diffusion sees them, from a file of cached latents or from a folder of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
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
        x0: Samples in model space; a list of them where they come in buckets of several shapes.
        labels: One label per sample; None without any.
        inputs: Digest of where they come from, by name.
        latents: Whether they are latents from a file, and not images.
        scale: Map from pixels to model space; None for latents.
    """

    x0: Tensor | list[Tensor]
    labels: Tensor | None
    inputs: dict[str, str]
    latents: bool
    scale: PixelScale | None = None

    @property
    def table(self) -> Tensor:
        """All samples as one tensor.

        Raises:
            UserError: They have several shapes.
        """
        if isinstance(self.x0, Tensor):
            return self.x0
        raise UserError(f"the latents have several shapes ({self.shapes}); give a file with those of one shape")

    @property
    def shapes(self) -> str:
        """The shapes of the samples, in words."""
        if isinstance(self.x0, Tensor):
            return "x".join(map(str, self.x0.shape[1:]))
        return ", ".join(dict.fromkeys("x".join(map(str, sample.shape)) for sample in self.x0))


def read_samples(data: Path, images: Data, normalisation: str, *, at_least: int = 1) -> Samples:
    """Returns samples in model space, their labels if there are any, and the sha256 of where they come from.

    Args:
        data: Safetensors file with a tensor `latents` (samples, ...) and perhaps integers `labels`, or with several,
            `latents.NAME` and `labels.NAME`, one for each shape; or folder or zip of images.
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
    names = ["latents"] if "latents" in tensors else sorted(name for name in tensors if name.startswith("latents."))
    if not names:
        found = sorted(tensors)
        held = ", ".join(map(printable, found[:5])) + (", …" if len(found) > 5 else "")
        raise UserError(
            f"{printable(data)} has no tensor latents, nor latents.NAME for each shape; it has {held or 'nothing'}"
        )
    for name in names:
        _check(data, tensors, name)
    parts = [tensors[name] for name in names]
    labels = [tensors.get(name.replace("latents", "labels", 1)) for name in names]
    count = sum(map(len, parts))
    if count < at_least:
        raise UserError(f"{printable(data)} has {count} latent; this command needs at least {at_least}")
    given = [part for part in labels if part is not None]
    if len(given) not in (0, len(names)):
        raise UserError(f"{printable(data)} has labels for {len(given)} of its {len(names)} shapes; give all or none")
    x0 = parts[0] if len(parts) == 1 else [sample for part in parts for sample in part]
    return Samples(x0, torch.cat(given) if given else None, {printable(data.name): sha256(data)}, latents=True)


def _check(data: Path, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises an error where latents, or their labels, are of no use."""
    latents, labels = tensors[name], tensors.get(name.replace("latents", "labels", 1))
    if latents.ndim < 2 or not latents.is_floating_point() or len(latents) == 0:
        raise UserError(
            f"{printable(name)} of {printable(data)} is no floating tensor with a first dimension of samples"
        )
    finite = latents.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise UserError(
            f"latent {int((~finite).nonzero()[0])} of {printable(name)} in {printable(data)} holds NaN or infinite "
            "numbers"
        )
    if labels is not None and (labels.shape != latents.shape[:1] or labels.is_floating_point()):
        raise UserError(
            f"labels of {printable(name)} in {printable(data)} are not one integer for each of {len(latents)} latents"
        )
