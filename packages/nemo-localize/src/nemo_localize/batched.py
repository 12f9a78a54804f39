"""Selection and refinement: the sequential algorithm's answer, asked in few and large questions.

Both are generators that know nothing of networks: they yield questions and are sent the answers, so that one forward
pass can serve many captions, and so that a test can answer with any function. What may be asked together:

* Candidate sets are nested and known: several are tried at once, for the most stubborn seed alone. A set is dropped as
  soon as one seed stays similar; the other seeds are asked only about the first set that this seed lets pass.
* Refinement removes greedily, each test resting on all removals before it. So assume that the next items all go, and
  ask about the cumulative sets at once: accept up to the first failure, keep that item, go on after it. Here too the
  most stubborn seed goes first; in the same breath the other seeds are asked about what it let pass, while it looks
  ahead as if they agreed.

Every decision rests on the scores that the sequential algorithm would have looked at, so the answer is the same for
any function of (seed, set), monotone or not.

References:
    Hintersdorf, Struppek et al. 2024, algorithms 3 and 4; layers deepest first, as in the published code.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_SMALL = 1e-9  # beside the score that a relative change is taken of, as in the published code
_SETS = 4  # candidate sets in the first question, doubled in each further one
_AHEAD = 8  # items that refinement looks ahead, doubled after a clean look, halved after a failure
_FARTHEST = 64
_SETS_TOGETHER = _AHEAD_TOGETHER = 2  # where every question costs as many rows as there are seeds


@dataclass(frozen=True)
class Question:
    """How similar is each seed to what it was before neurons were off, or to the seed most like it?

    Attributes:
        off: Numbers of the neurons; never empty.
        seeds: Which seeds to ask.
        threshold: What the answers will be compared with.
        alone: Whether each seed must be computed in a batch of its own.
        among: Compare the seeds with one another.
    """

    off: frozenset[int]
    seeds: tuple[int, ...]
    threshold: float
    alone: bool = False
    among: bool = False


Answers = list[tuple[float, ...]]
"""For each question one similarity per seed, in [0, 1]."""

Search = Generator[list[Question], Answers, T]
"""Yields questions, is sent their answers, returns what it found."""


@dataclass(frozen=True)
class Selection:
    """The first candidate set that suppresses.

    Attributes:
        index: Which; the last, where none does.
        reached: Whether all seeds fell to the threshold.
        scores: Of each seed under that set.
    """

    index: int
    reached: bool
    scores: dict[int, float]


@dataclass(frozen=True)
class Refinement:
    """What is left of a candidate set.

    Attributes:
        neurons: Their numbers.
        scores: Of each seed with these off.
        residual: What the last question was answered; empty without one.
    """

    neurons: frozenset[int]
    scores: dict[int, float]
    residual: tuple[float, ...] = ()


def select(
    sets: Sequence[frozenset[int]],
    seeds: Sequence[int],
    tau: float,
    *,
    together: bool = False,
    give_up_early: bool = True,
) -> Search[Selection]:
    """Finds the first set under which no seed is more similar than tau.

    Args:
        sets: Nested, at least one.
        seeds: Most stubborn first, as far as that is known.
        tau: The threshold; a score equal to it counts as suppressed.
        together: Ask all seeds at once, for scores that depend on their batch.
        give_up_early: Ask about the last set in the first question, and stop where it fails. Where a smaller set would
            have passed all the same, that is the one thing in which this differs from the sequential search.
    """
    order = list(seeds)
    # An empty set changes nothing, and a set like the one before fails like it.
    tried = [index for index, off in enumerate(sets) if off and (index == 0 or off != sets[index - 1])]
    if not tried:
        return Selection(len(sets) - 1, False, dict.fromkeys(order, 1.0))
    known: dict[int, dict[int, float]] = {index: {} for index in tried}
    last, place, width = tried[-1], 0, _SETS_TOGETHER if together else _SETS

    def failed(index: int) -> bool:
        return any(score > tau for score in known[index].values())

    while place < len(tried) and not (give_up_early and failed(last)):
        window = tried[place : place + width]
        if give_up_early and last not in window:
            window.append(last)
        asked = order if together else order[:1]
        yield from _ask(sets, known, [i for i in window if not failed(i)], asked, tau)
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


class _Item(NamedTuple):
    """What may be switched on again: place 0 is for layers, 1 for single neurons; `first` is a first copy's place."""

    place: tuple[int, int]
    neurons: frozenset[int]
    first: tuple[int, int] | None = None


@dataclass
class _Claim:
    """A removal that the most stubborn seed lets pass."""

    item: _Item
    off: frozenset[int]
    scores: dict[int, float] = field(default_factory=dict)


