"""The step of diffusers' `train_dreambooth_flux.py`, with assigned noise.

The line goes right after the script draws its noise for `model_input`, before latents are packed for the transformer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(pipe: Any, pixels: Tensor, prompt: str, *, guidance: float = 1.0) -> Tensor:
    """Returns the loss of one training step; all images are of the subject of one prompt."""
    vae, scheduler = pipe.vae.config, pipe.scheduler
    model_input = (pipe.vae.encode(pixels).latent_dist.sample() - vae.shift_factor) * vae.scaling_factor
    states, pooled, text_ids = pipe.encode_prompt([prompt] * len(pixels), None, max_sequence_length=64)
    noise = torch.randn_like(model_input)
    noise = assign_noise(model_input, noise)  # the one line
    u = compute_density_for_timestep_sampling("none", len(pixels))
    index = (u * scheduler.config.num_train_timesteps).long()
    sigma = scheduler.sigmas[index].to(pixels)[:, None, None, None]
    noisy = (1 - sigma) * model_input + sigma * noise
    batch, channels, height, width = noisy.shape
    image_ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, pixels.device, pixels.dtype)
    packed = pipe.transformer(
        pipe._pack_latents(noisy, batch, channels, height, width),
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=scheduler.timesteps[index].to(pixels.device) / 1000,
        img_ids=image_ids,
        txt_ids=text_ids,
        guidance=pixels.new_full((batch,), guidance),
        return_dict=False,
    )[0]
    predicted = pipe._unpack_latents(packed, *pixels.shape[2:], pipe.vae_scale_factor)
    return F.mse_loss(predicted, noise - model_input)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("flux")  # random weights; in earnest FluxPipeline.from_pretrained(...)
    optimizer = torch.optim.AdamW(pipe.transformer.train().requires_grad_(True).parameters(), lr=1e-3)
    pixels = torch.rand(8, 3, 16, 16) * 2 - 1
    for step in range(3):
        value = loss(pipe, pixels, "a photo of sks dog")
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
