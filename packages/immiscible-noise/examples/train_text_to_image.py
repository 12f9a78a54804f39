"""The step of diffusers' `train_text_to_image.py`, with assigned noise.

The line goes right after the script draws its noise, before it adds the noise offset and the input perturbation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(
    pipe: Any,
    scheduler: Any,
    pixels: Tensor,
    captions: list[str],
    *,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
) -> Tensor:
    """Returns the loss of one training step."""
    latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
    states, _ = pipe.encode_prompt(captions, pixels.device, 1, False)
    noise = torch.randn_like(latents)
    noise = assign_noise(latents, noise)  # the one line; give `labels` where captions come in classes
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    perturbed = noise + input_perturbation * torch.randn_like(noise) if input_perturbation else noise
    t = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    predicted = pipe.unet(scheduler.add_noise(latents, perturbed, t), t, states).sample
    learns_v = scheduler.config.prediction_type == "v_prediction"
    return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, t) if learns_v else noise)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("sd15")  # random weights; in earnest StableDiffusionPipeline.from_pretrained(...)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(pipe.unet.train().requires_grad_(True).parameters(), lr=1e-3)
    pixels, captions = torch.rand(8, 3, 16, 16) * 2 - 1, [f"picture number {i}" for i in range(8)]
    for step in range(3):
        value = loss(pipe, scheduler, pixels, captions, noise_offset=0.05, input_perturbation=0.1)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
