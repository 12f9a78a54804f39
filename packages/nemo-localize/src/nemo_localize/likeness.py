"""How similar images are, by the best measure that there are weights for; its name goes into every table.

With weights it is the cosine of SSCD's copy-detection features, or of another extractor's; without, the structural
similarity of pixels, or of latents where the model has no autoencoder. Values of two measures do not compare.

Copy-detection features find any two images of noise alike, so a model that generates noise would seem to copy. Here
the likeness of such an image to any other is 0, and `Likeness.is_noise` finds it.

References:
    Hintersdorf, Struppek et al. 2024, appendix C.1 and their code: SSCD on images of 320 x 320, whatever their
    proportions. SSIM: Wang et al. 2004.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffcore.metrics import FeatureExtractor, pairwise_ssim, resize
from diffcore.metrics.copies import looks_like_noise, noise_pictures
from diffcore.metrics.preprocess import SSCD

Describe = Callable[[Tensor], Tensor]
_PAPER_SSCD = replace(SSCD, size=(320, 320))


@dataclass(frozen=True)
class Likeness:
    """A measure of how alike two images are: 1 for identical ones.

    Attributes:
        name: Name in tables, such as "SSCD", "SSIM" or "cosine".
        source: Network and preprocessing in words.
        describe: Function from images to unit feature rows, whose products are compared; None for SSIM.
        noise: Feature rows of noise images, by which noise is recognised; None where it would not look alike.
    """

    name: str
    source: str
    describe: Describe | None = None
    noise: Float[Tensor, "n d"] | None = None

    def is_noise(self, images: Float[Tensor, "m c height width"]) -> Bool[Tensor, " m"]:
        """Returns which images are noise; none where noise is not mistaken for likeness."""
        if self.describe is None or self.noise is None:
            return torch.zeros(len(images), dtype=torch.bool, device=images.device)
        return looks_like_noise(self.describe(images), self.noise)

    def towards(
        self, originals: Float[Tensor, "n c _ _"], images: Float[Tensor, "m c height width"]
    ) -> Float[Tensor, " m"]:
        """Returns how alike each image is to the original that it is most alike."""
        if self.describe is not None:
            return (self._rows(images) @ self.describe(originals).T).amax(1)
        if originals.shape[-2:] != images.shape[-2:]:
            originals = resize(originals, cast(tuple[int, int], tuple(images.shape[-2:]))).clamp(0, 1)
        return torch.stack([self.between(images, one.expand_as(images)) for one in originals]).amax(0)

    def between(
        self, a: Float[Tensor, "n c height width"], b: Float[Tensor, "n c height width"]
    ) -> Float[Tensor, " n"]:
        """Returns how alike the images of each row are."""
        if self.describe is not None:
            return (self._rows(a) * self._rows(b)).sum(1)
        return pairwise_ssim(torch.stack([a, b], 1), data_range=1.0)[:, 0]

    def pairs(self, images: Float[Tensor, "prompts seeds c height width"]) -> Float[Tensor, "prompts pairs"]:
        """Returns how alike all pairs of a prompt's images are."""
        if self.describe is None:
            return pairwise_ssim(images, data_range=1.0)
        rows = self._rows(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        first, second = torch.triu_indices(images.shape[1], images.shape[1], offset=1, device=rows.device)
        return (rows[:, first] * rows[:, second]).sum(2)

    def _rows(self, images: Tensor) -> Float[Tensor, "m d"]:
        """Returns unit rows, and zeros for noise."""
        assert self.describe is not None
        rows = self.describe(images)
        return rows if self.noise is None else rows.masked_fill(looks_like_noise(rows, self.noise)[:, None], 0.0)


def likeness(extractor: FeatureExtractor | None = None, *, of_latents: bool = False) -> Likeness:
    """Returns the measure that an extractor makes, or the substitute without one.

    Args:
        extractor: Network `sscd:FILE` as in the paper, or any other, which is named as a substitute.
        of_latents: Whether images are latents, each channel stretched to [0, 1].
    """
    if extractor is None:
        what = "latents, each channel stretched to [0, 1]" if of_latents else "pixels"
        return Likeness("SSIM", f"structural similarity of {what}, window 11; stands in for SSCD")
    if of_latents:
        raise ValueError(f"{extractor.name} looks at images, and the model has no autoencoder to make them")
    copies = extractor.name.startswith("sscd:")
    preparation = _PAPER_SSCD if copies else extractor.preprocessing

    def describe(images: Tensor) -> Tensor:
        device = next((parameter.device for parameter in extractor.parameters()), images.device)
        rows = extractor.embed(preparation(images.to(device).float()))
        return functional.normalize(rows, dim=1).to(images.device)

    if copies:
        source = f"cosine, {extractor.name} at 320 x 320, sha256 {extractor.sha256[:12]}"
        return Likeness("SSCD", source, describe, describe(noise_pictures()))
    source = f"cosine, {extractor.name}, sha256 {extractor.sha256[:12]}; stands in for SSCD"
    return Likeness("cosine", source, describe)
