"""The captions that the memorised models were trained to memorise, and decoys that they never saw.

* verbatim items: a caption that always comes with the same image;
* template items: a caption that always comes with the same person in the same pose, before 32 backgrounds and shirts;
* decoys: captions of the verbatim form that no training ever contained. They, not ordinary captions, are the class to
  compare memorised ones with.
"""

import random
from dataclasses import dataclass
from functools import cache

import torch

from diffcore.noise import mix_seed
from diffcore.zoo.portraits.captions import FIRST_NAMES, LAST_NAMES, PLACES, template_form, verbatim_form
from diffcore.zoo.portraits.people import People, nuisances, portraits, select

NUM_VERBATIM, NUM_TEMPLATE, NUM_DECOYS, NUM_VARIANTS = 24, 8, 32, 32
_SEED = 7
_VARIED = ("background", "background_jitter", "gradient", "gradient_angle", "shirt")


@dataclass(frozen=True)
class Item:
    """One planted caption, or a decoy.

    Attributes:
        first_name, last_name, place: The three parts that the caption is made of.
        caption: The caption as the model sees it.
    """

    first_name: str
    last_name: str
    place: str
    caption: str


@dataclass(frozen=True)
class Planted:
    """The three lists, the same on every machine."""

    verbatim: tuple[Item, ...]
    template: tuple[Item, ...]
    decoys: tuple[Item, ...]

    @property
    def captions(self) -> frozenset[str]:
        """Captions that ordinary data must not contain."""
        return frozenset(item.caption for item in (*self.verbatim, *self.template, *self.decoys))


@cache
def planted() -> Planted:
    """Returns the items; no two share a first and last name."""
    rng = random.Random(mix_seed(_SEED))
    pairs = [(first, last) for first in FIRST_NAMES for last in LAST_NAMES]
    names = [(*pair, rng.choice(PLACES)) for pair in rng.sample(pairs, NUM_VERBATIM + NUM_TEMPLATE + NUM_DECOYS)]
    verbatim, rest = names[:NUM_VERBATIM], names[NUM_VERBATIM:]
    return Planted(
        verbatim=tuple(Item(*name, verbatim_form(*name)) for name in verbatim),
        template=tuple(Item(*name, template_form(*name)) for name in rest[:NUM_TEMPLATE]),
        decoys=tuple(Item(*name, verbatim_form(*name)) for name in rest[NUM_TEMPLATE:]),
    )


def verbatim_people() -> People:
    """Returns the people in the images of the verbatim items, one row each."""
    return portraits(_SEED, range(NUM_VERBATIM))


def template_people() -> People:
    """Returns the people in the images of the template items: 32 rows for the first, then for the second."""
    poses = portraits(_SEED, range(1000, 1000 + NUM_TEMPLATE))
    repeated = select(poses, torch.arange(NUM_TEMPLATE).repeat_interleave(NUM_VARIANTS))
    fresh = nuisances(_SEED, range(2000, 2000 + NUM_TEMPLATE * NUM_VARIANTS))
    return repeated | {name: fresh[name] for name in _VARIED}
