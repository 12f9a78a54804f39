"""The U-Net of both digit models."""

import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffcore.denoiser import EDMSchedule, NetworkDenoiser, schedule_from
from diffcore.zoo.digits.data import DIGITS, SIZE

NUM_TIMESTEPS = 1000


def build_unet(seed: int = 0) -> UNet2DModel:
    """Returns an untrained class-conditional U-Net of .7 million parameters with attention at both levels."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(DIGITS),
    )


def edm_denoiser(unet: UNet2DModel, sigma_data: float) -> NetworkDenoiser:
    """Returns the U-Net with EDM preconditioning."""
    return NetworkDenoiser(unet, EDMSchedule(sigma_data=sigma_data), "edm", sigma_data=sigma_data)


def cosine_scheduler() -> DDIMScheduler:
    """Returns the cosine schedule squeezed into [.001, .9999]: the last step keeps a thousandth of the signal.

    References:
        Nichol and Dhariwal 2021, equation 17.
    """
    steps = torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / NUM_TIMESTEPS
    alpha_bar = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2).square()
    # Not clamped: steps that add no noise at all are no steps of a schedule.
    alpha_bar = 1e-3 + (0.9999 - 1e-3) * alpha_bar / alpha_bar[0]
    ratio = alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        trained_betas=(1 - ratio).tolist(),
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="epsilon",
    )


def styles_denoiser(unet: UNet2DModel) -> NetworkDenoiser:
    """Returns the U-Net with the cosine schedule, predicting the noise."""
    return NetworkDenoiser(unet, schedule_from(cosine_scheduler()), "epsilon")
