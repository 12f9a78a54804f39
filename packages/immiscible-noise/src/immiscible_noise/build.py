"""From settings to a denoiser: network, schedule and prediction type of each objective."""

from typing import Any

import torch
from torch import Tensor, nn

from diffcore.denoiser import (
    BackboneCall,
    Condition,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    NetworkDenoiser,
    NoiseSchedule,
    PredictionType,
)
from diffcore.errors import UserError
from immiscible_noise.mlp import MLPDenoiser
from immiscible_noise.settings import Objective, TrainSettings

# From the schedule's t to what the network's time embedding was made for: 0 … 1 for the MLP, 0 … 1000 for the U-Net.
_TIME_SCALE: dict[Objective, dict[str, float]] = {
    "flow": {"mlp": 1.0, "unet": 1000.0},
    "ddpm": {"mlp": 1 / 1000, "unet": 1.0},
    "edm": {"mlp": 1.0, "unet": 1.0},
}


def build_denoiser(
    settings: TrainSettings, shape: tuple[int, int, int], num_classes: int | None, sigma_data: float, seed: int
) -> NetworkDenoiser:
    """Builds an untrained denoiser; the same seed gives the same weights.

    Args:
        settings: Objective, network (not "auto") and width.
        shape: Channels, height, width of one image.
        num_classes: Number of labels, or None if training is unconditional.
        sigma_data: Standard deviation of x0 over the data (EDM).
        seed: Of the initial weights.

    Raises:
        UserError: The U-Net cannot take images of this size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.network == "mlp":
            backbone: nn.Module = MLPDenoiser(shape, settings.width, num_classes=num_classes)
        else:
            backbone = unet(shape, settings.width, num_classes)
    schedule, prediction_type = _objective(settings.objective, sigma_data)
    call = _scaled_time(_TIME_SCALE[settings.objective][settings.network])
    return NetworkDenoiser(backbone, schedule, prediction_type, sigma_data=sigma_data, call=call)


def unet(shape: tuple[int, int, int], width: int, num_classes: int | None) -> nn.Module:
    """Builds diffusers' U-Net: halves images once below 16x16, else twice, with attention at the lowest level."""
    from diffusers import UNet2DModel

    channels, height, _ = shape
    check_unet(height, width)
    levels = _levels(height)
    attention = levels - 1
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=tuple(width * min(2**i, 2) for i in range(levels)),
        down_block_types=tuple("AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(levels)),
        up_block_types=tuple("AttnUpBlock2D" if i == levels - 1 - attention else "UpBlock2D" for i in range(levels)),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=num_classes,
    )


def check_unet(size: int, width: int) -> None:
    """Refuses what the U-Net cannot be built for, before anything expensive starts.

    Raises:
        UserError: Images of this side cannot be halved often enough, or the group norms do not fit the width.
    """
    halvings = _levels(size) - 1
    step = 2**halvings
    if size % step or size < 2 * step:
        often = "once" if halvings == 1 else "twice"
        raise UserError(
            f"the U-Net halves images {often}, which {size}x{size} does not allow; "
            f"use --size {max(size // step, 2) * step}"
        )
    if width % 8:
        raise UserError(f"--width is {width}; the U-Net's group norms need a multiple of 8")


def _levels(size: int) -> int:
    return 1 + min(2, max(size.bit_length() - 3, 1))


def _objective(objective: Objective, sigma_data: float) -> tuple[NoiseSchedule, PredictionType]:
    match objective:
        case "flow":
            return FlowSchedule(), "flow_prediction"
        case "ddpm":
            # Few solver steps must start at the noisiest level, which "leading" spacing leaves out.
            return DiscreteSchedule(spacing="linspace"), "epsilon"
        case "edm":
            return EDMSchedule(sigma_data=sigma_data), "edm"


def _scaled_time(factor: float) -> BackboneCall:
    def call(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Any:
        return backbone(x_t, t * factor, **cond)

    return call
