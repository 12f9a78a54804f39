"""The step of diffusers' `train_unconditional.py`, with assigned noise.

The line goes right after the script draws its noise for the clean images.
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from immiscible_noise import assign_noise


def loss(network: UNet2DModel, scheduler: DDPMScheduler, images: Tensor) -> Tensor:
    """Returns the loss of one training step."""
    noise = torch.randn_like(images)
    noise = assign_noise(images, noise)  # the one line
    t = torch.randint(scheduler.config.num_train_timesteps, (len(images),), device=images.device)
    predicted = network(scheduler.add_noise(images, noise, t), t).sample
    return F.mse_loss(predicted, noise)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler, images = DDPMScheduler(), torch.rand(16, 3, 8, 8) * 2 - 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(3):
        value = loss(network, scheduler, images)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
