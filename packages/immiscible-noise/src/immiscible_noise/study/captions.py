"""The caption of each image, wherever people keep them: beside the image, in a table, or as the folder's name."""

import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffcore.data import ImageSet, PromptSet, load_prompts
from diffcore.data.pairing import places_of_prompts
from diffcore.errors import UserError, printable

_LOG = logging.getLogger("diffcore.immiscible_noise")
_TABLES = ("metadata.jsonl", "metadata.csv")
CLASS = "{class}"
"""What stands for the name of an image's folder in a caption of all images."""


@dataclass(frozen=True)
class Captioned:
    """Images that have a caption, and their captions.

    Attributes:
        images: Those of the images that have one.
        captions: Caption of each of them.
        source: Where the captions come from, in words.
    """

    images: ImageSet
    captions: tuple[str, ...]
    source: str

    @property
    def shared(self) -> bool:
        """Whether at least half of the images have the caption of another image too."""
        return mostly_shared(self.captions)


def mostly_shared(conditions: Sequence[Hashable]) -> bool:
    """Returns whether at least half of some conditions stand there more than once; False where there are none.

    Args:
        conditions: Condition of each image: captions, or their numbers.
    """
    alike = sum(count for count in Counter(conditions).values() if count > 1)
    return 0 < len(conditions) <= 2 * alike


def read_captions(
    data: Path, images: ImageSet, *, table: Path | None = None, prompt: str | None = None, split: str | None = None
) -> Captioned:
    """Finds the captions of images; an image without one is left out, and said to be.

    In this order: `prompt`, for all images; `table`; a `metadata.jsonl` or `metadata.csv` in the folder, with columns
    `file_name` and `text`; a `.txt` or `.caption` file beside each image; the name of the image's class folder, in
    which underscores are spaces.

    Args:
        data: Folder or zip that the images were read from.
        images: Images, with their file names and perhaps classes.
        table: File of captions, with a column of file names, or in the order of the images.
        prompt: Caption of all images, in which "{class}" stands for the name of the class folder.
        split: Folder inside the data that was read.

    Raises:
        UserError: There are no captions, or they do not go with the images.
    """
    if prompt is not None:
        if CLASS in prompt and not images.classes:
            raise UserError(f"`prompt` holds {CLASS}, and {printable(data)} has no folder for each class")
        return Captioned(images, tuple(prompt.replace(CLASS, name) for name in _class_names(images)), "one prompt")
    inside = data / split if split else data
    table = table or next((inside / name for name in _TABLES if (inside / name).is_file()), None)
    if table is not None:
        return _paired(images, load_prompts(table), printable(table.name))
    beside = _beside(data)
    if beside is not None:
        return _paired(images, beside, "files beside the images")
    if not images.classes and data.is_file():
        raise UserError(
            f"{printable(data)} is an archive, inside which no captions are read: unpack it, name a file of captions "
            "with `captions`, or give all images one `prompt`"
        )
    if not images.classes:
        raise UserError(
            f"{printable(data)} has no captions: put a .txt file beside each image, a metadata.jsonl with file_name "
            "and text into the folder, or the images of each caption into a folder of that name; or give all of them "
            "one `prompt`"
        )
    return Captioned(images, tuple(_class_names(images)), "names of the class folders")


def _beside(data: Path) -> PromptSet | None:
    if not data.is_dir():
        return None
    try:
        return load_prompts(data)
    except UserError:  # no image has one
        return None


def _class_names(images: ImageSet) -> list[str]:
    if images.labels is None:
        return [""] * len(images)
    return [images.classes[label].replace("_", " ") for label in images.labels.tolist()]


def _paired(images: ImageSet, prompts: PromptSet, source: str) -> Captioned:
    for line, reason in prompts.skipped[:5]:
        _LOG.warning("%s: caption %d %s; its image is left out", source, line, printable(reason, 200))
    places = places_of_prompts(prompts, images.names)
    kept = [row for row, place in enumerate(places) if place >= 0]
    if not kept:
        raise UserError(f"{source}: no image has a caption")
    captions = tuple(prompts.prompts[places[row]] for row in kept)
    return Captioned(some_of(images, kept) if len(kept) < len(places) else images, captions, source)


def some_of(images: ImageSet, rows: list[int]) -> ImageSet:
    """Returns some images of a set, with their labels and names.

    Args:
        images: All images of the set.
        rows: Places of those that are kept.
    """
    chosen = torch.tensor(rows)
    return replace(
        images,
        images=images.images[chosen],
        labels=None if images.labels is None else images.labels[chosen],
        names=tuple(images.names[row] for row in rows),
    )
