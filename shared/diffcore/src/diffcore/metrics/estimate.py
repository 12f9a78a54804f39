"""The estimate of a mean or a distance with its standard error."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A number, its standard error, and how many rows (images, prompts) it rests on: of the smaller side, where two."""

    value: float
    standard_error: float
    n: int
