"""Tiny models of the real architectures with random weights: stand-ins for checkpoints, built in milliseconds.

Matrices that a class initialises with zeros (output layers, modulations) are filled with N(0, 0.1), or faults behind
them would stay hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffcore.checkpoint.tokenizers import byte_letters
from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, NetworkDenoiser, NoiseSchedule
from diffcore.denoiser.prediction import PredictionType
from diffcore.models.assemble import make_codec
from diffcore.models.backbones import backbone_call
from diffcore.models.model import DiffusionModel
from diffcore.testing.tiny_configs import CONFIGS

Name = Literal["sd15", "sdxl", "unet2d", "dit", "pixart", "sd3", "flux"]
NAMES: tuple[str, ...] = get_args(Name)

_STABLE = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_TRAINED: dict[str, tuple[PredictionType, NoiseSchedule]] = {
    "sd15": ("epsilon", DiscreteSchedule(**_STABLE, steps_offset=1, set_alpha_to_one=False)),
    "sdxl": ("epsilon", DiscreteSchedule(**_STABLE, steps_offset=1, set_alpha_to_one=False)),
    "unet2d": ("edm", EDMSchedule()),
    "dit": ("epsilon", DiscreteSchedule()),
    "pixart": ("epsilon", DiscreteSchedule()),
    "sd3": ("flow_prediction", FlowSchedule(shift=3.0)),
    "flux": ("flow_prediction", FlowSchedule()),
}


def backbone(name: str, seed: int = 0, **changes: Any) -> Any:
    """Returns a tiny backbone of a family, in float32 and `eval()`; `changes` replace single settings."""
    import diffusers

    class_name, config = CONFIGS[name]
    return seeded(lambda: getattr(diffusers, class_name)(**{**config, **changes}), seed)


def inputs(name: str, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns a valid `(x_t, t, cond)` of a family; rows have different noise levels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    x_t = normal(3 if name == "unet2d" else 4, 8, 8)
    share = torch.linspace(0.2, 0.8, batch)
    _, schedule = _TRAINED[name]
    t = (1000 * share).round() if isinstance(schedule, DiscreteSchedule) else share
    cond = {
        "sd15": lambda: {"encoder_hidden_states": normal(7, 32)},
        "sdxl": lambda: {
            "encoder_hidden_states": normal(7, 64),
            "text_embeds": normal(32),
            "time_ids": torch.tensor([16.0, 16, 0, 0, 16, 16]).repeat(batch, 1),
        },
        "unet2d": lambda: {"class_labels": torch.arange(batch) % 10},
        "dit": lambda: {"class_labels": torch.arange(batch) % 10},
        "pixart": lambda: {
            "encoder_hidden_states": normal(7, 32),
            "encoder_attention_mask": (torch.arange(7) < 4).float().repeat(batch, 1),
        },
        "sd3": lambda: {"encoder_hidden_states": normal(7, 32), "pooled_projections": normal(64)},
        "flux": lambda: {"encoder_hidden_states": normal(7, 32), "pooled_projections": normal(32)},
    }[name]()
    return x_t, t, cond


def denoiser(name: str, seed: int = 0) -> NetworkDenoiser:
    """Returns a tiny backbone with the schedule and prediction type that its family is trained with."""
    network = backbone(name, seed)
    prediction_type, schedule = _TRAINED[name]
    return NetworkDenoiser(network, schedule, prediction_type, call=backbone_call(network)).eval()


def model(name: str, seed: int = 0) -> DiffusionModel:
    """Returns a whole model in memory, without text encoders; latent models see 16x16 images, pixel models 8x8."""
    network = denoiser(name, seed)
    autoencoder = None if name == "unet2d" else vae(seed)
    return DiffusionModel(
        name=f"tiny-{name}",
        fingerprint=f"tiny-{name}-{seed}",
        denoiser=network,
        codec=make_codec(name, type(network.backbone).__name__, network.backbone, autoencoder),
        prompts=None,
        pipeline_class=None,
        components={},
        modules={},
    )


def vae(seed: int = 0, **changes: Any) -> nn.Module:
    """Returns a tiny `AutoencoderKL`: 4 latent channels at half the side of its 16x16 images."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return seeded(lambda: AutoencoderKL(**{**config, **changes}), seed)


def text_encoder(seed: int = 0, *, projection: bool = False, **changes: Any) -> nn.Module:
    """Returns a tiny CLIP text encoder of width 32 for the vocabulary of `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config: dict[str, Any] = {
        "vocab_size": 514,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 32,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 1,
    }
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return seeded(lambda: kind(CLIPTextConfig(**{**config, **changes})), seed)


def tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """Returns a CLIP tokenizer whose words are single bytes: 514 entries, no merges."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=77)


