"""The U-Net and noise schedule of portraits-sd: a small Stable Diffusion made of diffusers' own classes."""

from dataclasses import replace

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from diffcore.denoiser import NetworkDenoiser, schedule_from
from diffcore.runtime import Runtime
from diffcore.zoo.portraits.language import WIDTH
from diffcore.zoo.portraits.pictures import LATENT_CHANNELS, SIZE


def build_unet(seed: int = 0) -> UNet2DConditionModel:
    """Returns an untrained U-Net of 3.3 million parameters, 320 of whose neurons are cross-attention values.

    Cross-attention stands in the two deeper down blocks and in the middle, nowhere else.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Returns Stable Diffusion's noise schedule with v-prediction.

    A tenth of the signal is left at its last step. Schedules that remove it also remove what tells a memorised caption
    apart in the first step.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def denoiser_of(unet: UNet2DConditionModel) -> NetworkDenoiser:
    """Returns the U-Net with its schedule."""
    return NetworkDenoiser(unet, schedule_from(build_scheduler()), "v_prediction")


def prepare_for_training(unet: UNet2DConditionModel, runtime: Runtime) -> Runtime:
    """Returns the runtime in bfloat16, and picks the attention that is fastest to train in it.

    On a CPU the backward pass of the fused one takes a third of a step.
    """
    if runtime.torch_device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    return replace(runtime, dtype="bfloat16")
