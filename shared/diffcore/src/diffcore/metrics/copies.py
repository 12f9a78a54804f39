"""Detecting copies by copy-detection features, and images of noise that such features mistake for copies.

In such features any two images of noise are similar, the more so the more similar their grain: independent ones reach a
cosine of 0.78 in SSCD, above every threshold in use, where unrelated photographs stay near 0. A model that collapses to
noise would seem to copy. So images are compared with noise of many grains first.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffcore.metrics.features import FeatureExtractor
from diffcore.noise import row_noise

COPY = 0.5  # cosine of SSCD's features above which Somepalli et al. 2023 speak of a copy
_NOISE = 0.45  # cosine with the nearest of them: noise of 15 kinds had 0.51 and more, photographs and drawings 0.35
_SIDE = 288
# Independent points along a side, and how they are joined: as small images are enlarged, or smoothly.
_GRAINS = {"bilinear": (16, 24, 32, 48, 64, 96, 128, 192, 288), "bicubic": (8, 12, 16, 24, 32, 48)}


def noise_pictures() -> Float[Tensor, "n 3 288 288"]:
    """Returns images of noise in [0, 1], in colour and in grey, from coarse to fine grain; always the same ones."""
    pictures = []
    for filter, grain in ((filter, grain) for filter, grains in _GRAINS.items() for grain in grains):
        colour, grey = row_noise(0, range(2), (3, grain, grain))
        rows = torch.stack([colour, grey[:1].expand_as(grey)])
        enlarged = functional.interpolate(rows, (_SIDE, _SIDE), mode=filter, align_corners=False)
        pictures.append((0.5 + 0.23 * enlarged / enlarged.std((1, 2, 3), keepdim=True)).clamp(0, 1))
    return torch.cat(pictures)


def looks_like_noise(features: Float[Tensor, "b d"], noise: Float[Tensor, "n d"]) -> Bool[Tensor, " b"]:
    """Returns which images are noise, whatever they are compared with.

    Args:
        features: Copy-detection features of the images.
        noise: Features of `noise_pictures` by the same network.
    """
    rows, references = (functional.normalize(x.float(), dim=1) for x in (features, noise.to(features.device)))
    return (rows @ references.T).amax(1) > _NOISE


def noise_of(extractor: FeatureExtractor) -> Float[Tensor, "n d"] | None:
    """Returns the features of `noise_pictures` by a network that finds copies; None for any other network."""
    if not extractor.name.startswith("sscd:"):
        return None
    device = next((parameter.device for parameter in extractor.parameters()), torch.device("cpu"))
    return extractor(noise_pictures().to(device)).cpu()
