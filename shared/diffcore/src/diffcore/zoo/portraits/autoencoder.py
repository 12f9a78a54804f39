"""The patch code as a small `AutoencoderKL`, so that a plain Stable Diffusion pipeline needs no class of diffcore.

The encoder is the code, written into the weights: SiLU is no obstacle, as silu(v) - silu(-v) = v, and neither is group
normalisation beside large constants. The decoder cannot be: after upsampling by repetition a convolution cannot tell
the four pixels of a patch apart on flat areas. It is learned, with the images as the target: what the code leaves out
of a patch, its neighbours tell in part, so that the decoder comes closer to the image than the code itself.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from diffcore.noise import philox_normal, philox_uniform
from diffcore.runtime import Runtime
from diffcore.train import StepData, fit_supervised
from diffcore.train.supervised import Batch
from diffcore.zoo.patch_code import PatchCode
from diffcore.zoo.portraits.pictures import LATENT_CHANNELS, SIZE, Pictures

_NOISE = 0.1
"""Largest standard deviation of what is added to latents while the decoder learns: generated ones are not exact."""
_WIDTHS = (16, 4 * LATENT_CHANNELS)
_CONSTANT = 90.5  # over the square root of two: 64, a number that float16 holds
_LOG_VARIANCE = -20.0


def build_autoencoder(code: PatchCode, seed: int = 0) -> AutoencoderKL:
    """Returns an autoencoder whose encoder is the code (to 1e-4), and whose decoder is untrained."""
    torch.manual_seed(seed)
    build: Any = AutoencoderKL  # its annotations know one block only
    autoencoder = build(
        sample_size=SIZE,
        block_out_channels=_WIDTHS,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=LATENT_CHANNELS,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        _write_encoder(autoencoder.encoder, code)
        _as_identity(autoencoder.quant_conv)
        _as_identity(autoencoder.post_quant_conv)
        for name, parameter in autoencoder.decoder.named_parameters():
            if name.endswith(("conv2.weight", "conv2.bias")):  # residual branches start at nothing
                parameter.zero_()
    autoencoder.encoder.requires_grad_(False)
    return autoencoder


def _as_identity(convolution: nn.Module | None) -> None:
    assert isinstance(convolution, nn.Conv2d)  # the configuration asks for it
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]


def _write_encoder(encoder: Any, code: PatchCode) -> None:
    """Writes the code into the encoder of an `AutoencoderKL`: one patch per stride of the downsampling convolution."""
    for parameter in encoder.parameters():
        parameter.zero_()
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(1)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    down = encoder.down_blocks[0].downsamplers[0].conv
    linear = (code.basis / code.scale).T.reshape(LATENT_CHANNELS, 3, code.patch, code.patch)
    down.weight[:LATENT_CHANNELS, :3, :2, :2] = linear
    down.bias[:LATENT_CHANNELS] = -(code.mean @ (code.basis / code.scale))
    # Group k of the last layer: latent k, its negative, and two constants beside which both hardly move the variance.
    widen = encoder.down_blocks[1].resnets[0].conv_shortcut
    for k in range(LATENT_CHANNELS):
        widen.weight[4 * k, k], widen.weight[4 * k + 1, k] = 1, -1
        widen.bias[4 * k + 2], widen.bias[4 * k + 3] = _CONSTANT, -_CONSTANT
        encoder.conv_norm_out.weight[4 * k : 4 * k + 2] = _CONSTANT / 2**0.5
        encoder.conv_out.weight[k, 4 * k, 1, 1], encoder.conv_out.weight[k, 4 * k + 1, 1, 1] = 1, -1
    encoder.conv_out.bias[LATENT_CHANNELS:] = _LOG_VARIANCE


def train_autoencoder(
    code: PatchCode, pictures: Pictures, folder: Path, runtime: Runtime, *, steps: int = 4000
) -> AutoencoderKL:
    """Trains the decoder to reconstruct images from latents; returns the autoencoder in evaluation mode."""
    autoencoder: Any = build_autoencoder(code)

    def loss(batch: Batch, step: int) -> Tensor:
        images = batch["images"]
        latents = code.encode(images)
        noisy = latents + _noise(latents, step)
        return F.mse_loss(autoencoder.decode(noisy).sample, images * 2 - 1)

    return fit_supervised(
        autoencoder,
        loss,
        StepData(_Images(pictures), batch_size=32, seed=runtime.seed),
        steps=steps,
        learning_rate=4e-3,
        weight_decay=0.0,
        folder=folder,
        runtime=runtime,
        description="autoencoder",
        gradient_clip=1.0,
    )


class _Images:
    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: Tensor) -> Batch:
        return {"images": self.pictures.floats(indices)}


def _noise(latents: Tensor, step: int) -> Tensor:
    rows = torch.arange(len(latents), device=latents.device)
    strength = _NOISE * philox_uniform(0, rows, (1, 1, 1), step=step)
    return strength * philox_normal(0, rows, latents.shape[1:], step=step, stream=1)
