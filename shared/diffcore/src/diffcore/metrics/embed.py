"""Features of all images of a folder or archive: each image decoded once, each network run once, resumable.

Images are processed in fixed chunks, also after resuming: the features of a row depend, in their last bits, on the
other rows of the batch. A finished slice of one network is a part of the run folder, named by the digests of the
network and of the image set, so that an interrupted run resumes to the same bytes.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.data.decode import Decoded
from diffcore.data.files import UnreadableFileError
from diffcore.data.source import MAX_PIXELS, ImageSource
from diffcore.errors import UserError, printable
from diffcore.metrics.features import FeatureExtractor
from diffcore.run import Run
from diffcore.runtime import default_threads

SLICE = 512  # images whose features are saved together
_CHUNK = 128  # images in memory at their own size, and as many decoded ahead
_TASK = 16  # images per hand-over to a thread: small images decode faster than threads switch

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows how far a loop is: takes what it goes through, a few words, and the number of items."""


def silent(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    """Shows nothing."""
    return items


@dataclass(frozen=True)
class Embedded:
    """An image set as features.

    Attributes:
        names: File names of the images that could be read, in order.
        indices: Places of these images in the source.
        features: One row per image, by the extractor's name.
        skipped: Name and reason of each file that could not be read.
        notes: Names of files with conversions that their owner may not expect.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    features: Mapping[str, Float[Tensor, "n _"]]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """How images are read and fed to the networks.

    Attributes:
        device: Device that the networks are on.
        batch_size: Number of images per forward pass.
        strict: Whether the first unreadable file is an error.
        max_pixels: Width times height above which a file is not decoded.
    """

    device: torch.device
    batch_size: int = 32
    strict: bool = False
    max_pixels: int = MAX_PIXELS


def num_parts(num_images: int) -> int:
    """Returns how many parts the features of one network take."""
    return -(-num_images // SLICE)


def embed_images(
    source: ImageSource,
    digest: str,
    extractors: Sequence[FeatureExtractor],
    run: Run,
    reading: Reading,
    progress: Progress = silent,
) -> Embedded:
    """Returns the features of an image set under several networks, computing what the run folder does not hold yet.

    Args:
        source: The images, not yet read.
        digest: Digest that identifies this image set, such as `run.input_hash` gives.
        extractors: One network or more, each run once on every image.
        run: Run folder that keeps finished slices.
        reading: Device, batch size and limits for reading images.
        progress: Shows how far the reading is.

    Raises:
        UserError: No image can be read, or a network makes something of one that is not finite.
    """
    slices = list(_pieces(range(len(source.names)), SLICE))
    of = f"{digest[:16]}-{len(source.names)}"
    keys = {(e.name, s.start): f"{e.sha256[:16]}-{of}-{s.start:08d}" for e in extractors for s in slices}
    missing = set(run.missing(keys.values()))
    plan = {s.start: [e for e in extractors if keys[e.name, s.start] in missing] for s in slices}
    chunks = [chunk for s in slices if plan[s.start] for chunk in _pieces(s, _CHUNK)]
    decoded = iter(progress(_decoded_ahead(source, chunks, reading), f"{_CHUNK} images each", len(chunks)))
    for s in slices:
        needed = plan[s.start]
        rows: dict[str, list[Tensor]] = {extractor.name: [] for extractor in needed}
        facts: dict[str, list[Any]] = {"indices": [], "skipped": [], "notes": []}
        for chunk, images in zip(_pieces(s, _CHUNK) if needed else (), decoded, strict=False):
            good = _sorted_out(source, chunk, images, facts, strict=reading.strict)
            for extractor in needed:
                rows[extractor.name].append(_features(extractor, [image.pixels for image in good], reading))
        for extractor in needed:
            features = torch.cat([found for found in rows[extractor.name] if len(found)] or [torch.empty(0, 0)])
            _require_finite(extractor, features, [source.names[index] for index in facts["indices"]])
            run.save(keys[extractor.name, s.start], {"features": features}, **facts)
    return _gathered(source, [[run.load(keys[e.name, s.start]) for s in slices] for e in extractors], extractors)


def _pieces(indices: range, size: int) -> Iterator[range]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _sorted_out(
    source: ImageSource,
    indices: range,
    images: Sequence[Decoded | UnreadableFileError],
    facts: dict[str, list[Any]],
    *,
    strict: bool,
) -> list[Decoded]:
    """Returns the images that can be used, and writes down which they are and what there is to say about the others."""
    good = []
    for index, image in zip(indices, images, strict=True):
        name = source.names[index]
        if isinstance(image, Decoded):
            good.append(image)
            facts["indices"].append(index)
            facts["notes"] += [[name, note] for note in image.notes]
        elif strict:
            raise UserError(f"{printable(name)} {image}; remove it, or leave out `strict`")
        else:
            facts["skipped"].append([name, str(image)])
    return good


def _decoded_ahead(
    source: ImageSource, chunks: Sequence[range], reading: Reading
) -> Iterator[list[Decoded | UnreadableFileError]]:
    """Yields the images of each chunk; those of the next one are decoded meanwhile."""

    def decode(index: int) -> Decoded | UnreadableFileError:
        try:
            return source.decode(index, max_pixels=reading.max_pixels)
        except UnreadableFileError as error:
            return error

    def work(indices: range) -> list[Decoded | UnreadableFileError]:
        return [decode(index) for index in indices]

    with warnings.catch_warnings(), ThreadPoolExecutor(default_threads()) as pool:
        # What Pillow says about damaged metadata is not about the pixels; damaged pixels are listed by name.
        warnings.filterwarnings("ignore", module="PIL")
        try:
            waiting: list[list[Future[list[Decoded | UnreadableFileError]]]] = []
            for place in range(len(chunks)):
                for chunk in chunks[place + len(waiting) : place + 2]:
                    waiting.append([pool.submit(work, task) for task in _pieces(chunk, _TASK)])
                yield [image for future in waiting.pop(0) for image in future.result()]
        finally:
            pool.shutdown(cancel_futures=True)


def _features(extractor: FeatureExtractor, images: Sequence[np.ndarray], reading: Reading) -> Float[Tensor, "n _"]:
    """Returns a row per image; images of one shape go through the preprocessing, then the network, together."""

    def prepared(places: Sequence[int]) -> Tensor:
        batch = torch.from_numpy(np.stack([images[place] for place in places]))
        return extractor.preprocessing(batch.to(reading.device).float() / 255)

    batches = list(_batches([image.shape for image in images], reading.batch_size))
    if len({image.shape for image in images}) == 1:
        return torch.cat([extractor.embed(prepared(places)) for places in batches]).cpu()
    inputs = {place: row for places in batches for place, row in zip(places, prepared(places), strict=True)}
    rows: dict[int, Tensor] = {}
    for places in _batches([inputs[place].shape for place in range(len(images))], reading.batch_size):
        rows |= zip(places, extractor.embed(torch.stack([inputs[place] for place in places])), strict=True)
    return torch.stack([rows[place] for place in range(len(images))]).cpu() if rows else torch.empty(0, 0)


def _batches(kinds: Sequence[Hashable], batch_size: int) -> Iterator[list[int]]:
    """Yields the places of items of one kind, `batch_size` at a time."""
    groups: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(place)
    for places in groups.values():
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def _require_finite(extractor: FeatureExtractor, rows: Tensor, names: Sequence[str]) -> None:
    bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{printable(extractor.name)} makes NaN or infinity of {len(bad)} images, {printable(names[bad[0]])} the "
            "first; check the network's file, or remove the image"
        )


def _gathered(source: ImageSource, parts: Sequence[Sequence[Any]], extractors: Sequence[FeatureExtractor]) -> Embedded:
    first = [part.fields for part in parts[0]]
    indices = tuple(index for fields in first for index in fields["indices"])
    skipped = tuple((name, reason) for fields in first for name, reason in fields["skipped"])
    if not indices:
        name, reason = skipped[0]
        raise UserError(
            f"{printable(source.path)} has no readable image among {len(skipped)} files; "
            f"the first, {printable(name)}, {reason}"
        )
    return Embedded(
        tuple(source.names[index] for index in indices),
        indices,
        {
            extractor.name: torch.cat([p.tensors["features"] for p in own if len(p.tensors["features"])])
            for extractor, own in zip(extractors, parts, strict=True)
        },
        skipped,
        tuple((name, note) for fields in first for name, note in fields["notes"]),
    )
