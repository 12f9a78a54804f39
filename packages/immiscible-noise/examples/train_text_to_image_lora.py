"""The step of diffusers' `train_text_to_image_lora.py`, with assigned noise: a LoRA is trained, the U-Net is not.

The line goes right after the script draws its noise, before it adds the noise offset.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(pipe: Any, scheduler: Any, pixels: Tensor, captions: list[str], *, noise_offset: float = 0.0) -> Tensor:
    """Returns the loss of one training step."""
    latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
    states, _ = pipe.encode_prompt(captions, pixels.device, 1, False)
    noise = torch.randn_like(latents)
    noise = assign_noise(latents, noise)  # the one line; give `labels` where captions come in classes
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    return F.mse_loss(pipe.unet(scheduler.add_noise(latents, noise, t), t, states).sample, noise)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("sd15")  # random weights; in earnest StableDiffusionPipeline.from_pretrained(...)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([weight for weight in pipe.unet.parameters() if weight.requires_grad], lr=1e-2)
    pixels, captions = torch.rand(8, 3, 16, 16) * 2 - 1, [f"picture number {i}" for i in range(8)]
    for step in range(3):
        value = loss(pipe, scheduler, pixels, captions, noise_offset=0.05)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
