"""portraits-sd as a folder of diffusers, which plain `StableDiffusionPipeline.from_pretrained` loads."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffcore.zoo.portraits.network import build_scheduler


def write_pipeline(
    folder: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
) -> None:
    """Writes a genuine pipeline with weights in float16; the modules themselves are left as they are."""
    halves: list[Any] = [copy.deepcopy(module) for module in (unet, text_encoder, autoencoder)]
    unet, text_encoder, autoencoder = (module.to(dtype=torch.float16) for module in halves)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def read_pipeline(folder: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer, AutoencoderKL]:
    """Returns the parts of a pipeline in float32, for training on."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    return pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.vae
