"""Projecting features to fewer channels: principal components of the first images, or random directions.

A projection is linear, so it commutes with averaging noise draws and with resizing. It is applied in the hook, so that
full-width maps never leave it; 64 of 1280 channels take a twentieth of the disk.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.errors import UserError
from diffcore.noise import mix_seed
from diffcore.stats import RunningCovariance

_PLACES = 1024  # places of each image that principal components are read from


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of one activation's channels.

    Attributes:
        mean: Mean of each channel, which is subtracted first.
        basis: Directions as columns, from channels to the channels that are kept.
        explained: Share of the variance that the directions hold, from 0 to 1; None where it was not measured.

    Example:
        >>> projection = random_projection("mid-vit-out", 8, 2)
        >>> tuple(projection(torch.rand(3, 8, 4, 5)).shape)
        (3, 2, 4, 5)
    """

    mean: Float[Tensor, " c"]
    basis: Float[Tensor, "c d"]
    explained: float | None = None

    def __call__(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Returns projected maps in float32.

        Raises:
            ValueError: The maps have another number of channels.
        """
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"the projection takes {len(self.mean)} channels, and the features have {features.shape[1]}"
            )
        centred = features.movedim(1, -1).float() - self.mean.to(features.device)
        return (centred @ self.basis.to(features.device)).movedim(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the projection as tensors by name, for storing."""
        explained = float("nan") if self.explained is None else self.explained
        return {"mean": self.mean, "basis": self.basis, "explained": torch.tensor(explained, dtype=torch.float64)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Projection":
        """Returns the projection that `tensors` gave."""
        explained = float(tensors["explained"])
        return cls(tensors["mean"], tensors["basis"], None if explained != explained else explained)


class PrincipalComponents:
    """Finds the principal components of one activation from a streamed covariance, in float64.

    Args:
        channels: Number of channels of the activation.
        device: Device that the covariance is kept on.

    Example:
        >>> line = torch.linspace(-1, 1, 9).view(1, 1, 3, 3)
        >>> components = PrincipalComponents(2)
        >>> components.add(torch.cat([3 * line, 4 * line], dim=1))
        >>> found = components.projection(1)
        >>> found.basis.flatten().tolist(), round(found.explained, 6)
        ([0.6000000238418579, 0.800000011920929], 1.0)
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sums = RunningCovariance(channels).to(device)

    def add(self, features: Float[Tensor, "b c h w"]) -> None:
        """Adds maps, of which at most 1024 evenly spaced places of each image count."""
        places = features.detach().flatten(2)
        if (total := places.shape[2]) > _PLACES:
            # Spaced by the golden ratio, so that they fall into all columns of a grid of any width.
            chosen = (torch.arange(_PLACES, dtype=torch.float64) * 0.6180339887498949 % 1 * total).long()
            places = places[:, :, chosen.to(places.device)]
        self._sums.update(places.transpose(1, 2).flatten(0, 1))

    def projection(self, kept: int) -> Projection:
        """Returns the projection to the leading components, each with its largest entry positive.

        Args:
            kept: Number of components that are kept.

        Raises:
            UserError: There are not as many channels, or fewer than two places were added.
        """
        count, mean, covariance = self._sums.compute()
        channels = len(mean)
        if not 1 <= kept <= channels:
            raise UserError(f"{kept} components are wanted of {channels} channels; give a number from 1 to {channels}")
        if count < 2:
            raise UserError("principal components need at least two places; add features of some images first")
        values, vectors = torch.linalg.eigh(covariance.cpu())
        basis = vectors.flip(1)[:, :kept]
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        basis = basis * largest.sign()
        total = values.clamp(min=0).sum()
        explained = float(values.flip(0)[:kept].clamp(min=0).sum() / total) if total > 0 else 1.0
        return Projection(mean.float().cpu(), basis.float().contiguous(), explained)


def random_projection(name: str, channels: int, kept: int) -> Projection:
    """Returns a random projection that keeps inner products on average, the same for a name at any time.

    Args:
        name: Name of the activation, which is the seed.
        channels: Number of channels of the activation.
        kept: Number of directions; all channels stay as they are where there are no more than these.

    Example:
        >>> torch.equal(random_projection("a", 4, 2).basis, random_projection("a", 4, 2).basis)
        True
    """
    if kept < 1:
        raise UserError(f"{kept} directions are wanted; give at least 1")
    if kept >= channels:
        return Projection(torch.zeros(channels), torch.eye(channels))
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    generator = torch.Generator().manual_seed(mix_seed(digest, channels, kept))
    return Projection(torch.zeros(channels), torch.randn(channels, kept, generator=generator) / kept**0.5)
