"""Extracting features of many images: batch after batch, latents kept, storage in half precision where it holds.

Nothing here reads or writes files: images come as batches, and latents are kept by whatever has `get` and `put`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffcore.errors import UserError
from diffusion_featsel.extractor import FeatureExtractor, Images, Latents
from diffusion_featsel.finite import NonFiniteError
from diffusion_featsel.prepare import Placement
from diffusion_featsel.project import PrincipalComponents, Projection, random_projection

Storage = Literal["auto", "float16", "bfloat16", "float32"]
"""Precision of stored features; "auto" is float16, or bfloat16 for an activation that float16 cannot hold."""

FIT_ON = 64
"""Number of images that principal components are found on."""


@runtime_checkable
class Kept(Protocol):
    """Latents that are kept between extractions."""

    def get(self, keys: Sequence[int], size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Returns mean and standard deviation of a batch's latents; None where one is missing."""
        ...

    def put(self, keys: Sequence[int], size: tuple[int, int], mean: Tensor, std: Tensor) -> None:
        """Keeps the latents of a batch."""
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Images that are computed together.

    Attributes:
        images: The images, which end up at one size.
        keys: One number per image, where they are known already.
        prompts: One prompt per image; None takes the extractor's.
    """

    images: Images
    keys: Sequence[int] | None = None
    prompts: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class Extracted:
    """Features of one batch, on the CPU.

    Attributes:
        features: One tensor (n, c, h, w) per map, by the extractor's names; images that failed have no row.
        rows: Places in the batch of the images that have rows.
        placements: Where each image of the batch lies in the network's input.
        failed: Reason by the place in the batch, for images of which an activation is not a number.
    """

    features: Mapping[str, Tensor]
    rows: tuple[int, ...]
    placements: tuple[Placement, ...]
    failed: Mapping[int, str]


def extract(
    extractor: FeatureExtractor, batches: Iterable[Batch], *, latents: Kept | None = None, storage: Storage = "auto"
) -> Iterator[Extracted]:
    """Yields the features of each batch, in order.

    Args:
        extractor: Extractor of the wanted activations.
        batches: Batches of images; how they are cut decides the last bits of their features.
        latents: Keeps latents, so that images are not encoded again.
        storage: Precision of the result.

    Raises:
        NonFiniteError: An activation overflows in half precision, for every image or for some.
        UserError: Images, prompts and network do not go together, or `storage` cannot hold a number.

    Example:
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> extractor = FeatureExtractor(from_pipeline(tiny.pipeline("sd15")), ["mid-vit-out"])
        >>> found = next(extract(extractor, [Batch(torch.rand(2, 3, 16, 16))]))
        >>> found.features["mid-vit-out"].dtype, tuple(found.features["mid-vit-out"].shape)
        (torch.float16, (2, 64, 4, 4))
    """
    for batch in batches:
        prepared = extractor.protocol.prepare(extractor.model, batch.images, keys=batch.keys)
        size = (prepared.images.shape[2], prepared.images.shape[3])
        known = None if latents is None else latents.get(prepared.keys, size)
        with torch.no_grad():
            if known is None:
                encoded = extractor.latents(prepared)
                if latents is not None:
                    latents.put(prepared.keys, size, encoded.mean, encoded.std)
            else:
                mean, std = (tensor.to(extractor.model.device) for tensor in known)
                encoded = Latents(mean, std, prepared.keys, size)
            features, rows, failed = _features(extractor, encoded, batch.prompts)
        yield Extracted(to_storage(features, storage), rows, prepared.placements, failed)


def _features(
    extractor: FeatureExtractor, latents: Latents, prompts: Sequence[str] | None
) -> tuple[dict[str, Tensor], tuple[int, ...], dict[int, str]]:
    """Returns features, the places that have them, and the reason why others have none."""
    try:
        return extractor.features(latents, prompts), tuple(range(len(latents))), {}
    except NonFiniteError as error:
        if extractor.model.dtype == torch.float16 or len(latents) == 1:
            raise
        first = error
    # One image at a time tells which of them fail.
    found: list[dict[str, Tensor]] = []
    rows: list[int] = []
    failed: dict[int, str] = {}
    for place in range(len(latents)):
        part = slice(place, place + 1)
        try:
            found.append(extractor.features(latents[part], None if prompts is None else prompts[part]))
            rows.append(place)
        except NonFiniteError as error:
            failed[place] = str(error)
    if not found:
        raise first
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}, tuple(rows), failed


def to_storage(features: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Returns features on the CPU in the precision that they are stored in.

    Args:
        features: Maps of activations by name.
        storage: Precision; "auto" is float16 where it holds every number, else bfloat16.

    Raises:
        UserError: float16 is asked for, and a number is too large for it.

    Example:
        >>> kept = to_storage({"a": torch.tensor([1.0]), "b": torch.tensor([1e5])}, "auto")
        >>> kept["a"].dtype, kept["b"].dtype
        (torch.float16, torch.bfloat16)
    """
    if storage in ("bfloat16", "float32"):
        return _on_cpu({name: maps.to(getattr(torch, storage)) for name, maps in features.items()})
    largest = torch.stack([maps.abs().amax().float() for maps in features.values()]).tolist()
    limit = torch.finfo(torch.float16).max
    kept: dict[str, Tensor] = {}
    for (name, maps), most in zip(features.items(), largest, strict=True):
        if most > limit and storage == "float16":
            raise UserError(f"`storage` is 'float16', but {name} reaches {most:.3g}; store it as bfloat16 or float32")
        kept[name] = maps.to(torch.float16 if most <= limit else torch.bfloat16)
    return _on_cpu(kept)


def _on_cpu(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies everything at once: from an accelerator into pinned memory, waiting for it a single time."""
    if not any(maps.is_cuda for maps in features.values()):
        return {name: maps.cpu().contiguous() for name, maps in features.items()}
    landed = {
        name: torch.empty(maps.shape, dtype=maps.dtype, pin_memory=True).copy_(maps, non_blocking=True)
        for name, maps in features.items()
    }
    torch.cuda.synchronize()
    return landed


def fit_projections(extractor: FeatureExtractor, batches: Iterable[Batch], how: str) -> dict[str, Projection]:
    """Returns a projection for each activation, as settings such as "pca:64" or "random:64" ask for.

    Args:
        extractor: The extractor, without projections.
        batches: Batches of images, of which the first 64 images count for principal components.
        how: "pca:D" for the D leading principal components, or "random:D" for D random directions.

    Raises:
        UserError: The setting is no such word, or there are fewer channels than D.
    """
    kind, _, number = how.partition(":")
    if kind not in ("pca", "random") or not number.isdigit() or int(number) < 1:
        raise UserError(f"`project` is {how!r}; give 'pca:D' or 'random:D', such as pca:64")
    if kind == "random":
        rows = extractor.activations()
        return {row.name: random_projection(row.name, row.channels, int(number)) for row in rows}
    found: dict[str, PrincipalComponents] = {}
    seen = 0
    for extracted in extract(extractor, batches, storage="float32"):
        for name, maps in extracted.features.items():
            activation = name.partition("@")[0]
            found.setdefault(activation, PrincipalComponents(maps.shape[1])).add(maps)
        seen += len(extracted.placements)
        if seen >= FIT_ON:
            break
    return {name: components.projection(int(number)) for name, components in found.items()}
