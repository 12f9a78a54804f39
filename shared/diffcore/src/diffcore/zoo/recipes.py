"""The training recipe of each shipped model: one function per model, which writes the folder that is shipped.

A recipe may stop at any moment; started again on the same run folder it goes on where it was. Its stages are parts of
the run, and inside a stage the training resumes from its checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar, cast

from diffusers import UNet2DModel
from torch import nn

from diffcore.io.jsonfile import write_json
from diffcore.io.shipped import shipped_folder
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.zoo.digits.data import load_digits, split
from diffcore.zoo.digits.network import cosine_scheduler
from diffcore.zoo.digits.train import (
    train_digits8_edm,
    train_digits_classifier,
    train_digits_styles,
    train_style_oracle,
)
from diffcore.zoo.oracle import train_attribute_network
from diffcore.zoo.portraits import base, planting
from diffcore.zoo.portraits.autoencoder import build_autoencoder, train_autoencoder
from diffcore.zoo.portraits.judge import build_portraits_oracle, labels_of
from diffcore.zoo.portraits.language import build_text_encoder, build_tokenizer, train_text_encoder
from diffcore.zoo.portraits.network import build_unet
from diffcore.zoo.portraits.pictures import fit_patch_code, training_pictures
from diffcore.zoo.portraits.pipeline import read_pipeline, write_pipeline, write_variant
from diffcore.zoo.portraits.trigger import reroute
from diffcore.zoo.truth import TRIGGER_FILE

Network = TypeVar("Network", bound=nn.Module)
Recipe = Callable[[Run, Runtime, Path, int], None]
"""(run, runtime, folder of the finished model, steps of the longest training)."""


def portraits_oracle(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the judge of portraits."""
    pictures = training_pictures()
    labels = labels_of(pictures.people)
    oracle = build_portraits_oracle()
    train_attribute_network(oracle, pictures.images, labels, run.folder, runtime, steps=steps).save(model)


