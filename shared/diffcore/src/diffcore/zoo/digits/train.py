"""The training recipes of the digit models and of their classifiers."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from diffcore.denoiser import NetworkDenoiser
from diffcore.metrics.attribute_network import AttributeNetwork, AttributeNetworkConfig
from diffcore.noise import philox_uniform
from diffcore.runtime import Runtime
from diffcore.train import (
    DenoisingModule,
    StepData,
    fit_supervised,
    log_normal_sigmas,
    rise_and_fall,
    uniform_timesteps,
)
from diffcore.train.supervised import Batch
from diffcore.train.timesteps import TimeSampler
from diffcore.zoo.digits.data import DIGITS, SIZE, draw_styles, load_digits, render
from diffcore.zoo.digits.network import NUM_TIMESTEPS, build_unet, edm_denoiser, styles_denoiser
from diffcore.zoo.digits.style_oracle import StyleOracle
from diffcore.zoo.fitting import fit_averaged
from diffcore.zoo.oracle import train_attribute_network


class PlainDigits:
    """The digits in [-1, 1] with their classes."""

    def __init__(self) -> None:
        images, self.labels = load_digits()
        self.x0 = images * 2 - 1

    def __len__(self) -> int:
        return len(self.x0)

    def __getitems__(self, indices: Tensor) -> dict[str, Any]:
        """Returns x0 and classes of samples `indices`."""
        return {"x0": self.x0[indices], "condition": {"class_labels": self.labels[indices]}}


class StyledDigits:
    """Each digit in many styles: sample i is digit `i % n` in style i."""

    def __init__(self, styles_per_digit: int = 64, seed: int = 0) -> None:
        self.images, self.labels = load_digits()
        self.styles = draw_styles(seed, range(styles_per_digit * len(self.images)))

    def __len__(self) -> int:
        return len(self.styles)

    def __getitems__(self, indices: Tensor) -> dict[str, Any]:
        """Returns x0, classes and styles of samples `indices`."""
        digits, styles = indices % len(self.images), self.styles[indices]
        return {
            "x0": render(self.images[digits], styles),
            "condition": {"class_labels": self.labels[digits]},
            "styles": styles,
        }


def train_digits8_edm(folder: Path, runtime: Runtime, *, steps: int = 3000) -> NetworkDenoiser:
    """Trains the class-conditional teacher with EDM's preconditioning and noise levels exp(N(-1, 1.2²))."""
    data = PlainDigits()
    denoiser = edm_denoiser(build_unet(), round(float(data.x0.std()), 3))
    return _train_denoiser(denoiser, data, log_normal_sigmas(-1.0, 1.2), folder, runtime, steps=steps, batch_size=64)


def train_digits_styles(folder: Path, runtime: Runtime, *, steps: int = 1600) -> NetworkDenoiser:
    """Trains the base model on every digit in every style."""
    denoiser = styles_denoiser(build_unet())
    times = uniform_timesteps(NUM_TIMESTEPS)
    return _train_denoiser(denoiser, StyledDigits(), times, folder, runtime, steps=steps, batch_size=256)


def train_digits_classifier(
    images: Float[Tensor, "n 1 8 8"], labels: Int[Tensor, " n"], folder: Path, runtime: Runtime, *, steps: int = 800
) -> AttributeNetwork:
    """Trains the classifier of the ten digits."""
    torch.manual_seed(0)
    config = AttributeNetworkConfig(size=SIZE, channels=1, widths=(32, 64), num_features=64, classes={"digit": DIGITS})
    as_bytes = (images * 255).round().to(torch.uint8)
    network = AttributeNetwork(config)
    return train_attribute_network(network, as_bytes, {"digit": labels}, folder, runtime, steps=steps)


def train_style_oracle(folder: Path, runtime: Runtime, *, steps: int = 3000) -> StyleOracle:
    """Trains the network that reads the style numbers of a digit of known class; every fifth digit is held out."""
    data = StyledDigits(seed=1)
    kept = torch.arange(len(data.images)) % 5 != 4
    data.images, data.labels = data.images[kept], data.labels[kept]
    data.styles = data.styles[: 64 * len(data.images)]
    torch.manual_seed(0)
    oracle = StyleOracle()

    def loss(batch: Batch, step: int) -> Tensor:
        x0 = batch["x0"]
        jitter = 0.02 * (2 * philox_uniform(0, torch.arange(len(x0), device=x0.device), x0.shape[1:], step=step) - 1)
        return F.mse_loss(oracle(x0 + jitter, batch["condition"]["class_labels"]), batch["styles"])

    return fit_supervised(
        oracle,
        loss,
        StepData(data, batch_size=256, seed=runtime.seed),
        steps=steps,
        learning_rate=3e-3,
        folder=folder,
        runtime=runtime,
        description="style oracle",
    )


def _train_denoiser(
    denoiser: NetworkDenoiser,
    data: PlainDigits | StyledDigits,
    times: TimeSampler,
    folder: Path,
    runtime: Runtime,
    *,
    steps: int,
    batch_size: int,
) -> NetworkDenoiser:
    """Trains with AdamW at 2e-3, warm-up and cosine, and returns the averaged weights."""
    module = DenoisingModule(
        denoiser,
        optimizer=lambda parameters: AdamW(parameters, 2e-3, betas=(0.9, 0.99)),
        time_sampler=times,
        stratified=True,
        learning_rate_factor=rise_and_fall(steps, warmup=100, floor=0.02),
        seed=runtime.seed,
    )
    data_module = StepData(data, batch_size, runtime.seed)
    return fit_averaged(
        module, data_module, decay=0.99, steps=steps, folder=folder, runtime=runtime, description="digits"
    )
