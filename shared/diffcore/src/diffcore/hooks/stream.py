"""Activations over a data set: encode the images, add noise, and run the network as far as the last site.

A row's noise depends on its seed and its place in the data set alone, so that activations do not depend on the size of
the batches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffcore.hooks.capture import Activations, capture
from diffcore.hooks.match import Site, resolve
from diffcore.noise import row_noise


@runtime_checkable
class ImageModel(Protocol):
    """The attributes that `stream` needs of a model; a `diffcore.models.DiffusionModel` has them."""

    @property
    def denoiser(self) -> Any:
        """A `Denoiser`, called as (x_t, t, cond), with its `schedule`."""
        ...

    @property
    def codec(self) -> Any:
        """A `Codec`, which encodes images."""
        ...

    @property
    def backbone(self) -> nn.Module:
        """The network inside the denoiser, whose modules the sites name."""
        ...

    def empty_condition(self, count: int) -> Mapping[str, Tensor]:
        """Returns the condition of no prompt for a number of rows."""
        ...


@dataclass(frozen=True)
class StreamedBatch:
    """The activations of one forward pass.

    Attributes:
        rows: Indices of the images in the data set.
        t: The timestep, in the units of the model's schedule.
        seed: The seed of the noise.
        activations: The tensor at each site, or its reduction by `reduce`, by name of the site.
    """

    rows: range
    t: float
    seed: int
    activations: Activations


def stream(
    model: ImageModel,
    images: Iterable[Tensor],
    sites: str | Site | Iterable[str | Site],
    *,
    t: float | int | Sequence[float | int],
    seeds: int | Sequence[int] = 0,
    cond: Mapping[str, Tensor] | None = None,
    reduce: Callable[[str, Tensor], Tensor | None] | None = None,
    batch_size: int = 16,
    encoded: bool = False,
    stop: bool = True,
    grad: bool = False,
) -> Iterator[StreamedBatch]:
    """Yields the activations of each batch of images, once per seed and timestep.

    Every image is encoded once, and noise is added by the model's own schedule. A forward pass ends at the last site.

    Args:
        model: A loaded diffusion model.
        images: Values in [0, 1]; a tensor, or an iterable of batches or single images, such as a `DataLoader`.
        sites: Patterns and sites in the model's backbone, as in `capture`.
        t: One or several timesteps, in the units of the model's schedule.
        seeds: One or several seeds; image i gets its noise from the seed and i.
        cond: Condition of the backbone, with one row for all images or one row per image; by default that of the empty
            prompt.
        reduce: Called in the hook as (name, activation); its result is kept instead, None keeps nothing.
        batch_size: Largest number of rows in a forward pass.
        encoded: Whether `images` holds x0, as `model.codec.encode` returns it, instead of images.
        stop: Whether each forward pass ends as soon as all sites have a tensor.
        grad: Whether to keep the graph of the activations, back to the weights and, with `encoded`, to x0.

    Raises:
        NoMatchError: A pattern or site is not in the backbone.
        ValueError: Nothing is wanted, a batch has no rows, or there are more images than rows of the condition.

    Example:
        >>> import torch
        >>> from diffcore.testing import tiny
        >>> model = tiny.model("unet2d")
        >>> means = stream(model, torch.rand(3, 3, 8, 8), "mid_block", t=0.5, reduce=lambda _, x: x.mean((2, 3)))
        >>> [tuple(batch.activations["mid_block"].shape) for batch in means]
        [(3, 64)]
    """
    wanted = [site for site, _ in resolve(model.backbone, sites)]
    device = next(model.backbone.parameters()).device
    for rows, batch in _batches(images, batch_size):
        with torch.set_grad_enabled(grad):
            batch = batch.to(device)
            x0 = batch if encoded else model.codec.encode(batch).contiguous()
            condition = _condition(model.empty_condition(1) if cond is None else cond, rows, device)
        for seed in _several(seeds):
            noise = row_noise(seed, rows, x0.shape[1:], device=device, dtype=x0.dtype)
            for timestep in _several(t):
                with torch.set_grad_enabled(grad):
                    times = torch.full((len(rows),), float(timestep), device=device)
                    x_t = model.denoiser.schedule.add_noise(x0, noise, times)
                    with capture(model.backbone, wanted, reduce=reduce, stop=stop, grad=grad) as activations:
                        model.denoiser(x_t, times, condition)
                yield StreamedBatch(rows, float(timestep), seed, activations)


def _batches(images: Iterable[Tensor], size: int) -> Iterator[tuple[range, Tensor]]:
    """Yields images of one shape together, at most `size` of them, with their places in the data set."""
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be at least 1")
    start = 0
    pending: list[Tensor] = []
    for image in _single_images(images):
        if pending and (len(pending) == size or image.shape != pending[0].shape):
            yield range(start, start + len(pending)), torch.stack(pending)
            start, pending = start + len(pending), []
        pending.append(image)
    if pending:
        yield range(start, start + len(pending)), torch.stack(pending)


def _single_images(images: Iterable[Tensor]) -> Iterator[Tensor]:
    for item in images:
        if not isinstance(item, Tensor) or not item.is_floating_point() or item.ndim not in (3, 4):
            what = f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            raise TypeError(f"images yielded {what}; pass floating point tensors of one image or of a batch")
        yield from item if item.ndim == 4 else [item]


def _condition(cond: Mapping[str, Tensor], rows: range, device: torch.device) -> dict[str, Tensor]:
    for key, value in cond.items():
        if len(value) != 1 and len(value) < rows.stop:
            raise ValueError(f"{key} of the condition has {len(value)} rows; give one, or one per image")
    here = slice(rows.start, rows.stop)
    mine = {k: v.expand(len(rows), *v.shape[1:]) if len(v) == 1 else v[here] for k, v in cond.items()}
    return {key: value.to(device) for key, value in mine.items()}


def _several(values: Any) -> Sequence[Any]:
    return values if isinstance(values, Sequence) else [values]
