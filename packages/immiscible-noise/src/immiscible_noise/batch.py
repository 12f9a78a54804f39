"""The batch that a caller passes in: its checks, each with a message that names the bad row, and noise of its shape."""

import hashlib
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor


def check_images(x: Tensor, name: str = "x") -> None:
    """Raises an error unless images, or noise of that name, are a batch of floating type."""
    _check_floating(name, x)
    if x.ndim == 0:
        raise ValueError(f"{name} is a single number; the first dimension must be the batch")


def check_pair(x: Tensor, noise: Tensor) -> None:
    """Raises an error where images and noise differ in shape or device."""
    check_images(x)
    _check_floating("noise", noise)
    if x.shape != noise.shape:
        row = f": noise has no row {len(noise)}" if noise.ndim and len(noise) < len(x) else ""
        raise ValueError(f"x has shape {list(x.shape)} but noise has shape {list(noise.shape)}{row}; make them equal")
    if x.device != noise.device:
        raise ValueError(f"x is on {x.device} but noise is on {noise.device}; move one of them")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raises an error where a value is not one of a ``Literal``'s."""
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; choose from {', '.join(get_args(choices))}")


def non_finite_message(**tensors: Tensor) -> str:
    """Returns which tensor holds the first NaN or infinite value, and in which row."""
    for name, tensor in tensors.items():
        bad = (~torch.isfinite(tensor.reshape(len(tensor), -1))).any(dim=1).nonzero()
        if len(bad):
            return f"{name}[{int(bad[0])}] holds NaN or infinite values"
    return f"the costs overflow although {' and '.join(tensors)} are finite; bring the images to unit scale"


def draw_noise(x: Float[Tensor, "b *data"], generator: torch.Generator | None) -> Float[Tensor, "b *data"]:
    """Returns ``torch.randn`` of the shape, type and device of ``x``, drawn on the generator's device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def check_strength(strength: float) -> None:
    """Raises an error unless a share of rows lies in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, outside [0, 1]; give 0 for ordinary training, 1 to assign all rows")


def choose_rows(num_rows: int, strength: float, generator: torch.Generator | None) -> Int[Tensor, "m"]:
    """Returns the rows that take part, ascending. Full and zero strength draw no random number."""
    count = round(strength * num_rows)
    if count in (0, num_rows):
        return torch.arange(count)
    device = None if generator is None else generator.device
    return torch.randperm(num_rows, generator=generator, device=device)[:count].sort().values


def mixed_seed(*numbers: int) -> int:
    """Returns a seed of 63 bits for a list of numbers, such as a seed, a step and a rank; each list has its own.

    The same on every machine and in every version, so that a resumed training repeats its noise.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; convert it to a floating type, scaled as the diffusion sees it")
