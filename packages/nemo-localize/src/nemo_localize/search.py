"""Selection and refinement in few and large questions: the answer of `localize.select` and `localize.refine`, sooner.

Both are generators that know nothing of networks: they yield questions and are sent the answers, so that one forward
pass can serve many prompts, and so that a test can answer with any function. What may be asked together:

* Candidate sets are nested and known: several are tried at once, for the most stubborn seed alone. A set is dropped as
  soon as one seed stays similar; the other seeds are asked only about the first set that this seed lets pass.
* Refinement removes greedily, each test resting on all removals before it. So assume that the next items all go, and
  ask about the cumulative sets at once: accept up to the first failure, keep that item, go on after it. Here too the
  most stubborn seed, the one of highest score, goes first; one question later the other seeds are asked about the
  removals that it accepted, while it already looks ahead as if they agreed.

Every decision rests on the scores that the plain form would have looked at, so the answer is the same for any function
of (seed, set), monotone or not.

References:
    Hintersdorf, Struppek et al. 2024, algorithms 3 and 4; layers deepest first, as in the published code.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_SETS = 4  # candidate sets in the first question, doubled in each further one
_AHEAD = 8  # items that refinement looks ahead, doubled after a clean look, halved after a failure
_FARTHEST = 64


@dataclass(frozen=True)
class Question:
    """How similar is each seed to what it was before neurons were ablated, or to the seed most like it?

    Attributes:
        ablated: Numbers of the neurons; never empty.
        seeds: Indices of the seeds that are asked about.
        threshold: Value that the answers will be compared with.
        among: Whether the seeds are compared with one another.
    """

    ablated: frozenset[int]
    seeds: tuple[int, ...]
    threshold: float
    among: bool = False


Answers = list[tuple[float, ...]]
"""For each question one similarity per seed, in [0, 1]."""

Search = Generator[list[Question], Answers, T]
"""Yields questions, is sent their answers, returns what it found."""


@dataclass(frozen=True)
class Selection:
    """The first candidate set that suppresses.

    Attributes:
        index: Number of the set; of the last one, where none suppresses.
        reached: Whether all seeds fell to the threshold.
        scores: Similarity of each seed under that set.
    """

    index: int
    reached: bool
    scores: dict[int, float]


@dataclass(frozen=True)
class Refinement:
    """What is left of a candidate set.

    Attributes:
        neurons: Numbers of the neurons that stay ablated.
        scores: Similarity of each seed with these ablated.
        residual: Similarity of each seed to the seed most like it with these ablated; empty where that was not asked.
    """

    neurons: frozenset[int]
    scores: dict[int, float]
    residual: tuple[float, ...] = ()


def select(
    sets: Sequence[frozenset[int]], seeds: Sequence[int], tau: float, *, give_up_early: bool = True
) -> Search[Selection]:
    """Finds the first set under which no seed is more similar than tau.

    Args:
        sets: Nested candidate sets, at least one.
        seeds: Indices of the seeds, most stubborn first, as far as that is known.
        tau: Threshold of similarity; a score equal to it counts as suppressed.
        give_up_early: Ask about the last set in the first question, and stop where it fails. Where a smaller set would
            have passed all the same, that is the one thing in which this differs from the sequential search.
    """
    order = list(seeds)
    # An empty set changes nothing, and a set like the one before fails like it.
    tried = [index for index, ablated in enumerate(sets) if ablated and (index == 0 or ablated != sets[index - 1])]
    if not tried:
        return Selection(len(sets) - 1, False, dict.fromkeys(order, 1.0))
    known: dict[int, dict[int, float]] = {index: {} for index in tried}
    last, place, width = tried[-1], 0, _SETS

    def failed(index: int) -> bool:
        return any(score > tau for score in known[index].values())

    while place < len(tried) and not (give_up_early and failed(last)):
        window = tried[place : place + width]
        if give_up_early and last not in window:
            window.append(last)
        yield from _ask(sets, known, [i for i in window if not failed(i)], order[:1], tau)
        while place < len(tried) and failed(tried[place]):
            place += 1
        if place == len(tried):
            break
        index = tried[place]
        if known[index]:
            yield from _ask(sets, known, [index], order, tau)
            if not failed(index):
                return Selection(index, True, known[index])
            _to_front(order, known[index])
        else:
            width *= 2
    yield from _ask(sets, known, [last], order, tau)
    return Selection(len(sets) - 1, False, known[last])


def _ask(
    sets: Sequence[frozenset[int]],
    known: dict[int, dict[int, float]],
    indices: Sequence[int],
    seeds: Sequence[int],
    tau: float,
) -> Generator[list[Question], Answers, None]:
    """Asks what is not known yet."""
    wanted = {index: tuple(seed for seed in seeds if seed not in known[index]) for index in indices}
    questions = [(index, Question(sets[index], missing, tau)) for index, missing in wanted.items() if missing]
    if questions:
        answers = yield [question for _, question in questions]
        for (index, question), scores in zip(questions, answers, strict=True):
            known[index].update(zip(question.seeds, scores, strict=True))


@dataclass
class _Claim:
    """A removal that the most stubborn seed lets pass: of a layer (place 0, n) or of a single neuron (place 1, n)."""

    place: tuple[int, int]
    ablated: frozenset[int]
    scores: dict[int, float] = field(default_factory=dict)


def refine(
    scores: dict[int, float],
    layers: Sequence[Sequence[int]],
    threshold: float,
    *,
    num_seeds: int = 0,
    residual_threshold: float = 0.0,
) -> Search[Refinement]:
    """Takes layers, then neurons, out of the set wherever all seeds stay below the threshold; greedily, in order.

    Args:
        scores: Similarity of each consistent seed with the whole set ablated.
        layers: The set that is refined: its layers in the order of the tests, each with its neurons in that order.
        threshold: Value that scores must stay below, strictly.
        num_seeds: Number of all seeds, which are compared with one another under the set that is left; 0 asks nothing.
        residual_threshold: Value that this last answer will be compared with.
    """
    order = sorted(scores, key=lambda seed: -scores[seed])
    current = frozenset(number for layer in layers for number in layer)
    done, ahead = (0, -1), _AHEAD
    claims: list[_Claim] = []
    refuted: set[frozenset[int]] = set()
    settled, residual = None, ()
    while True:
        base = claims[-1].ablated if claims else current
        chain = _chain(layers, base, done, ahead, refuted)
        ends = num_seeds and base and not chain and base != settled
        closing = [Question(base, tuple(range(num_seeds)), residual_threshold, among=True)] if ends else []
        if not (claims or chain or closing):
            return Refinement(current, scores, residual)
        front, rest = (order[0],), tuple(order[1:])
        asked = [(claim, rest) for claim in claims if rest] + [(claim, front) for claim in chain]
        questions = [Question(claim.ablated, seeds, threshold) for claim, seeds in asked] + closing
        answers = (yield questions) if questions else []
        if closing:
            settled, residual = base, answers.pop()
        for (claim, seeds), values in zip(asked, answers, strict=True):
            claim.scores.update(zip(seeds, values, strict=True))
        agreed, refusal = _agreed(claims, threshold)
        if agreed:
            current, scores = agreed[-1].ablated, agreed[-1].scores
        if refusal is not None:  # what was asked ahead rests on a removal that did not happen
            _to_front(order, refusal.scores)
            claims = []
        else:
            claims, refusal = _agreed(chain, threshold)
            done = chain[-1].place if chain else done
        if refusal is None:
            ahead = min(2 * ahead, _FARTHEST)
        else:
            done, ahead = refusal.place, max(ahead // 2, 1)
            if done[0] == 0:
                refuted.add(refusal.ablated)


def _agreed(claims: list[_Claim], threshold: float) -> tuple[list[_Claim], _Claim | None]:
    """Returns the removals before the first that a seed refuses, and that one."""
    for count, claim in enumerate(claims):
        if not max(claim.scores.values()) < threshold:
            return claims[:count], claim
    return claims, None


def _to_front(order: list[int], scores: dict[int, float]) -> None:
    """Moves the most stubborn seed to the front."""
    worst = max(scores, key=lambda seed: scores[seed])
    order.remove(worst)
    order.insert(0, worst)


def _chain(
    layers: Sequence[Sequence[int]],
    ablated: frozenset[int],
    done: tuple[int, int],
    length: int,
    refuted: set[frozenset[int]],
) -> list[_Claim]:
    """Returns the next removals, each on top of the ones before: of layers, and once none is left, of neurons.

    Those known to fail are passed over, and so is removing all that is left: with nothing ablated nothing is
    suppressed.
    """
    claims: list[_Claim] = []
    for place, neurons in _remaining(layers, ablated, done):
        without = ablated - neurons
        if not without or without in refuted:
            continue
        claims.append(_Claim(place, without))
        if len(claims) == length:
            break
        ablated = without
    if not claims and done[0] == 0:
        return _chain(layers, ablated, (1, -1), length, refuted)
    return claims


def _remaining(
    layers: Sequence[Sequence[int]], ablated: frozenset[int], done: tuple[int, int]
) -> list[tuple[tuple[int, int], frozenset[int]]]:
    """Returns what is still to be tested: the places of layers or neurons, and the neurons that would go."""
    if done[0] == 0:
        found = [((0, place), ablated.intersection(layer)) for place, layer in enumerate(layers) if place > done[1]]
        return [(place, neurons) for place, neurons in found if neurons]
    numbers = [number for layer in layers for number in layer]
    return [
        ((1, place), frozenset([number]))
        for place, number in enumerate(numbers)
        if place > done[1] and number in ablated
    ]
