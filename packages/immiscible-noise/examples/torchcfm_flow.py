"""The class-conditional step of torchcfm's flow matching, with an exact assignment for its sampled plan.

The sampler takes the place of `OTPlanSampler`: `flow_matcher.ot_sampler = ExactAssignmentPlanSampler()`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcore.testing import tiny
from immiscible_noise import ExactAssignmentPlanSampler


def loss(network: Any, sampler: ExactAssignmentPlanSampler, images: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of one training step; images of one class exchange noise."""
    x0 = torch.randn_like(images)
    x0, x1, _, labels = sampler.sample_plan_with_labels(x0, images, None, labels)  # the one line
    t = torch.rand(len(images), device=images.device)
    share = t[:, None, None, None]
    return F.mse_loss(network((1 - share) * x0 + share * x1, t * 1000, class_labels=labels).sample, x1 - x0)


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    torch.manual_seed(0)
    network = tiny.backbone("unet2d").train().requires_grad_(True)  # a UNet2DModel with ten classes
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    sampler, images, labels = ExactAssignmentPlanSampler(), torch.rand(16, 3, 8, 8) * 2 - 1, torch.arange(16) % 4
    for step in range(3):
        value = loss(network, sampler, images, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {value.item():.4f}")


if __name__ == "__main__":
    main()
