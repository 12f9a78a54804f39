"""Random numbers by row: the noise of a row depends on (seed, row, stream) alone, never on its batch.

There are two generators, whose numbers differ:

* `row_noise`: one CPU generator per row. For what is drawn once, such as initial noise; the same on every device.
* `philox_normal`, `philox_uniform`: a counter-based generator written as tensor operations. For draws inside device
  loops; the integers agree on all devices, the floats to about 1e-6 (logarithm and cosine).

References:
    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, figure 17 (`splitmix64`).
    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox4x32-10).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF

Rows = Sequence[int] | range | Int[Tensor, " b"]


def splitmix64(state: int) -> int:
    """Returns the output of one SplitMix64 step from a 64-bit state."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def mix_seed(seed: int, row: int = 0, stream: int = 0) -> int:
    """Returns a 64-bit seed in which each bit of (seed, row, stream) changes about half of the bits."""
    mixed = 0
    for word in (seed, row, stream):
        mixed = splitmix64(mixed ^ (word & _MASK64))
    return mixed


def row_generator(seed: int, row: int, stream: int = 0) -> torch.Generator:
    """Returns a CPU generator for one row of one stream."""
    return torch.Generator().manual_seed(mix_seed(seed, row, stream))


def row_noise(
    seed: int,
    rows: Rows,
    shape: Sequence[int],
    *,
    stream: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *data"]:
    """Draws standard normal noise, one CPU generator per row; float32 first, then cast, so every dtype has one source.

    Args:
        seed: The seed that the user chose.
        rows: Index of each row in the whole computation (or the sample's own seed), not in its batch.
        shape: Shape of one row.
        stream: Number that keeps draws for different purposes apart.
        device: Device of the result; it is copied there once.
        dtype: Precision of the result.
    """
    indices = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    noise = torch.empty((len(indices), *shape))
    generator = torch.Generator()
    for place, row in zip(noise, indices, strict=True):
        place.normal_(generator=generator.manual_seed(mix_seed(seed, row, stream)))
    return noise.to(device=device, dtype=dtype)


def philox4x32(
    counter: tuple[Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]], key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encrypts counters by ten rounds of Philox4x32.

    Args:
        counter: Four broadcastable int64 tensors holding 32-bit words.
        key: 64 bits; the low word is the first of the two key words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(10):
        # A product of 32-bit words may exceed 2^63: it wraps to a negative int64 with the right bits.
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _MASK32) ^ x1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ x3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return x0, x1, x2, x3


def philox_uniform(
    seed: int,
    rows: Rows,
    shape: Sequence[int],
    *,
    step: int = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *data"]:
    """Draws numbers strictly between 0 and 1 on the device; element i of a row is word i of its counter stream.

    Args:
        seed: Key of the generator, 64 bits.
        rows: Index of each row in the whole computation; the low 32 bits count.
        shape: Shape of one row.
        step: Index of the draw in a loop, 32 bits.
        stream: Number, of 32 bits, that keeps draws for different purposes apart.
        device: Device to draw on; by default that of `rows`.
        dtype: Precision of the result; below float32 it is drawn in float32 and cast.
    """
    words = _words(seed, rows, math.prod(shape), step, stream, device)
    u = _unit_interval(torch.stack(words, dim=-1), _working_dtype(dtype))
    # Casting rounds the largest draws up: keep them below 1 in every precision.
    return _shaped(u, shape).to(dtype).clamp_(max=1 - torch.finfo(dtype).eps / 2)


def philox_normal(
    seed: int,
    rows: Rows,
    shape: Sequence[int],
    *,
    step: int = 0,
    stream: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *data"]:
    """Draws standard normal noise on the device by Box-Muller; arguments as in `philox_uniform`."""
    words = _words(seed, rows, math.prod(shape), step, stream, device)
    u0, u1, u2, u3 = (_unit_interval(word, _working_dtype(dtype)) for word in words)
    pairs = [part for u, v in ((u0, u1), (u2, u3)) for part in _box_muller(u, v)]
    return _shaped(torch.stack(pairs, dim=-1), shape).to(dtype)


def _words(
    seed: int, rows: Rows, numbers: int, step: int, stream: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns four tensors (b, ceil(numbers / 4)) of random words: counter = (index // 4, row, step, stream)."""
    row = torch.as_tensor(rows, dtype=torch.int64, device=device)[:, None] & _MASK32
    block = torch.arange(-(-numbers // 4), device=row.device)[None, :]
    # Filled on the device: a tensor made from a Python number would be a copy that waits for the queue.
    third, fourth = (torch.full((), word & _MASK32, dtype=torch.int64, device=row.device) for word in (step, stream))
    return philox4x32((block, row, third, fourth), seed & _MASK64)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit_interval(words: Tensor, dtype: torch.dtype) -> Tensor:
    return ((words >> 8).to(dtype) + 0.5) * 2.0**-24


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2 * torch.log(u))
    angle = 2 * math.pi * v
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _shaped(values: Tensor, shape: Sequence[int]) -> Tensor:
    return values.flatten(1)[:, : math.prod(shape)].reshape(len(values), *shape)