def refine(
    selection: Selection,
    layers: Sequence[Sequence[int]],
    threshold: float,
    *,
    relative: float | None = None,
    together: bool = False,
    last: Callable[[frozenset[int]], Question] | None = None,
) -> Search[Refinement]:
    """Switches layers, then single neurons, on again wherever all seeds stay below the threshold; greedily, in order.

    A neuron may stand twice in its layer, as in the published code. The first copy goes wherever the score is below
    the threshold as it is, and the second is then tested; where it is not, the neuron stays untested.

    Args:
        selection: Scores of the set that is refined.
        layers: That set: its layers in order, each with its neurons in order.
        threshold: What scores must stay below, strictly.
        relative: Ask instead that every score stays within this share of what it was with the whole set off.
        together: Ask all seeds at once.
        last: What to ask about the set that is left.
    """
    exact = relative is not None and not together

    def held(scores: dict[int, float]) -> dict[int, float]:
        if relative is None:
            return scores
        whole = selection.scores
        return {seed: abs(score - whole[seed]) / (abs(whole[seed]) + _SMALL) for seed, score in scores.items()}

    limit = threshold if relative is None else relative
    order = sorted(selection.scores, key=lambda seed: -selection.scores[seed])
    current = frozenset(number for layer in layers for number in layer)
    scores, done, ahead = selection.scores, (0, -1), _AHEAD_TOGETHER if together else _AHEAD
    below = (0, -1) if max(held(scores).values()) < limit else None
    claims: list[_Claim] = []
    refuted: set[frozenset[int]] = set()
    settled, residual = None, ()
    while True:
        base = claims[-1].off if claims else current
        since = claims[0].item.place if claims and below is None else below
        chain = _chain(layers, base, done, ahead, refuted, since=since, emptied=relative is not None)
        closing = [last(base)] if last and base and not chain and base != settled else []
        if not (claims or chain or closing):
            return Refinement(current, scores, residual if current else ())
        front = tuple(order) if together else (order[0],)
        rest = tuple(seed for seed in order if seed not in front)
        asked = [(claim, rest) for claim in claims if rest] + [(claim, front) for claim in chain]
        for claim, seeds in asked:
            if not claim.off:  # nothing changes where nothing is off
                claim.scores.update(dict.fromkeys(seeds, 1.0))
        asked = [(claim, seeds) for claim, seeds in asked if claim.off]
        questions = [Question(claim.off, seeds, threshold, alone=exact) for claim, seeds in asked] + closing
        answers = (yield questions) if questions else []
        if closing:
            settled, residual = base, answers.pop()
        for (claim, seeds), values in zip(asked, answers, strict=True):
            claim.scores.update(zip(seeds, values, strict=True))
        agreed, refusal = _agreed(claims, held, limit)
        if agreed:
            current, scores = agreed[-1].off, agreed[-1].scores
            below = below or agreed[0].item.place
        if refusal is not None:  # what was asked ahead rests on a removal that did not happen
            _to_front(order, held(refusal.scores))
            claims = []
        else:
            claims, refusal = _agreed(chain, held, limit)
            done = chain[-1].item.place if chain else done
        if refusal is None:
            ahead = min(2 * ahead, _FARTHEST)
        else:
            done, ahead = refusal.item.place, max(ahead // 2, 1)
            if done[0] == 0:
                refuted.add(refusal.off)


def _agreed(
    claims: list[_Claim], held: Callable[[dict[int, float]], dict[int, float]], limit: float
) -> tuple[list[_Claim], _Claim | None]:
    """Returns the removals before the first that a seed refuses, and that one."""
    for count, claim in enumerate(claims):
        if not max(held(claim.scores).values()) < limit:
            return claims[:count], claim
    return claims, None


def _to_front(order: list[int], scores: dict[int, float]) -> None:
    """Moves the most stubborn seed to the front."""
    worst = max(scores, key=lambda seed: scores[seed])
    order.remove(worst)
    order.insert(0, worst)


def _chain(
    layers: Sequence[Sequence[int]],
    off: frozenset[int],
    done: tuple[int, int],
    length: int,
    refuted: set[frozenset[int]],
    *,
    since: tuple[int, int] | None,
    emptied: bool,
) -> list[_Claim]:
    """Returns the next removals, each on top of the ones before: of layers, and once none is left, of neurons.

    Those known to fail are passed over, and so is removing all that is left: with nothing off nothing is suppressed.

    Args:
        layers: As in `refine`.
        off: What is off.
        done: The place up to which all is decided.
        length: How many removals at most.
        refuted: Sets that are known to fail.
        since: From which place on the score is below the threshold; None where it is not.
        emptied: Whether removing all that is left can pass.
    """
    claims: list[_Claim] = []
    for item in _remaining(layers, off, done):
        without = off - item.neurons
        if (not without and not emptied) or without in refuted:
            continue
        if item.first is not None and (since is None or item.first <= since):
            continue  # its first copy met a score that was not below the threshold, and stayed
        claims.append(_Claim(item, without))
        since = since or item.place
        if len(claims) == length:
            break
        off = without
    if not claims and done[0] == 0:
        return _chain(layers, off, (1, -1), length, refuted, since=since, emptied=emptied)
    return claims


def _remaining(layers: Sequence[Sequence[int]], off: frozenset[int], done: tuple[int, int]) -> list[_Item]:
    """Returns what is still to be tested; a neuron that stands twice in its layer at its second place."""
    if done[0] == 0:
        items = [_Item((0, place), off.intersection(layer)) for place, layer in enumerate(layers) if place > done[1]]
        return [item for item in items if item.neurons]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, number in enumerate(number for layer in layers for number in layer):
        first.setdefault(number, place)
        last[number] = place
    return [
        _Item((1, place), frozenset([number]), (1, first[number]) if first[number] < place else None)
        for number, place in sorted(last.items(), key=lambda pair: pair[1])
        if place > done[1] and number in off
    ]
