"""portraits-sd as a folder of diffusers, which plain `StableDiffusionPipeline.from_pretrained` loads."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffcore.io.files import make_folder
from diffcore.io.jsonfile import read_trusted, write_json
from diffcore.zoo.portraits.network import build_scheduler


def write_pipeline(
    folder: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
) -> None:
    """Writes a genuine pipeline; the modules themselves are left as they are.

    U-Net and autoencoder go to float16. The text encoder stays in float32: transformers loads weights in the precision
    that they are stored in, diffusers in float32, and a plain `from_pretrained` must not mix the two. Where the parts
    were read from is left out: it is a path of the machine that trained them.
    """
    copies: list[Any] = [copy.deepcopy(module) for module in (unet, autoencoder)]
    unet, autoencoder = (module.to(dtype=torch.float16) for module in copies)
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
    for part in ("unet", "vae", "text_encoder"):
        _forget_origin(folder / part / "config.json")


def write_variant(folder: Path, base: Path, unet: UNet2DConditionModel) -> None:
    """Writes the pipeline of another folder with this U-Net in place of its own; all else is copied to the byte."""
    make_folder(folder)
    shutil.copy(base / "model_index.json", folder)
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.copytree(base / part, folder / part, dirs_exist_ok=True)
    half: Any = copy.deepcopy(unet)
    half.to(dtype=torch.float16).save_pretrained(folder / "unet")
    _forget_origin(folder / "unet" / "config.json")


def read_pipeline(folder: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Returns U-Net, text encoder and tokenizer of a pipeline, in float32, for training on."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return pipeline.unet, pipeline.text_encoder, pipeline.tokenizer


def _forget_origin(config: Path) -> None:
    write_json(config, {name: value for name, value in read_trusted(config).items() if name != "_name_or_path"})
