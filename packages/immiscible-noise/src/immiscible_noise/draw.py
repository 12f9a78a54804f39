"""Gaussian noise shaped like a batch."""

import torch
from jaxtyping import Float
from torch import Tensor


def draw_noise(x: Float[Tensor, "b *data"], generator: torch.Generator | None) -> Float[Tensor, "b *data"]:
    """Returns ``torch.randn`` of the shape, type and device of ``x``, drawn on the generator's device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
