"""From settings to a denoiser: network, schedule and prediction type of each objective.

With x_t = alpha_t x_0 + sigma_t n: "flow" predicts n - x_0 at alpha_t = 1 - t, sigma_t = t; "ddpm" predicts n on 1000
steps of linear betas; "edm" predicts x_0 at alpha_t = 1, sigma_t = t, preconditioned as in Karras et al. 2022, table 1,
and so do both kinds of consistency training, for which see `consistency`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

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
from immiscible_noise.study.settings import Objective, TrainSettings

_FREQUENCIES = 32
# From the schedule's t to what the network's time embedding was made for: 0 … 1 for the MLP, 0 … 1000 for the U-Net.
_TIME_SCALE: dict[Objective, dict[str, float]] = {
    "flow": {"mlp": 1.0, "unet": 1000.0},
    "ddpm": {"mlp": 1 / 1000, "unet": 1.0},
    "edm": {"mlp": 1.0, "unet": 1.0},
    # 1000 log(sigma) / 4, which diffusers' ConsistencyModelPipeline gives its network.
    "consistency": {"mlp": 1.0, "unet": 1000.0},
    "consistency-improved": {"mlp": 1.0, "unet": 1000.0},
}


def build_denoiser(
    settings: TrainSettings, shape: tuple[int, int, int], num_classes: int | None, sigma_data: float, seed: int
) -> NetworkDenoiser:
    """Builds an untrained denoiser; the same seed gives the same weights.

    Args:
        settings: Objective, network (not "auto") and width.
        shape: Channels, height and width of one image.
        num_classes: Number of labels, or None if training is unconditional.
        sigma_data: Standard deviation of x0 over the data (EDM).
        seed: Number that fixes the initial weights.

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
            f"try `size` {max(size // step, 2) * step}"
        )
    if width % 8:
        raise UserError(f"`width` is {width}; the U-Net's group norms need a multiple of 8")


def _levels(size: int) -> int:
    return 1 + min(2, max(size.bit_length() - 3, 1))


def _objective(objective: Objective, sigma_data: float) -> tuple[NoiseSchedule, PredictionType]:
    match objective:
        case "flow":
            return FlowSchedule(), "flow_prediction"
        case "ddpm":
            # Few solver steps must start at the noisiest level, which "leading" spacing leaves out.
            return DiscreteSchedule(spacing="linspace"), "epsilon"
        case "edm" | "consistency" | "consistency-improved":
            return EDMSchedule(sigma_data=sigma_data), "edm"


def _scaled_time(factor: float) -> BackboneCall:
    def call(backbone: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Any:
        return backbone(x_t, t * factor, **cond)

    return call


class MLPDenoiser(nn.Module):
    """Residual blocks on the flattened image, each shifted by an embedding of time and, if there is one, of the label.

    Its output is zero at first, so training starts from the mean.

    Args:
        shape: Shape of one image.
        width: Channels of the hidden layers.
        depth: Number of residual blocks.
        num_classes: Number of labels; None is unconditional.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int = 128, depth: int = 3, num_classes: int | None = None
    ) -> None:
        super().__init__()
        size, embedding = math.prod(shape), 2 * _FREQUENCIES
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = None if num_classes is None else nn.Embedding(num_classes, embedding)
        nn.init.zeros_(self.leave[1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.leave[1].bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        sample: Float[Tensor, "b *data"],
        timestep: Float[Tensor, " b"],
        class_labels: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *data"]:
        """Returns the prediction for noisy images at times of order 1."""
        embedding = self.time(_fourier(timestep).to(sample.dtype))
        if self.label is not None:
            if class_labels is None:
                raise ValueError("this network is class-conditional; pass class_labels")
            embedding = embedding + self.label(class_labels)
        embedding = functional.silu(embedding)
        hidden = self.enter(sample.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.leave(hidden).view_as(sample)


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(width), nn.Linear(embedding, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return hidden + self.second(functional.silu(self.first(self.norm(hidden)) + self.shift(embedding)))


def _fourier(t: Tensor) -> Tensor:
    """Returns sine and cosine at frequencies from 1000 down to about 1 radian per unit of time."""
    exponents = torch.arange(_FREQUENCIES, device=t.device) / _FREQUENCIES
    phases = t.float()[:, None] * 1000 ** (1 - exponents)
    return torch.cat([phases.sin(), phases.cos()], dim=1)
