"""The noise of kohya's sd-scripts, `get_noise_noisy_latents_and_timesteps` of `library/train_util.py`, assigned.

The line goes right after the draw, before noise offset and input perturbation; put this function in the place of theirs
before training starts.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def get_noise_noisy_latents_and_timesteps(
    args: Any, noise_scheduler: Any, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the noise, which is the target, the noisy latents and the timesteps.

    Raises:
        NotImplementedError: The settings ask for pyramid noise or an adaptive offset, which stand after the line too.
    """
    if args.multires_noise_iterations or args.adaptive_noise_scale:
        raise NotImplementedError("for multires noise or an adaptive offset put the line into train_util.py itself")
    noise = torch.randn_like(latents)
    noise = assign_noise(latents, noise)  # the one line
    if args.noise_offset:
        strength = args.noise_offset * (torch.rand(1).item() if args.noise_offset_random_strength else 1)
        noise = noise + strength * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    last = args.max_timestep or noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(args.min_timestep or 0, last, (len(latents),)).to(latents.device)
    perturbed = noise
    if args.ip_noise_gamma:
        gamma = args.ip_noise_gamma * (torch.rand(1).item() if args.ip_noise_gamma_random_strength else 1)
        perturbed = noise + gamma * torch.randn_like(latents)
    return noise, noise_scheduler.add_noise(latents, perturbed, timesteps), timesteps


def loss(pipe: Any, scheduler: Any, args: Any, latents: Tensor, states: Tensor) -> Tensor:
    """Returns the loss of one training step on cached latents."""
    noise, noisy, t = get_noise_noisy_latents_and_timesteps(args, scheduler, latents)
    return F.mse_loss(pipe.unet(noisy, t, states).sample, noise)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    pipe = tiny.pipeline("sd15")  # random weights
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(pipe.unet.train().requires_grad_(True).parameters(), lr=1e-3)
    off = ("noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations", "min_timestep")
    off += ("max_timestep", "ip_noise_gamma_random_strength")
    args = SimpleNamespace(**dict.fromkeys(off), noise_offset=0.05, ip_noise_gamma=0.1)
    latents, states = torch.randn(8, 4, 8, 8), pipe.encode_prompt(["a photo"] * 8, "cpu", 1, False)[0]
    for step in range(3):
        value = loss(pipe, scheduler, args, latents, states)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
