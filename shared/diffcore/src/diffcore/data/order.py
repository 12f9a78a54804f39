"""Sorting file names by the numbers in them: 2 before 10."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(\d+)")


def by_number(names: Iterable[str]) -> list[str]:
    """Returns names sorted with every run of digits taken as a number, folder by folder.

    Example:
        >>> by_number(["img_10.png", "img_2.png"])
        ['img_2.png', 'img_10.png']
    """
    return sorted(names, key=_key)


def is_numbered(names: Sequence[str]) -> bool:
    """Returns whether names differ in their numbers alone, so that sorting by number is safe.

    Example:
        >>> is_numbered(["img_10.png", "img_2.png"]), is_numbered(["a1f.png", "9be.png"])
        (True, False)
    """
    return len({_NUMBER.sub("0", name) for name in names}) == 1


def numbers(name: str) -> tuple[int, ...]:
    """Returns the numbers in a name, from left to right."""
    return tuple(int(digits) for digits in _NUMBER.findall(name))


def _key(name: str) -> tuple[list[list[str | int]], str]:
    levels = [_NUMBER.split(level) for level in name.split("/")]
    return [[int(part) if place % 2 else part for place, part in enumerate(level)] for level in levels], name
