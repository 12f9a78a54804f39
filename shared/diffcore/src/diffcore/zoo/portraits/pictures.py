"""The images that the portraits models are trained on, and those that they are judged by."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffcore.zoo.patch_code import PatchCode
from diffcore.zoo.portraits.captions import ordinary_captions
from diffcore.zoo.portraits.draw import draw
from diffcore.zoo.portraits.people import People, portraits
from diffcore.zoo.portraits.planted import planted

SIZE = 32
NUM_TRAINING, NUM_HELD_OUT, CAPTIONS_PER_PICTURE = 20_000, 2_000, 4
LATENT_CHANNELS = 8
# The leading components (brightness and two colours) at unit variance, the finer ones a little smaller.
_LATENT_STDS = (1.0, 1.0, 1.0, 0.7, 0.7, 0.7, 0.7, 0.7)
_TRAINING_SEED, _HELD_OUT_SEED = 1, 2


@dataclass(frozen=True)
class Pictures:
    """Portraits with the attributes that they were rendered from.

    Attributes:
        people: Attributes of the person in each image, one row each.
        images: 8-bit pixels, as files would hold them.
    """

    people: People
    images: UInt8[Tensor, "n 3 size size"]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def captions(self) -> list[str]:
        """Training captions, several per image: caption k of image i is entry `k * n + i`."""
        excluded = planted().captions
        rounds = (ordinary_captions(self.people, seed, excluded) for seed in range(CAPTIONS_PER_PICTURE))
        return [caption for captions in rounds for caption in captions]

    def floats(self, rows: Tensor | slice = slice(None)) -> Float[Tensor, "m 3 size size"]:
        """Returns some images in [0, 1]."""
        return self.images[rows].float() / 255


def draw_pictures(people: People, size: int = SIZE) -> Pictures:
    """Returns people with their images."""
    return Pictures(people, to_bytes(draw(people, size)))


def to_bytes(images: Float[Tensor, "n 3 size size"]) -> UInt8[Tensor, "n 3 size size"]:
    """Returns images in [0, 1] as 8-bit numbers."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def training_pictures(count: int = NUM_TRAINING) -> Pictures:
    """Returns the first images of the training set."""
    return draw_pictures(portraits(_TRAINING_SEED, range(count)))


def held_out_pictures(count: int = NUM_HELD_OUT) -> Pictures:
    """Returns the first images of strangers that no training contains."""
    return draw_pictures(portraits(_HELD_OUT_SEED, range(count)))


def fit_patch_code(pictures: Pictures) -> PatchCode:
    """Returns the 2x2 patch code of 8 channels, fitted on the first 3000 images."""
    stds = torch.tensor(_LATENT_STDS)
    return PatchCode.fit(pictures.floats(slice(3000)), LATENT_CHANNELS, patch=2, stds=stds)


def encode_pictures(code: PatchCode, pictures: Pictures) -> Float[Tensor, "n k rows columns"]:
    """Returns the latents in float16, the precision in which they are kept for training."""
    return torch.cat([code.encode(images.float() / 255).half() for images in pictures.images.split(1000)])
