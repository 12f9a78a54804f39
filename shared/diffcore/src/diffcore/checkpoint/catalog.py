"""The classes that model folders may name, with the role of each. A class outside these tables is refused."""

from collections.abc import Mapping
from typing import Any, Literal

Role = Literal["backbone", "codec", "text_encoder", "tokenizer", "scheduler"]

BACKBONES = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "T5Tokenizer")

ROLES: dict[tuple[str, str], Role] = {
    **{("diffusers", name): "backbone" for name in BACKBONES},
    ("diffusers", "AutoencoderKL"): "codec",
    **{("diffusers", name): "scheduler" for name in SCHEDULERS},
    **{("transformers", name): "text_encoder" for name in TEXT_ENCODERS},
    **{("transformers", name): "tokenizer" for name in TOKENIZERS},
}
SAME_CLASS = {"CLIPTokenizerFast": "CLIPTokenizer", "T5TokenizerFast": "T5Tokenizer"}

_STABLE = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": _STABLE,
    "StableDiffusionXLPipeline": (*_STABLE, "text_encoder_2", "tokenizer_2"),
    "DiTPipeline": ("transformer", "vae", "scheduler"),
    "PixArtAlphaPipeline": ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    "PixArtSigmaPipeline": ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    "StableDiffusion3Pipeline": (
        "transformer",
        "vae",
        "scheduler",
        *(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
    ),
    "FluxPipeline": (
        "transformer",
        "vae",
        "scheduler",
        *(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2")),
    ),
    "DDPMPipeline": ("unet", "scheduler"),
    "DDIMPipeline": ("unet", "scheduler"),
}
IGNORED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that we always do without; what a folder names there is never looked at."""

CONFIG_FILES: dict[Role, str] = {
    "backbone": "config.json",
    "codec": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
}
WEIGHT_STEMS: dict[str, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}

_CLIP_KEYS = """
    attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_factor initializer_range
    intermediate_size layer_norm_eps max_position_embeddings num_attention_heads num_hidden_layers pad_token_id
    projection_dim vocab_size
"""
_T5_KEYS = """
    classifier_dropout d_ff d_kv d_model decoder_start_token_id dropout_rate eos_token_id feed_forward_proj
    initializer_factor is_encoder_decoder layer_norm_epsilon num_decoder_layers num_heads num_layers pad_token_id
    relative_attention_max_distance relative_attention_num_buckets tie_word_embeddings use_cache vocab_size
"""
TEXT_CONFIG_KEYS = {"clip_text_model": frozenset(_CLIP_KEYS.split()), "t5": frozenset(_T5_KEYS.split())}
"""The settings of a text encoder that a library may see; others are dropped and counted."""

MODEL_TYPES = {
    "CLIPTextModel": "clip_text_model",
    "CLIPTextModelWithProjection": "clip_text_model",
    "T5EncoderModel": "t5",
}


def current_class(name: str, config: Mapping[str, Any]) -> str:
    """Returns the current name of a class; DiT and PixArt, once one class, are distinguished by their norm."""
    if name == "Transformer2DModel":
        by_norm = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
        return by_norm.get(str(config.get("norm_type")), name)
    return SAME_CLASS.get(name, name)
