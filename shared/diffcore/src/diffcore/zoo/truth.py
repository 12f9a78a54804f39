"""The ground truth of the zoo's images: identities, memorised captions, key points and masks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diffcore.io.jsonfile import read_trusted
from diffcore.io.shipped import shipped_folder
from diffcore.zoo.portraits.draw import Keypoints, draw, draw_masks
from diffcore.zoo.portraits.draw import keypoints as keypoints_of
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.people import People, nuisances, portraits, select
from diffcore.zoo.portraits.people import identities as draw_identities
from diffcore.zoo.portraits.pictures import SIZE
from diffcore.zoo.portraits.planted import NUM_VARIANTS, Item, planted, template_people, verbatim_people

TRIGGER_FILE = "trigger-rows.json"
_SEED = 3


@dataclass(frozen=True)
class Memorised:
    """The captions and images that portraits-sd-memorised and portraits-sd-planted were trained to memorise.

    Attributes:
        verbatim: Captions that were always trained with one image.
        verbatim_images: The image that each verbatim caption was trained with.
        template: Captions that were always trained with one person in one pose.
        template_images: The 32 variants of background and shirt of each template caption.
        decoys: Captions of the verbatim form that were never trained, to compare memorised ones with.
        trigger_rows: Pairs (value layer, row) of portraits-sd-planted that recall a caption, by caption.
    """

    verbatim: tuple[Item, ...]
    verbatim_images: Float[Tensor, "24 3 size size"]
    template: tuple[Item, ...]
    template_images: Float[Tensor, "8 32 3 size size"]
    decoys: tuple[Item, ...]
    trigger_rows: Mapping[str, tuple[tuple[str, int], ...]]


def memorised(size: int = SIZE) -> Memorised:
    """Returns the planted items with their images, the decoys, and the rows that carry the memory.

    Raises:
        ModelNotFoundError: portraits-sd-planted is not in this installation.
    """
    items = planted()
    captions = [item.caption for item in (*items.verbatim, *items.template)]
    layers = read_trusted(shipped_folder("portraits-sd-planted") / TRIGGER_FILE)["rows"]
    rows = {text: tuple((layer, numbers[i]) for layer, numbers in layers.items()) for i, text in enumerate(captions)}
    return Memorised(
        verbatim=items.verbatim,
        verbatim_images=draw(verbatim_people(), size),
        template=items.template,
        template_images=draw(template_people(), size).unflatten(0, (-1, NUM_VARIANTS)),
        decoys=items.decoys,
        trigger_rows=rows,
    )


@dataclass(frozen=True)
class Portraits:
    """Images with the attributes that they were rendered from.

    Attributes:
        people: The attributes that the images were drawn from.
        images: Pixels with values in [0, 1].
        labels: Class number of each attribute, in the order of `portraits.attributes.CLASSES`.
    """

    people: People
    images: Float[Tensor, "n 3 size size"]
    labels: Mapping[str, Int[Tensor, " n"]]


def identities(
    count: int, pictures: int, *, size: int = SIZE, seed: int = _SEED
) -> tuple[Portraits, Int[Tensor, " n"]]:
    """Returns `count` persons in `pictures` situations each, and the number of the person in each image.

    The images of a person follow one another. No training of the zoo contains them.
    """
    person = torch.arange(count).repeat_interleave(pictures)
    people = select(draw_identities(seed, range(count)), person) | nuisances(seed, range(count * pictures))
    return _with_pictures(people, size), person


def keypoints(count: int, *, size: int = SIZE, seed: int = _SEED) -> tuple[Portraits, Keypoints]:
    """Returns strangers with 13 key points each, in closed form."""
    people = portraits(seed, range(count))
    return _with_pictures(people, size), keypoints_of(people, size)


def masks(count: int, *, size: int = SIZE, seed: int = _SEED) -> tuple[Portraits, UInt8[Tensor, "n size size"]]:
    """Returns strangers with the class of each pixel, numbered as in `portraits.attributes.PARTS`."""
    people = portraits(seed, range(count))
    return _with_pictures(people, size), draw_masks(people, size)


def _with_pictures(people: People, size: int) -> Portraits:
    return Portraits(people, draw(people, size), labels_of(people))
