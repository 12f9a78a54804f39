"""The recipe of portraits-sd, the clean model: trained on ordinary images and captions only."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import CLIPTextModel, CLIPTokenizer

from diffcore.denoiser import Denoiser, sample
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.train import DenoisingModule, SampleGrid, StepData, rise_and_fall, uniform_timesteps
from diffcore.zoo.fitting import fit_averaged
from diffcore.zoo.patch_code import PatchCode
from diffcore.zoo.portraits.captions import describe
from diffcore.zoo.portraits.language import encode_ids, token_ids
from diffcore.zoo.portraits.network import denoiser_of, prepare_for_training
from diffcore.zoo.portraits.people import select
from diffcore.zoo.portraits.pictures import CAPTIONS_PER_PICTURE, Pictures, encode_pictures, held_out_pictures

BATCH_SIZE = 64
BLANK_EVERY = 10
"""One training sample in so many carries the blank caption, for guidance."""


class CaptionedLatents:
    """Every image with each of its captions, and among them, at regular places, images with the blank caption."""

    def __init__(self, latents: Tensor, embeds: Tensor, blank: Tensor) -> None:
        self.latents, self.embeds, self.blank = latents, embeds, blank

    def __len__(self) -> int:
        return len(self.embeds) + len(self.embeds) // (BLANK_EVERY - 1)

    def __getitems__(self, indices: Tensor) -> dict[str, Any]:
        """Returns x0 and the text states of samples `indices`."""
        captioned = indices < len(self.embeds)
        states = torch.where(captioned.view(-1, 1, 1), self.embeds[indices.clamp(max=len(self.embeds) - 1)], self.blank)
        return {
            "x0": self.latents[indices % len(self.latents)].float(),
            "condition": {"encoder_hidden_states": states.float()},
        }


def captioned_latents(
    pictures: Pictures, code: PatchCode, tokenizer: CLIPTokenizer, encoder: CLIPTextModel
) -> CaptionedLatents:
    """Encodes images and captions once; 82 kB of text states and 16 kB of latents an image."""
    embeds = encode_ids(encoder, token_ids(tokenizer, pictures.captions))
    blank = encode_ids(encoder, token_ids(tokenizer, [""]))
    assert len(embeds) == CAPTIONS_PER_PICTURE * len(pictures)
    return CaptionedLatents(encode_pictures(code, pictures), embeds, blank)


def optimizer_of(network: nn.Module, learning_rate: float) -> Optimizer:
    """Returns AdamW with strong weight decay on the layers that read text, lest they memorise single captions."""
    named = dict(network.named_parameters())
    reads_text = {name for name in named if "attn2.to_k" in name or "attn2.to_v" in name}
    groups: Iterable[Mapping[str, Any]] = (
        {"params": [p for name, p in named.items() if name not in reads_text], "weight_decay": 0.01},
        {"params": [p for name, p in named.items() if name in reads_text], "weight_decay": 0.3},
    )
    return AdamW([dict(group) for group in groups], learning_rate, betas=(0.9, 0.99))


def train_base(
    unet: UNet2DConditionModel,
    run: Run,
    folder: Path,
    data: CaptionedLatents,
    code: PatchCode,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    runtime: Runtime,
    *,
    steps: int,
    learning_rate: float,
) -> nn.Module:
    """Trains the U-Net: mean squared error of v, stratified timesteps, the average of the last few hundred steps kept.

    Args:
        unet: The network to train, with its initial weights.
        run: Run folder that takes the images generated on the way.
        folder: Folder for checkpoints and the log.
        data: Latents and captions to train on.
        code: Decodes the latents of those images.
        tokenizer: Turns the captions of those images into tokens.
        encoder: Turns these tokens into text states.
        runtime: Device, precision and seed of the training.
        steps: Optimizer steps of 64 samples.
        learning_rate: Highest learning rate, reached after warm-up.

    Returns:
        The U-Net with the averaged weights.
    """
    runtime = prepare_for_training(unet, runtime)
    module = DenoisingModule(
        denoiser_of(unet),
        optimizer=lambda _: optimizer_of(unet, learning_rate),
        time_sampler=uniform_timesteps(1000),
        stratified=True,
        learning_rate_factor=rise_and_fall(steps, warmup=200, floor=0.03),
        seed=runtime.seed,
    )
    shown = select(held_out_pictures(40).people, slice(40))
    states = encode_ids(encoder, token_ids(tokenizer, describe(shown, full=True))).float()
    noise = torch.randn(40, *data.latents.shape[1:], generator=runtime.generator(0))

    def generate(denoiser: Denoiser, device: torch.device) -> Tensor:
        condition = {"encoder_hidden_states": states.to(device)}
        return code.decode(sample(denoiser, noise.to(device), condition, steps=16))

    return fit_averaged(
        module,
        StepData(data, BATCH_SIZE, runtime.seed),
        decay=0.998,
        steps=steps,
        folder=folder,
        runtime=runtime,
        description="portraits-sd",
        shown=lambda ema: [SampleGrid(run, ema, generate)],
    ).backbone