def t5_encoder(seed: int = 0, *, width: int = 32) -> nn.Module:
    """Returns a tiny T5 text encoder for the vocabulary of `t5_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=160, d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return seeded(lambda: T5EncoderModel(config), seed)


def t5_tokenizer() -> Any:
    """Returns a T5 tokenizer whose words are single letters: 26 of them, and the 100 sentinels."""
    from transformers import T5Tokenizer

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters, *sentinels]
    return T5Tokenizer(vocab=vocabulary)


def pipeline(name: str, seed: int = 0, *, width: int = 32) -> Any:
    """Returns a whole tiny pipeline of the diffusers library.

    Args:
        name: One of sd15, sd21, sdxl, dit, pixart, sd3 and flux.
        seed: Seed of the random weights.
        width: Width of the first text encoder's states; 768 and 1024 mark single files as sd15 and sd21.
    """
    import diffusers

    class_name, parts = _PIPELINES[name](seed, width)
    return getattr(diffusers, class_name)(**parts)


def _stable_parts(name: str, seed: int, width: int) -> tuple[str, dict[str, Any]]:
    linear = {"use_linear_projection": True} if name == "sd21" else {}
    return "StableDiffusionPipeline", {
        "unet": backbone("sd15", seed, cross_attention_dim=width, **linear),
        "vae": vae(seed),
        "scheduler": _ddim(prediction_type="v_prediction" if name == "sd21" else "epsilon"),
        "text_encoder": text_encoder(seed, hidden_size=width),
        "tokenizer": tokenizer("!" if name == "sd21" else "<|endoftext|>"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sdxl_parts(seed: int, width: int) -> tuple[str, dict[str, Any]]:
    return "StableDiffusionXLPipeline", {
        "unet": backbone("sdxl", seed),
        "vae": vae(seed, force_upcast=False),
        "scheduler": _ddim(),
        # Readers of single files tell the two by their widths, and look at the tenth layer of the second.
        "text_encoder": text_encoder(seed, hidden_size=24),
        "text_encoder_2": text_encoder(seed + 1, projection=True, hidden_size=40, num_hidden_layers=10),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer("!"),
    }


def _dit_parts(seed: int, width: int) -> tuple[str, dict[str, Any]]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    return "DiTPipeline", {"transformer": backbone("dit", seed), "vae": vae(seed), "scheduler": scheduler}


def _pixart_parts(seed: int, width: int) -> tuple[str, dict[str, Any]]:
    from diffusers import DDIMScheduler

    return "PixArtAlphaPipeline", {
        "transformer": backbone("pixart", seed),
        "vae": vae(seed),
        "scheduler": DDIMScheduler(clip_sample=False),
        "text_encoder": t5_encoder(seed),
        "tokenizer": t5_tokenizer(),
    }


def _sd3_parts(seed: int, width: int) -> tuple[str, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return "StableDiffusion3Pipeline", {
        "transformer": backbone("sd3", seed, joint_attention_dim=64),
        "vae": vae(seed, scaling_factor=1.5305, shift_factor=0.0609),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": text_encoder(seed, projection=True),
        "text_encoder_2": text_encoder(seed + 1, projection=True),
        "text_encoder_3": t5_encoder(seed, width=64),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer("!"),
        "tokenizer_3": t5_tokenizer(),
    }


def _flux_parts(seed: int, width: int) -> tuple[str, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return "FluxPipeline", {
        "transformer": backbone("flux", seed, guidance_embeds=True),
        "vae": vae(seed, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "text_encoder": text_encoder(seed),
        "text_encoder_2": t5_encoder(seed),
        "tokenizer": tokenizer(),
        "tokenizer_2": t5_tokenizer(),
    }


def _ddim(**changes: Any) -> Any:
    from diffusers import DDIMScheduler

    config: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**config, **changes})


_PIPELINES: dict[str, Callable[[int, int], tuple[str, dict[str, Any]]]] = {
    "sd15": partial(_stable_parts, "sd15"),
    "sd21": partial(_stable_parts, "sd21"),
    "sdxl": _sdxl_parts,
    "dit": _dit_parts,
    "pixart": _pixart_parts,
    "sd3": _sd3_parts,
    "flux": _flux_parts,
}


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Builds a module with its own random stream, fills matrices of zeros, and returns it frozen in `eval()`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(0, 0.1)
    return module.eval().requires_grad_(False)
