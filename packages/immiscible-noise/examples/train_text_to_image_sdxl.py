"""The step of diffusers' `train_text_to_image_sdxl.py`, with assigned noise.

The line goes right after the script draws its noise for `model_input`, before it adds the noise offset.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(pipe: Any, scheduler: Any, pixels: Tensor, captions: list[str], *, noise_offset: float = 0.0) -> Tensor:
    """Returns the loss of one training step; the images are not cropped."""
    model_input = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
    states, _, pooled, _ = pipe.encode_prompt(
        captions, device=pixels.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    noise = torch.randn_like(model_input)
    noise = assign_noise(model_input, noise)  # the one line; give `labels` where captions come in classes
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*model_input.shape[:2], 1, 1, device=pixels.device)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(pixels),), device=pixels.device)
    height, width = pixels.shape[2:]
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(pixels), device=pixels.device)
    added = {"text_embeds": pooled, "time_ids": sizes}
    noisy = scheduler.add_noise(model_input, noise, t)
    return F.mse_loss(pipe.unet(noisy, t, states, added_cond_kwargs=added).sample, noise)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("sdxl")  # random weights; in earnest StableDiffusionXLPipeline.from_pretrained(...)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(pipe.unet.train().requires_grad_(True).parameters(), lr=1e-3)
    pixels, captions = torch.rand(8, 3, 16, 16) * 2 - 1, [f"picture number {i}" for i in range(8)]
    for step in range(3):
        value = loss(pipe, scheduler, pixels, captions, noise_offset=0.05)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
