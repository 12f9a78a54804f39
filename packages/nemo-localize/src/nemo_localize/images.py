"""Images of prompts and seeds, which show whether a model copies."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.denoiser import Condition
from diffcore.models import DiffusionModel
from diffcore.models import generate as generate_images
from diffcore.models.codec import MissingCodec
from nemo_localize.first_step import initial_noise
from nemo_localize.score import stretched
from nemo_localize.settings import ImageSettings


def generate_latents(
    model: DiffusionModel, cond: Condition, seeds: Sequence[int], settings: ImageSettings
) -> Float[Tensor, "prompts seeds *data"]:
    """Returns clean latents of every prompt from every seed; a seed's initial noise is the same for all prompts.

    Args:
        model: Model with a text-conditioned U-Net; ablate neurons around the call to see it without them.
        cond: Condition with one row per prompt.
        seeds: Seeds of the initial noise, numbered as those of localization.
        settings: How images are generated.

    Returns:
        Latents on the CPU.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    noise = initial_noise(seeds, model, published=settings.compat == "published")
    return generate_images(
        model,
        condition=cond,
        seeds=seeds,
        noise=noise[None],
        guidance_scale=settings.guidance_scale,
        steps=settings.steps,
        batch_size=settings.batch_size,
        decode=lambda x0: x0,
    )


def images_of(model: DiffusionModel, x0: Float[Tensor, "n c _ _"]) -> Float[Tensor, "n _ _ _"]:
    """Returns latents as images, or where the model has no autoencoder the latents, stretched to [0, 1]."""
    if shows_latents(model):
        return stretched(x0)[0]
    return torch.cat([part.cpu() for part in InBatches(64)(x0, lambda part: model.codec.decode(part.to(model.device)))])


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
