"""Assembling a `DiffusionModel` from built components: its denoiser, codec and prompt encoder."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from diffcore.checkpoint.inventory import Component
from diffcore.checkpoint.tokenizers import last_number
from diffcore.denoiser import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    NetworkDenoiser,
    NoiseSchedule,
    PredictionType,
    schedule_from,
)
from diffcore.errors import IncompatibleModelError, printable
from diffcore.models.backbones import backbone_call
from diffcore.models.codec import Codec, LatentCodec, MissingCodec, PixelCodec
from diffcore.models.prompts import PromptEncoder, Recipe, TextTower

_LINEAR = DiscreteSchedule()
_STABLE = DiscreteSchedule(
    betas="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False
)
_USUAL: dict[str, tuple[PredictionType, NoiseSchedule]] = {
    "UNet2DModel": ("epsilon", _LINEAR),
    "UNet2DConditionModel": ("epsilon", _STABLE),
    "DiTTransformer2DModel": ("epsilon", _LINEAR),
    "PixArtTransformer2DModel": ("epsilon", _LINEAR),
    "SD3Transformer2DModel": ("flow_prediction", FlowSchedule(shift=3.0)),
    "FluxTransformer2DModel": ("flow_prediction", FlowSchedule(shift=math.exp(1.15))),
}
_RECIPES: dict[str, tuple[Recipe, tuple[str, ...], int]] = {
    # towers that must be there; tokens of T5
    "StableDiffusionPipeline": ("stable diffusion", ("",), 0),
    "StableDiffusionXLPipeline": ("sdxl", ("", "_2"), 0),
    "PixArtAlphaPipeline": ("pixart", ("",), 120),
    "PixArtSigmaPipeline": ("pixart", ("",), 300),
    "StableDiffusion3Pipeline": ("sd3", ("", "_2"), 256),
    "FluxPipeline": ("flux", ("", "_2"), 512),
}

_EXPANDING = ("stable diffusion", "sdxl", "flux")
"""The recipes whose pipelines take a placeholder of several vectors for all of them."""


def read_schedule(
    class_name: str, scheduler: Component | None, settings: Mapping[str, Any]
) -> tuple[PredictionType, NoiseSchedule]:
    """Returns the prediction type and noise schedule of a backbone, as its files state them.

    Args:
        class_name: Class name of the backbone.
        scheduler: The scheduler's configuration; None takes the usual one of the class, with a warning.
        settings: Settings of EDM preconditioning, if the folder has them.

    Raises:
        IncompatibleModelError: The scheduler has no counterpart here, or makes no sense.
    """
    if scheduler is None and settings.get("prediction_type") != "edm":
        warnings.warn(f"no scheduler came with the model; taken is what is usual for {class_name}", stacklevel=2)
        return _USUAL[class_name]
    try:
        if scheduler is None or settings.get("prediction_type") == "edm":
            return "edm", EDMSchedule(**{k: float(v) for k, v in settings.items() if k != "prediction_type"})
        schedule = schedule_from({**scheduler.config, "_class_name": scheduler.class_name})
    except IncompatibleModelError:
        raise
    except Exception as error:  # any error of diffusers or diffcore about impossible numbers
        where = printable(scheduler.folder, 300) if scheduler else "denoiser.json"
        raise IncompatibleModelError(
            f"the scheduler in {where} makes no schedule: {printable(error)}; get a clean copy of the model"
        ) from None
    return _stated_prediction(scheduler, schedule), schedule


def make_denoiser(backbone: nn.Module, prediction_type: PredictionType, schedule: NoiseSchedule) -> NetworkDenoiser:
    """Returns a backbone of diffusers as a denoiser, in the mode (training or not) that the backbone is in."""
    sigma_data = schedule.sigma_data if isinstance(schedule, EDMSchedule) else 0.5
    call = backbone_call(backbone)
    denoiser = NetworkDenoiser(backbone, schedule, prediction_type, sigma_data=sigma_data, call=call)
    denoiser.training = backbone.training
    return denoiser


def _stated_prediction(scheduler: Component, schedule: NoiseSchedule) -> PredictionType:
    if isinstance(schedule, FlowSchedule):
        return "flow_prediction"
    kind = scheduler.config.get("prediction_type", "epsilon")
    if isinstance(schedule, EDMSchedule) and kind == "epsilon":
        return "edm"  # diffusers' word for its preconditioned output
    if isinstance(schedule, EDMSchedule):
        raise IncompatibleModelError(
            f"{printable(scheduler.folder, 300)} has EDM's preconditioning and predicts {printable(kind)}, as CosXL "
            "does, which is not supported; epsilon is"
        )
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise IncompatibleModelError(
            f"{printable(scheduler.folder, 300)} predicts {printable(kind)}, which is not supported; "
            "pass `prediction_type`"
        )
    return kind


def make_codec(name: str, class_name: str, backbone: nn.Module, vae: nn.Module | None) -> Codec:
    """Returns the codec between images and a model's x0: its autoencoder, or plain pixels."""
    if vae is not None:
        return LatentCodec(vae)
    if class_name == "UNet2DModel" and backbone.config["in_channels"] in (1, 3):  # pyright: ignore[reportIndexIssue, reportArgumentType]
        return PixelCodec()
    return MissingCodec(name)


