"""Pictures of many captions and seeds: what has the last word on whether a model copies."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffcore.denoiser import Condition, GuidedDenoiser, sample
from diffcore.errors import MachineError
from diffcore.models import DiffusionModel
from diffcore.models.codec import MissingCodec
from diffcore.noise import row_noise
from nemo_localize.activations import prompt_encoder
from nemo_localize.score import stretched
from nemo_localize.settings import guidance

_LOG = logging.getLogger(__name__)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        guidance_scale: Classifier-free guidance; 0 and 1 are off (paper, appendix B.3: 7).
        steps: Of DDIM (paper: 50).
        batch_size: Rows per forward pass; guidance doubles them.
        reference: Draw the initial noise as the published code does: of all pictures at once, from the first seed.
    """

    guidance_scale: float = 7.0
    steps: int = 50
    batch_size: int = 64
    reference: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_scale", guidance(self.guidance_scale))

    def noise(self, seeds: Sequence[int], shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "seeds *data"]:
        """Returns the initial noise of each seed, of unit variance.

        Args:
            seeds: Of the pictures.
            shape: Of one latent.
            like: Says where the noise goes; float64 stays, everything else is float32.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if not self.reference:
            return row_noise(0, seeds, shape, device=like.device, dtype=dtype)
        generator = torch.Generator().manual_seed(seeds[0])
        return torch.randn(len(seeds), *shape, generator=generator).to(like.device, dtype)


def draw_latents(
    model: DiffusionModel, cond: Condition, seeds: Sequence[int], drawing: Drawing
) -> Float[Tensor, "prompts seeds *data"]:
    """Returns clean latents of every caption from every seed; a seed's initial noise is the same for all captions.

    Args:
        model: Enter `switched_off` before, to see it without some neurons.
        cond: One row per caption.
        seeds: Of the initial noise, numbered as those of localisation.
        drawing: How.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    parameter = next(model.backbone.parameters())
    noise = drawing.noise(seeds, model.shape, parameter)
    denoiser = model.denoiser
    if drawing.guidance_scale != 1:
        empty = {key: value.to(parameter.device) for key, value in prompt_encoder(model).unconditional(1).items()}
        denoiser = GuidedDenoiser(denoiser, drawing.guidance_scale, empty)
    count = len(next(iter(cond.values())))

    def work(rows: slice) -> Tensor:
        numbers = torch.arange(count * len(seeds), device=parameter.device)[rows]
        prompts = numbers // len(seeds)
        condition = {key: value.to(parameter.device)[prompts] for key, value in cond.items()}
        return sample(denoiser, noise[numbers % len(seeds)], condition, steps=drawing.steps)

    return torch.cat(in_batches(count * len(seeds), drawing.batch_size, work)).unflatten(0, (count, len(seeds)))


def seen(model: DiffusionModel, x0: Float[Tensor, "n c _ _"]) -> Float[Tensor, "n _ _ _"]:
    """Returns what latents look like: images, or without an autoencoder the latents, stretched to [0, 1]."""
    return stretched(x0)[0] if shows_latents(model) else model.codec.decode(x0)


def as_saved(images: Float[Tensor, "n c height width"]) -> Float[Tensor, "n c height width"]:
    """Returns images as they are once the published code has saved them: eight bits, JPEG at Pillow's usual quality."""
    saved = []
    for image in images:
        with BytesIO() as file:
            eight_bits = (image.permute(1, 2, 0).float() * 255).round().clamp(0, 255).to(torch.uint8)
            Image.fromarray(eight_bits.cpu().numpy()).save(file, "JPEG")
            with Image.open(file) as back:
                saved.append(torch.from_numpy(np.array(back)).permute(2, 0, 1).to(images) / 255)
    return torch.stack(saved)


def shows_latents(model: DiffusionModel) -> bool:
    """Returns whether a model came without its autoencoder, so that latents are all there is to look at."""
    return isinstance(model.codec, MissingCodec)


def in_batches(count: int, batch_size: int, work: Callable[[slice], T]) -> list[T]:
    """Returns what `work` makes of each batch of rows; batches are halved for good where memory runs out.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    found, start = [], 0
    while start < count:
        try:
            found.append(work(slice(start, min(start + batch_size, count))))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # Accelerators say it in a class or in words, the CPU in words of its own.
            known = isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _OUT_OF_MEMORY)
            if not known:
                raise
            if batch_size == 1:
                raise MachineError(
                    "memory does not hold a single row; free some, or use a smaller precision"
                ) from error
            batch_size //= 2
            _LOG.warning("out of memory; going on with %d rows at a time", batch_size)
            continue
        start += batch_size
    return found
