"""The step of diffusers' `train_dreambooth.py` with prior preservation, with assigned noise.

The line goes right after the script draws its noise; the subject's images and the prior's exchange none.
"""

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(
    pipe: Any, scheduler: Any, pixels: Tensor, prompts: list[str], *, noise_offset: float = 0.0, prior_weight: float = 1
) -> Tensor:
    """Returns the loss of one training step; the second half of the batch are images of the prior."""
    latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
    states, _ = pipe.encode_prompt(prompts, pixels.device, 1, False)
    noise = torch.randn_like(latents)
    noise = assign_noise(latents, noise, labels=prompts)  # the one line; there are two prompts
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    predicted = pipe.unet(scheduler.add_noise(latents, noise, t), t, states).sample
    subject, prior = (predicted - noise).square().chunk(2)
    return subject.mean() + prior_weight * prior.mean()


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("sd15")  # random weights; in earnest StableDiffusionPipeline.from_pretrained(...)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(pipe.unet.train().requires_grad_(True).parameters(), lr=1e-3)
    pixels, prompts = torch.rand(8, 3, 16, 16) * 2 - 1, ["a photo of sks dog"] * 4 + ["a photo of a dog"] * 4
    for step in range(3):
        value = loss(pipe, scheduler, pixels, prompts)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