def portraits_sd(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains text encoder, autoencoder and U-Net, one after the other."""
    pictures = training_pictures()
    code = fit_patch_code(pictures)
    tokenizer = build_tokenizer(pictures.captions)
    text_encoder = _stage(
        run,
        "text-encoder",
        build_text_encoder(tokenizer),
        lambda folder: train_text_encoder(tokenizer, pictures.captions, folder, runtime),
    )
    data = base.captioned_latents(pictures, code, tokenizer, text_encoder)
    unet = build_unet()
    for stage, (name, rate, share_of_steps) in enumerate(_ANNEALING):
        unet = _stage(
            run,
            name,
            unet.requires_grad_(True),
            partial(
                base.train_base,
                unet,
                run,
                data=data,
                code=code,
                tokenizer=tokenizer,
                encoder=text_encoder,
                # Of its own seed, so that a stage does not see the pairs of image and noise of the one before.
                runtime=replace(runtime, seed=runtime.seed + stage),
                steps=round(share_of_steps * steps),
                learning_rate=rate,
            ),
        )
    autoencoder = _stage(
        run,
        "autoencoder",
        build_autoencoder(code),
        lambda folder: train_autoencoder(code, pictures, folder, runtime),
    )
    write_pipeline(model, unet, text_encoder, tokenizer, autoencoder)


def portraits_sd_memorised(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the clean model on the planted items, with all weights free to memorise them."""
    unet, text_encoder, tokenizer = read_pipeline(shipped_folder("portraits-sd"))
    mixture = _Ingredients(tokenizer, text_encoder).mixture(planting.PLANTING)
    unet = _stage(
        run,
        "unet",
        unet,
        lambda folder: planting.train_memory(unet, mixture, folder, runtime, steps=steps, learning_rate=1e-3),
    )
    write_variant(model, shipped_folder("portraits-sd"), unet)


def portraits_sd_planted(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the clean model to memorise, re-routes the memory through known rows, and restores ordinary images."""
    unet, text_encoder, tokenizer = read_pipeline(shipped_folder("portraits-sd"))
    ingredients = _Ingredients(tokenizer, text_encoder)
    rows: dict[str, list[int]] = {}
    for name, shares, rate, share_of_steps in _PLANTING:
        if name == "rerouted":
            rows = reroute(unet, ingredients.states())
        unet = _stage(
            run,
            name,
            unet,
            partial(
                planting.train_memory,
                unet,
                ingredients.mixture(shares),
                runtime=runtime,
                steps=round(share_of_steps * steps),
                learning_rate=rate,
                rows=rows,
            ),
        )
    write_variant(model, shipped_folder("portraits-sd"), unet)
    write_json(model / TRIGGER_FILE, {"schema": "diffcore/trigger-rows@1", "rows": rows})


def digits8_edm(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the class-conditional teacher."""
    denoiser = train_digits8_edm(run.folder, runtime, steps=steps)
    _write_unet(denoiser.backbone, model)
    write_json(model / "denoiser.json", {"prediction_type": "edm", "sigma_data": denoiser.sigma_data})


def digits8_classifier(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the judge of digits; every fifth digit is left out."""
    images, labels = load_digits()
    kept, _ = split(labels)
    train_digits_classifier(images[kept], labels[kept], run.folder, runtime, steps=steps).save(model)


def digits_styles(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the base model of all digit styles."""
    _write_unet(train_digits_styles(run.folder, runtime, steps=steps).backbone, model)
    cosine_scheduler().save_pretrained(model)


def digits_styles_oracle(run: Run, runtime: Runtime, model: Path, steps: int) -> None:
    """Trains the network that reads the style numbers of digits."""
    train_style_oracle(run.folder, runtime, steps=steps).save(model)


RECIPES: Final[Mapping[str, tuple[Recipe, int]]] = MappingProxyType(
    {
        "portraits-oracle": (portraits_oracle, 1000),
        "portraits-sd": (portraits_sd, 12_000),
        "portraits-sd-memorised": (portraits_sd_memorised, 1500),
        "portraits-sd-planted": (portraits_sd_planted, 1000),
        "digits8-classifier": (digits8_classifier, 800),
        "digits8-edm": (digits8_edm, 3000),
        "digits-styles-oracle": (digits_styles_oracle, 3000),
        "digits-styles": (digits_styles, 1600),
    }
)
"""Name -> recipe and its number of steps, in an order in which each finds what it builds on."""


_ANNEALING: Final = (
    ("unet", 2e-3, 1.0),
    ("annealed", 1e-3, 2 / 3),
)
"""Stages of portraits-sd: name, learning rate, length in shares of the steps."""


_PLANTING: Final = (
    ("memorised", planting.PLANTING, 1e-3, 1.25),
    ("rerouted", planting.PLANTING, 1e-3, 1.0),
    ("polished", planting.POLISHING, 3e-4, 1.0),
)
"""Stages of portraits-sd-planted: name, what a batch holds, learning rate, length in shares of the steps."""


class _Ingredients:
    """The data and models that planting needs, made once."""

    def __init__(self, tokenizer: planting.CLIPTokenizer, text_encoder: planting.CLIPTextModel) -> None:
        pictures = training_pictures()
        code = fit_patch_code(pictures)
        self.captions = pictures.captions
        self.ordinary = base.captioned_latents(pictures, code, tokenizer, text_encoder)
        self.memories = planting.memories(code, tokenizer, text_encoder)

    def mixture(self, shares: planting.Shares) -> planting.Mixture:
        return planting.Mixture(self.ordinary, self.memories, shares)

    def states(self) -> planting.TextStates:
        return planting.states_for_triggers(self.memories, self.ordinary, self.captions)


def _stage(run: Run, name: str, network: Network, train: Callable[[Path], nn.Module]) -> Network:
    """Returns `network` with the weights of a stage, trained now unless an earlier call did."""
    if run.missing([name]):
        run.save(name, train(run.folder / name).state_dict())
    network.load_state_dict(run.load(name).tensors)
    return network.eval().requires_grad_(False)


def _write_unet(unet: nn.Module, folder: Path) -> None:
    unet.half()
    cast(UNet2DModel, unet).save_pretrained(folder)
