"""The loss of EDM's and k-diffusion's trainers, with assigned noise.

The line stands between the draw of unit noise and its product with sigma.
"""

from typing import Any

import torch
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import assign_noise


def denoise(network: Any, noisy: Tensor, sigma: Tensor, labels: Tensor, sigma_data: float) -> Tensor:
    """Returns the denoised images: EDM's scalings around a U-Net."""
    total = (sigma**2 + sigma_data**2).sqrt()
    output = network(noisy / total, sigma.flatten().log() / 4, class_labels=labels).sample
    return noisy * (sigma_data / total) ** 2 + output * sigma * sigma_data / total


def loss(
    network: Any, images: Tensor, labels: Tensor, *, mean: float = -1.2, deviation: float = 1.2, sigma_data: float = 0.5
) -> Tensor:
    """Returns the loss of one training step; images of one class exchange noise."""
    sigma = (mean + deviation * torch.randn(len(images), 1, 1, 1, device=images.device)).exp()
    noise = torch.randn_like(images)
    noise = assign_noise(images, noise, labels=labels) * sigma  # the one line
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * (denoise(network, images + noise, sigma, labels, sigma_data) - images).square()).mean()


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    network = tiny.backbone("unet2d").train().requires_grad_(True)  # a UNet2DModel with ten classes
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    images, labels = torch.rand(16, 3, 8, 8) * 2 - 1, torch.arange(16) % 4
    for step in range(3):
        value = loss(network, images, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
