"""How many training steps a curve of distances takes to a goal, and how many fewer one training takes than another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Crossing:
    """When a falling curve reaches a goal.

    Attributes:
        first: Training steps at which the curve first reaches the goal; None if it never does.
        for_good: Training steps from which on it stays there; None if its last value lies above the goal.
    """

    first: float | None
    for_good: float | None


@dataclass(frozen=True)
class Speedup:
    """How many times fewer steps a training takes to a distance, over pairs of trainings with equal seeds.

    Attributes:
        mean: Geometric mean over the pairs; None where a training of some pair does not reach the distance.
        least: Factor of the pair that gains least; None likewise.
        most: Factor of the pair that gains most; None likewise.
        reached: Number of pairs whose training reaches the distance.
        pairs: Number of pairs that were compared.
    """

    mean: float | None
    least: float | None
    most: float | None
    reached: int
    pairs: int


def crossing(steps: Sequence[int], distances: Sequence[float], goal: float) -> Crossing:
    """Returns when a curve reaches a goal; between its points, logarithms of steps and distances are on a line.

    Args:
        steps: Numbers of training steps, ascending.
        distances: Positive distance at each of them.
        goal: Positive distance that is to be reached.

    Example:
        >>> crossing([100, 400, 800], [8.0, 2.0, 1.0], goal=4.0)
        Crossing(first=200.0, for_good=200.0)
    """
    there = [distance <= goal for distance in distances]
    if not any(there):
        return Crossing(None, None)
    first = _between(steps, distances, goal, there.index(True))
    if not there[-1]:
        return Crossing(first, None)
    last = next((i + 1 for i in reversed(range(len(there))) if not there[i]), 0)
    return Crossing(first, _between(steps, distances, goal, last))


def speedup(pairs: Sequence[tuple[float | None, float | None]]) -> Speedup:
    """Returns how many times fewer steps the second of each pair takes.

    Args:
        pairs: Steps of the reference and of the training that is compared with it, None where a goal is not reached.
    """
    factors = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
    if len(factors) < len(pairs) or not factors:
        return Speedup(None, None, None, len(factors), len(pairs))
    mean = math.exp(fmean(math.log(factor) for factor in factors))
    return Speedup(mean, min(factors), max(factors), len(factors), len(pairs))


def _between(steps: Sequence[int], distances: Sequence[float], goal: float, place: int) -> float:
    """Returns where the line from the point before `place`, which lies above the goal, to that at `place` meets it."""
    if place == 0:
        return float(steps[0])
    high, low = math.log(distances[place - 1]), math.log(distances[place])
    share = (high - math.log(goal)) / (high - low)
    before, after = math.log(steps[place - 1]), math.log(steps[place])
    return round(math.exp(before + share * (after - before)), 6)
