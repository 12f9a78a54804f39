"""Settings of tiny backbones: the real classes, small enough to build in milliseconds."""

from typing import Any

_UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_DIT = {
    "sample_size": 8,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": (
        "UNet2DConditionModel",
        _UNET
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        _UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 80,  # text_embeds 32 + 6 size numbers of 8
            "cross_attention_dim": 64,
        },
    ),
    "unet2d": (
        "UNet2DModel",
        _UNET
        | {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "num_class_embeds": 10,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        _DIT
        | {
            "num_attention_heads": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_zero",
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        _DIT
        | {
            "num_attention_heads": 3,
            "cross_attention_dim": 24,
            "caption_channels": 32,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_eps": 1e-6,
            "use_additional_conditions": False,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 16,  # 4 latent channels, packed two by two
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": False,
        },
    ),
}
