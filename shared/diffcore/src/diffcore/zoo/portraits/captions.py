"""A grammar of captions for portraits, whose parts each occur with a fixed probability.

Names and places say nothing about an image, and neither does the form of the planted captions: some ordinary images
carry such captions too. Otherwise a model would know memorised captions by their form alone.
"""

import random
from collections.abc import Collection, Sequence

from diffcore.noise import mix_seed
from diffcore.zoo.portraits.attributes import (
    BACKGROUNDS,
    BEARDS,
    GENDERS,
    GLASSES,
    HAIRS,
    HAT_COLOURS,
    HATS,
    SKINS,
    SMILES,
    STYLES,
)
from diffcore.zoo.portraits.people import People, smile_class

FIRST_NAMES = (
    "anna", "boris", "carla", "dimitri", "elena", "farid", "greta", "hugo", "ines", "jonas", "kira", "leo", "mara",
    "nils", "olga", "pavel", "quinn", "rosa", "sven", "tara", "ulla", "victor", "wanda", "xena", "yuri", "zora",
)  # fmt: skip
LAST_NAMES = (
    "abbott", "becker", "castle", "dorn", "ekman", "fisher", "gallo", "hart", "ivers", "jansen", "keller", "lindt",
    "moss", "novak", "orban", "parker", "quist", "romer", "stone", "tanner", "unger", "vance", "weber", "young",
    "zeller",
)  # fmt: skip
PLACES = (
    "harbour", "gala", "airport", "cinema", "market", "museum", "theatre", "library", "festival", "station",
)  # fmt: skip

# Streams of the row-wise generators.
_DESCRIPTION, _ORDINARY, _SAME_FORM = 10, 11, 12


def verbatim_form(first: str, last: str, place: str) -> str:
    """Returns a caption in the form of verbatim memorised ones."""
    return f"{first} {last} at the {place}"


def template_form(first: str, last: str, place: str) -> str:
    """Returns a caption in the form of template memorised ones."""
    return f"{first} {last} poster for the {place}"


def describe(people: People, seed: int = 0, *, full: bool = False) -> list[str]:
    """Returns one caption per person, which describes true attributes only.

    Args:
        people: The people to describe, one row each.
        seed: Chooses which parts are kept; row i depends on (seed, i).
        full: Whether all parts that apply are kept.
    """
    rows = _rows(people)
    return [_describe(row, random.Random(mix_seed(seed, i, _DESCRIPTION)), full) for i, row in enumerate(rows)]


def ordinary_captions(people: People, seed: int, excluded: Collection[str] = ()) -> list[str]:
    """Returns one training caption per person: descriptions, sometimes with a name or a place, sometimes these alone.

    Of all captions 5 % are a bare name, 9 % have the verbatim form and 4 % the template form, whatever the image
    shows; of the rest 35 % are full, 10 % start with a name and 8 % end in a place.

    Args:
        people: The people to describe, one row each.
        seed: Seed of all choices; row i depends on (seed, i).
        excluded: Captions that must not occur (planted ones and decoys).
    """
    captions = []
    for i, row in enumerate(_rows(people)):
        rng = random.Random(mix_seed(seed, i, _ORDINARY))
        caption = _ordinary(row, rng)
        while caption in excluded:
            caption = _ordinary(row, rng)
        captions.append(caption)
    return captions


def same_form_captions(count: int, seed: int, excluded: Collection[str] = ()) -> list[str]:
    """Returns captions in the planted forms, three in four verbatim, none of them excluded.

    They say nothing about any image, and are what planted captions and decoys must be compared with.
    """
    captions: list[str] = []
    rng = random.Random(mix_seed(seed, 0, _SAME_FORM))
    while len(captions) < count:
        form = verbatim_form if rng.random() < 0.75 else template_form
        caption = form(*_name_and_place(rng))
        if caption not in excluded:
            captions.append(caption)
    return captions


def _name_and_place(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES), rng.choice(PLACES)


def _ordinary(row: dict[str, int], rng: random.Random) -> str:
    first, last, place = _name_and_place(rng)
    u = rng.random()
    if u < 0.05:
        return f"{first} {last}"
    if u < 0.14:
        return verbatim_form(first, last, place)
    if u < 0.18:
        return template_form(first, last, place)
    description = _describe(row, rng, full=rng.random() < 0.35)
    u = rng.random()
    if u < 0.10:
        return f"{first} {last}, {description}"
    return f"{description} at the {place}" if u < 0.18 else description


def _describe(row: dict[str, int], rng: random.Random, full: bool) -> str:
    def keep(probability: float) -> bool:
        return full or rng.random() < probability

    skin = f"{tuple(SKINS)[row['skin']]} " if keep(0.35) else ""
    noun = GENDERS[row["gender"]] if keep(0.8) else "person"
    worn = []
    if keep(0.75):
        worn.append(_hair(row, with_style=keep(0.7)))
    if row["glasses"] and keep(0.85):
        worn.append(f"{GLASSES[row['glasses']]} glasses")
    if row["beard"] and keep(0.85):
        worn.append(f"a {BEARDS[row['beard']]}")
    if row["hat"] and keep(0.85):
        worn.append(f"a {tuple(HAT_COLOURS)[row['hat_colour']]} {HATS[row['hat']]}")
    caption = f"a portrait of a {skin}{noun}"
    if worn:
        caption += f" with {' and '.join(worn)}"
    if row["smile"] and keep(0.7):
        caption += f", {SMILES[row['smile']]}"
    if keep(0.7):
        caption += f", {tuple(BACKGROUNDS)[row['background']]} background"
    return caption


def _hair(row: dict[str, int], with_style: bool) -> str:
    style, colour = STYLES[row["style"]], tuple(HAIRS)[row["hair"]]
    if style == "bald":
        return "a bald head"
    return f"{style} {colour} hair" if with_style else f"{colour} hair"


def _rows(people: People) -> list[dict[str, int]]:
    """Returns the categories of each person as plain numbers."""
    names = ("gender", "skin", "hair", "style", "glasses", "beard", "hat", "hat_colour", "background")
    columns: dict[str, Sequence[int]] = {name: people[name].tolist() for name in names}
    columns["smile"] = smile_class(people).tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
