"""A Lightning module that trains with assigned noise: `ImmiscibleCallback` puts it into each training batch.

The module draws none itself; the noisy sample and the target are built from `batch["noise"]`.
"""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from diffcore.testing import tiny
from immiscible_noise import ImmiscibleCallback


class Module(L.LightningModule):
    """Trains a class-conditional U-Net to predict noise."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.scheduler = network, DDPMScheduler()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Returns the loss of one training step."""
        images, noise = batch["images"], batch["noise"]
        t = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=self.device)
        noisy = self.scheduler.add_noise(images, noise, t)
        return F.mse_loss(self.network(noisy, t, class_labels=batch["labels"]).sample, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer of the U-Net."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class PrintLoss(L.Callback):
    """Prints the loss of each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prints it."""
        print(f"step {batch_idx}: loss {float(outputs['loss']):.4f}")


def main() -> None:
    """Trains a few steps and prints the loss of each."""
    L.seed_everything(0, verbose=False)
    module = Module(tiny.backbone("unet2d").train().requires_grad_(True))  # a UNet2DModel with ten classes
    data = [{"images": torch.rand(3, 8, 8) * 2 - 1, "labels": i % 4} for i in range(48)]
    assigned = ImmiscibleCallback("images", labels_key="labels")  # the one line
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[assigned, PrintLoss()], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=16))


if __name__ == "__main__":
    main()
