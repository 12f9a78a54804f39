"""A plain loop with Hugging Face's accelerate, with assigned noise.

The line goes right after the draw; each process assigns its own share, and `assign_across_ranks` does all together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def loss(network: Any, scheduler: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of one training step; images of one class exchange noise."""
    noise = torch.randn_like(images)
    noise = assign_noise(images, noise, labels=labels)  # the one line
    t = torch.randint(scheduler.config.num_train_timesteps, (len(images),), device=images.device)
    return F.mse_loss(network(scheduler.add_noise(images, noise, t), t, class_labels=labels).sample, noise)


def main() -> None:
    """Trains a few steps of two micro-batches each, and prints the loss."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    network = tiny.backbone("unet2d").train().requires_grad_(True)  # a UNet2DModel with ten classes
    data = DataLoader(TensorDataset(torch.rand(96, 3, 8, 8) * 2 - 1, torch.arange(96) % 4), batch_size=16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network, optimizer, data = accelerator.prepare(network, optimizer, data)
    scheduler = DDPMScheduler()
    for step, (images, labels) in enumerate(data):
        with accelerator.accumulate(network):
            value = loss(network, scheduler, images, labels)
            accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
