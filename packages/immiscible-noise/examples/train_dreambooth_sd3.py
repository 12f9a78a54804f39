"""The step of diffusers' `train_dreambooth_sd3.py`, with assigned noise.

The line goes right after the script draws its noise for `model_input`; sample and target, a flow, are built from it.
"""

from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(pipe: Any, pixels: Tensor, prompt: str) -> Tensor:
    """Returns the loss of one training step; all images are of the subject of one prompt."""
    vae, scheduler = pipe.vae.config, pipe.scheduler
    model_input = (pipe.vae.encode(pixels).latent_dist.sample() - vae.shift_factor) * vae.scaling_factor
    states, _, pooled, _ = pipe.encode_prompt(
        [prompt] * len(pixels), None, None, do_classifier_free_guidance=False, max_sequence_length=64
    )
    noise = torch.randn_like(model_input)
    noise = assign_noise(model_input, noise)  # the one line
    u = compute_density_for_timestep_sampling("logit_normal", len(pixels), logit_mean=0.0, logit_std=1.0)
    index = (u * scheduler.config.num_train_timesteps).long()
    sigma = scheduler.sigmas[index].to(pixels)[:, None, None, None]
    noisy = (1 - sigma) * model_input + sigma * noise
    t = scheduler.timesteps[index].to(pixels.device)
    predicted = pipe.transformer(noisy, states, pooled, t, return_dict=False)[0]
    weight = compute_loss_weighting_for_sd3("logit_normal", sigma)
    return (weight * (predicted - (noise - model_input)).square()).mean()


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("sd3")  # random weights; in earnest StableDiffusion3Pipeline.from_pretrained(...)
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
