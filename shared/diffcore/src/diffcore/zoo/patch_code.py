"""A fixed linear code of images: principal components of small patches, scaled to unit variance.

It needs no training, keeps more detail than a small learned autoencoder, and its channels suit a diffusion model: they
are centred, uncorrelated, and of known variance.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PatchCode:
    """A linear code between images in [0, 1] and latents, which are `patch` times smaller on each side.

    Attributes:
        mean: Mean of the patches, with pixels in [-1, 1].
        basis: Orthonormal columns, one per latent channel.
        scale: Length in patch space that a latent of 1 stands for, per channel.
        patch: Side of a patch in pixels.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d k"]
    scale: Float[Tensor, " k"]
    patch: int

    @classmethod
    def fit(
        cls, images: Float[Tensor, "n c h w"], channels: int, *, patch: int = 2, stds: Float[Tensor, " k"]
    ) -> "PatchCode":
        """Fits a code to images: the leading principal components of their patches.

        Args:
            images: Images with values in [0, 1].
            channels: Number of latent channels to keep.
            patch: Side of a patch in pixels.
            stds: Desired standard deviation of each latent channel.
        """
        patches = F.pixel_unshuffle(images * 2 - 1, patch).movedim(1, -1).flatten(0, 2)
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T.double()))
        basis = vectors.flip(1)[:, :channels]
        basis = basis * basis.sum(0).sign()  # eigenvectors come with either sign
        return cls(mean, basis.float().contiguous(), values.flip(0)[:channels].sqrt().float() / stds, patch)

    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k rows columns"]:
        """Returns the latents of images in [0, 1]."""
        patches = F.pixel_unshuffle(images * 2 - 1, self.patch) - self.mean.view(-1, 1, 1)
        return torch.einsum("nchw,ck->nkhw", patches, self.basis / self.scale)

    def decode(self, latents: Float[Tensor, "n k rows columns"]) -> Float[Tensor, "n c h w"]:
        """Returns the images in [0, 1]; what falls outside is clamped."""
        patches = torch.einsum("nkhw,ck->nchw", latents, self.basis * self.scale) + self.mean.view(-1, 1, 1)
        return (F.pixel_shuffle(patches, self.patch) / 2 + 0.5).clamp(0, 1)