def make_prompts(
    pipeline_class: str | None,
    modules: Mapping[str, Any],
    backbone: nn.Module,
    codec: Codec,
    settings: Mapping[str, Any],
) -> PromptEncoder | None:
    """Returns the prompt encoder of a pipeline; None where it takes no prompts, or some encoder or tokenizer is absent.

    Raises:
        IncompatibleModelError: A tokenizer has more entries than its encoder.
    """
    if pipeline_class not in _RECIPES:
        return None
    recipe, required, num_text_tokens = _RECIPES[pipeline_class]
    present = [n for n in ("", "_2", "_3") if f"text_encoder{n}" in modules and f"tokenizer{n}" in modules]
    absent = [f"text_encoder{n}" for n in required if n not in present]
    if absent:
        warnings.warn(
            f"{' and '.join(absent)} or its tokenizer is not there; prompts cannot be encoded, pass conditions"
            + (" or name a T5 with `text_encoder`" if num_text_tokens else ""),
            stacklevel=2,
        )
        return None
    towers = [
        _tower(modules[f"tokenizer{n}"], modules[f"text_encoder{n}"], num_text_tokens, expands=recipe in _EXPANDING)
        for n in present
    ]
    config: Any = backbone.config
    pixels = int(config.get("sample_size") or 128) * (codec.factor if isinstance(codec, LatentCodec) else 8)
    sized = recipe == "pixart" and config.get("use_additional_conditions")
    return PromptEncoder(
        recipe,
        towers,
        num_text_tokens=num_text_tokens,
        width=int(config.get("joint_attention_dim") or 4096),
        size=(pixels, pixels),
        sized=bool(sized),
        guidance=3.5 if config.get("guidance_embeds") else None,
        zeros_for_empty=recipe == "sdxl" and bool(settings.get("force_zeros_for_empty_prompt", True)),
    )


def _tower(tokenizer: Any, encoder: nn.Module, num_text_tokens: int, *, expands: bool) -> TextTower:
    entries, places = last_number(tokenizer) + 1, int(encoder.config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if entries > places:
        raise IncompatibleModelError(
            f"the tokenizer has {entries:,} entries, its text encoder {places:,}; they do not belong together"
        )
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest and entries < places:  # a T5 has spare rows in any case
        warnings.warn(
            f"the text encoder has rows for {places:,} tokens, its tokenizer has {entries:,}: tokens that were trained "
            "with it and are not in the tokenizer fall into pieces; save both together",
            stacklevel=2,
        )
    length = min(tokenizer.model_max_length, longest) if longest else num_text_tokens
    return TextTower(tokenizer, encoder, length, expands=expands)
