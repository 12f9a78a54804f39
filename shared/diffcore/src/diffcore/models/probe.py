"""Tables of a backbone's inner tensors and conditions, from its configuration alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.hooks import SiteTable, trace_sites
from diffcore.models.backbones import backbone_call, condition_keys, latent_shape


def site_table(
    backbone: nn.Module, *, size: tuple[int, int] | None = None, cond: Mapping[str, Tensor] | int = 77
) -> SiteTable:
    """Lists every tensor inside a backbone with channels, grid and cumulative cost, from its configuration alone.

    One forward pass on the meta device: nothing is computed, and the weights may be on the meta device themselves.

    Args:
        backbone: A backbone of the diffusers library.
        size: Height and width of x0; by default what the backbone was trained for.
        cond: The condition of one row, or the number of text tokens in it.

    Raises:
        IncompatibleModelError: The class of the backbone is unknown, or it takes inputs that nothing here provides.

    Example:
        >>> from diffcore.testing import tiny
        >>> row = site_table(tiny.backbone("sd15"))["mid_block.resnets.0"]
        >>> row.channels, row.grid, row.calls
        (64, (4, 4), 1)
    """
    channels, *sides = latent_shape(backbone)
    height, width = size or sides
    shapes = condition_shapes(backbone, cond) if isinstance(cond, int) else {k: v.shape[1:] for k, v in cond.items()}
    with torch.device("meta"):
        x_t, t = torch.empty(1, channels, height, width), torch.empty(1)
        inputs = {
            key: torch.empty(1, *shape, dtype=torch.int64 if key == "class_labels" else None)
            for key, shape in shapes.items()
        }
    call = backbone_call(backbone)
    text = shapes.get("encoder_hidden_states", (0,))
    return trace_sites(
        backbone, lambda network: call(network, x_t, t, inputs), size=(height, width), num_text=int(text[0])
    )


def condition_shapes(backbone: nn.Module, num_text: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one row of a backbone's condition, by key.

    Args:
        backbone: A backbone of the diffusers library.
        num_text: Number of text tokens, where the backbone takes text.
    """
    config: Any = backbone.config
    widths = [config.get(key) for key in ("caption_channels", "joint_attention_dim", "cross_attention_dim")]
    numbers = 6 * (config.get("addition_time_embed_dim") or 0)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_hidden_states": (num_text, next((width for width in widths if width), 0)),
        "text_embeds": ((config.get("projection_class_embeddings_input_dim") or 0) - numbers,),
        "pooled_projections": (config.get("pooled_projection_dim") or 0,),
        "time_ids": (6,),
        "resolution": (2,),
        "aspect_ratio": (1,),
        "guidance": (),
        "class_labels": (),
    }
    return {key: shapes[key] for key in condition_keys(backbone).required}
