"""One small set of neurons for many captions, instead of the union of the captions' own sets.

Captions share neurons, and seldom need all of their own. So the lightest set is chosen that takes one neuron of every
caption's set; a neuron weighs more the more ordinary captions feel it. The set is then tried on all captions together:
those that still show their image demand one neuron more, until all are closed or there is nothing left to take. Last,
neurons that prove superfluous are switched on again. Where the set damages ordinary captions beyond a budget, captions
are given up by name, those first whose own sets weigh most; how many must be is found by halving.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from diffcore.denoiser import Condition
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from nemo_localize.cover import lightest_cover
from nemo_localize.detect import look
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.results import CaptionResult, Results
from nemo_localize.score import consistency

DEFAULT_BUDGET = 0.1
_SEEDS = 2  # per ordinary caption: what they feel hardly depends on the seed
_WEIGHED = 8  # ordinary captions that neurons are weighed on, one by one; the set itself is tried on all

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class JointScore:
    """What the first step of a caption shows when a set made for all of them is off.

    Attributes:
        prompt: The caption.
        num_own: Neurons of its own set.
        num_shared: How many of them the common set holds.
        score: Largest similarity of a consistent seed to itself, before against after.
        residual_consistency: Largest similarity between two seeds.
        closed: Whether the score fell to tau, and the consistency too unless the caption's own set failed at that.
        given_up: Whether it was left out to stay within the budget.
    """

    prompt: str
    num_own: int
    num_shared: int
    score: float
    residual_consistency: float
    closed: bool
    given_up: bool


@dataclass(frozen=True)
class CommonSet:
    """One set of neurons, tried on all captions together.

    Attributes:
        neurons: The set.
        damage: What ordinary captions feel: one minus the mean similarity of their first steps, before against after.
        captions: How each memorised caption fares.
    """

    neurons: NeuronSet
    damage: float
    captions: tuple[JointScore, ...]

    @property
    def num_closed(self) -> int:
        """Captions that it closes."""
        return sum(caption.closed for caption in self.captions)

    def row(self, name: str, budget: float) -> dict[str, Any]:
        """Returns the set as a row of a table."""
        return {
            "set": name,
            "neurons": len(self.neurons),
            "closed": self.num_closed,
            "captions": len(self.captions),
            "damage": self.damage,
            "within_budget": self.damage <= budget,
            "largest_score": max((caption.score for caption in self.captions), default=None),
            "largest_residual": max((caption.residual_consistency for caption in self.captions), default=None),
        }


@dataclass(frozen=True)
class GlobalEdit:
    """A minimal set for many captions, beside their plain union.

    Attributes:
        chosen: The minimal set.
        union: The union of the captions' own sets.
        tau: Threshold of scores.
        budget: Damage that was allowed.
        left_out: Captions without neurons to choose from: those that were not localized.
        rounds: How often the cover was chosen anew.
        exact_cover: Whether every cover was the lightest there is.
        num_rows: Latents through the U-Net.
    """

    chosen: CommonSet
    union: CommonSet
    tau: float
    budget: float
    left_out: tuple[str, ...]
    rounds: int
    exact_cover: bool
    num_rows: int

    @property
    def neurons(self) -> NeuronSet:
        """The minimal set."""
        return self.chosen.neurons

    @property
    def given_up(self) -> tuple[str, ...]:
        """Captions left out to stay within the budget."""
        return tuple(caption.prompt for caption in self.chosen.captions if caption.given_up)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the table of both sets."""
        return [self.chosen.row("minimal", self.budget), self.union.row("union", self.budget)]

    def caption_rows(self) -> list[dict[str, Any]]:
        """Returns one row per caption, worst first."""
        ranked = sorted(self.chosen.captions, key=lambda caption: (caption.closed, -caption.score))
        return [asdict(caption) for caption in ranked]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "neurons": self.neurons.to_json(),
            "union": self.union.neurons.to_json(),
            "tau": self.tau,
            "budget": self.budget,
            "sets": self.rows(),
            "captions": self.caption_rows(),
            "given_up": list(self.given_up),
            "left_out": list(self.left_out),
            "rounds": self.rounds,
            "exact_cover": self.exact_cover,
            "unet_rows": self.num_rows,
        }


def minimal_set(
    model: DiffusionModel | FirstStep,
    results: Results,
    ordinary: Sequence[str],
    *,
    tau: float | None = None,
    budget: float = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> GlobalEdit:
    """Returns a small set of neurons that closes all localized prompts together, beside their plain union.

    Args:
        model: The model, or the `FirstStep` that prompts were localized with.
        results: Results of `localize` for the prompts that the set is for.
        ordinary: Prompts that the edit must leave alone; a few dozen tell.
        tau: Threshold of scores, from 0 to 1; by default the one of the results.
        budget: Largest damage to ordinary prompts, from 0 to 1; see `CommonSet.damage`.
        progress: Called with what is done, and how many neurons the set has.

    Raises:
        UserError: No prompt was localized, or there are no ordinary prompts.
        MachineError: Memory does not hold a single row.
    """
    step = FirstStep.of(model)
    localized = [r for r in results.distinct() if r.status == "localized" and r.refined]
    if not localized:
        raise UserError("no caption was localized, so there are no neurons to choose from; localize first")
    if not ordinary:
        raise UserError("there are no ordinary captions to measure damage on; give some")
    if not 0 < budget <= 1:
        raise UserError(f"`budget` is {budget}; give a number above 0, at most 1")
    tau = results.tau if tau is None else tau
    rows_before = step.num_rows
    own = [step.sites.numbers(r.refined or NO_NEURONS) for r in localized]
    joint = _Joint(step, localized, own, tau)
    captions = list(dict.fromkeys(ordinary))
    everything = frozenset[int]().union(*own)
    weights = _weights(_Ordinary(step, captions[:_WEIGHED]), sorted(everything))
    spared = _Ordinary(step, captions)
    tell = progress or (lambda what, count: None)
    cheapest_first = sorted(range(len(own)), key=lambda i: sum(weights[number] for number in own[i]))
    active, off, damage, rounds, exact = 0, frozenset[int](), 0.0, 0, True
    too_many, count = len(own) + 1, len(own)
    while too_many - active > 1:
        found = _closing(joint, cheapest_first[:count], weights, tell)
        rounds, exact = rounds + found.rounds, exact and found.exact
        felt = spared.damages([found.off])[0]
        if felt <= budget:
            active, off, damage = count, found.off, felt
        else:
            too_many = count
        count = (active + too_many) // 2
    return GlobalEdit(
        chosen=CommonSet(step.sites.named(off), damage, joint.described(off, cheapest_first[:active])),
        union=CommonSet(
            step.sites.named(everything),
            spared.damages([everything])[0],
            joint.described(everything, range(len(own))),
        ),
        tau=tau,
        budget=budget,
        left_out=tuple(r.prompt for r in results.distinct() if r.status == "not_localized"),
        rounds=rounds,
        exact_cover=exact,
        num_rows=step.num_rows - rows_before,
    )


def within_budget(
    step: FirstStep, ordinary: Sequence[str], budget: float = DEFAULT_BUDGET
) -> Callable[[NeuronSet], bool]:
    """Returns what tells whether a set damages ordinary captions no more than the budget allows."""
    spared = _Ordinary(step, list(dict.fromkeys(ordinary)))
    return lambda neurons: spared.damages([step.sites.numbers(neurons)])[0] <= budget


def _weights(ordinary: "_Ordinary", numbers: Sequence[int]) -> dict[int, float]:
    """Returns of each neuron: half for being ablated at all, half for what ordinary captions feel of it."""
    felt = ordinary.damages([frozenset([number]) for number in numbers])
    usual = sum(felt) / len(felt)
    return {number: 1 + (damage / usual if usual > 0 else 1.0) for number, damage in zip(numbers, felt, strict=True)}


class _Closing(NamedTuple):
    """A set that closes all captions that it was made for, but those that even all of their neurons leave open."""

    off: frozenset[int]
    rounds: int
    exact: bool


def _closing(joint: "_Joint", active: Sequence[int], weights: dict[int, float], tell: Progress) -> _Closing:
    """Covers some captions anew until all are closed, then switches on again what proves superfluous."""
    demands, rounds, exact = dict.fromkeys(active, 1), 0, True
    while True:
        cover = lightest_cover([joint.own[i] for i in active], [demands[i] for i in active], weights)
        rounds, exact = rounds + 1, exact and cover.exact
        tell("captions tried together", len(cover.items))
        scores = joint.scores(cover.items, active)
        lacking = [i for i in active if scores[i] > joint.tau and demands[i] < len(joint.own[i])]
        if not lacking:
            break
        demands |= {i: min(demands[i] + max(demands[i] // 4, 1), len(joint.own[i])) for i in lacking}
    off = joint.pruned(cover.items, scores, weights)
    tell("superfluous neurons switched on again", len(off))
    return _Closing(off, rounds, exact)


class _Joint:
    """The memorised captions, and what any set does to all of them."""

    def __init__(self, step: FirstStep, captions: list[CaptionResult], own: list[frozenset[int]], tau: float) -> None:
        self.step, self.captions, self.own, self.tau = step, captions, own, tau
        self.cond: Condition = step.encode([caption.prompt for caption in captions])[0]
        base = look(step, self.cond)
        if base.errors:
            place, reason = next(iter(base.errors.items()))
            raise UserError(f"caption {captions[place].prompt!r} cannot be scored: {reason}")
        self.deltas = base.deltas
        seeds = list(step.settings.seeds)
        self.kept = [[seeds.index(seed) for seed in caption.kept_seeds if seed in seeds] for caption in captions]
        if empty := [caption.prompt for caption, kept in zip(captions, self.kept, strict=True) if not kept]:
            raise UserError(f"{empty[0]!r} was localized with other seeds than these; use the same `first_seed`")
        self.known: dict[tuple[frozenset[int], int], tuple[float, float]] = {}

    def measure(self, off: frozenset[int], prompts: Sequence[int]) -> None:
        """Computes score and residual consistency of captions, all of their seeds in shared batches."""
        self._measure([(off, prompt) for prompt in prompts])

    def scores(self, off: frozenset[int], prompts: Sequence[int]) -> dict[int, float]:
        """Returns of each caption what must fall to tau."""
        self.measure(off, prompts)
        return {prompt: self._decisive(off, prompt) for prompt in prompts}

    def pruned(self, off: frozenset[int], scores: dict[int, float], weights: dict[int, float]) -> frozenset[int]:
        """Switches neurons on again, heaviest first, wherever all captions that are below tau stay there.

        Neurons of captions that are not are left alone. Several are tried at once while that goes well.
        """
        closed = sorted((i for i in scores if scores[i] < self.tau), key=lambda i: -scores[i])
        fixed = frozenset[int]().union(*(self.own[i] for i in scores if i not in closed))
        order = sorted(off - fixed, key=lambda number: (-weights[number], number))
        place, size = 0, 1
        while closed and place < len(order):
            without = off.difference(order[place : place + size])
            opened = self._opened(without, closed)
            if opened is None:
                off, place, size = without, place + size, 2 * size
            else:
                closed.remove(opened)
                closed.insert(0, opened)  # it will be the first to object again
                place, size = place + (size == 1), max(size // 2, 1)
        return off

    def _opened(self, off: frozenset[int], closed: Sequence[int]) -> int | None:
        """Returns a caption that does not stay below tau; a few are asked at first, then more."""
        start, count = 0, 1
        while start < len(closed):
            some = closed[start : start + count]
            if not off:
                return some[0]
            scores = self.scores(off, some)
            if max(scores.values()) >= self.tau:
                return max(scores, key=lambda i: scores[i])
            start, count = start + count, 2 * count
        return None

    def described(self, off: frozenset[int], active: Sequence[int]) -> tuple[JointScore, ...]:
        """Returns how every caption fares."""
        self.measure(off, range(len(self.captions)))
        return tuple(
            JointScore(
                prompt=caption.prompt,
                num_own=len(self.own[place]),
                num_shared=len(self.own[place] & off),
                score=self.known[off, place][0],
                residual_consistency=self.known[off, place][1],
                closed=self._decisive(off, place) <= self.tau,
                given_up=place not in active,
            )
            for place, caption in enumerate(self.captions)
        )

    def _decisive(self, off: frozenset[int], prompt: int) -> float:
        score, residual = self.known[off, prompt]
        return max(score, residual) if self.captions[prompt].mitigated else score

    def _measure(self, wanted: Sequence[tuple[frozenset[int], int]]) -> None:
        wanted = [pair for pair in dict.fromkeys(wanted) if pair not in self.known]
        if not wanted:
            return
        seeds = range(self.step.settings.num_seeds)
        rows = [Row(prompt, seed, off) for off, prompt in wanted for seed in seeds]
        deltas, troubles = self.step(self.cond, rows)
        deltas = deltas.unflatten(0, (len(wanted), len(seeds)))
        residual = consistency(deltas, published=self.step.published).amax(1).tolist()
        for place, (off, prompt) in enumerate(wanted):
            kept = self.kept[prompt]
            score = float(self.step.similarity(self.deltas[prompt, kept], deltas[place, kept]).max())
            self.known[off, prompt] = (score, residual[place])
        for index in troubles:  # what cannot be computed is not closed
            off, prompt = wanted[index // len(seeds)]
            self.known[off, prompt] = (1.0, 1.0)


class _Ordinary:
    """Ordinary captions, and what they feel of any set."""

    def __init__(self, step: FirstStep, prompts: list[str]) -> None:
        self.step, self.count = step, len(prompts)
        self.cond: Condition = step.encode(prompts)[0]
        self.seeds = range(min(_SEEDS, step.settings.num_seeds))
        self.before, troubles = step(self.cond, self._rows(frozenset()))
        if troubles:
            row, reason = next(iter(troubles.items()))
            raise UserError(f"ordinary caption {prompts[row // len(self.seeds)]!r} cannot be scored: {reason}")

    def damages(self, sets: Sequence[frozenset[int]]) -> list[float]:
        """Returns one minus the mean similarity of first steps, before against after, for each set."""
        found = []
        per_call = max(self.step.batch_size // len(self.before), 1)
        for start in range(0, len(sets), per_call):
            some = sets[start : start + per_call]
            after, troubles = self.step(self.cond, [row for off in some for row in self._rows(off)])
            alike = torch.cat([self.step.similarity(self.before, own) for own in after.split(len(self.before))])
            alike[list(troubles)] = 0.0  # what cannot be computed is destroyed
            found += (1 - alike.unflatten(0, (len(some), -1)).mean(1)).clamp(min=0).tolist()
        return found

    def _rows(self, off: frozenset[int]) -> list[Row]:
        return [Row(prompt, seed, off) for prompt in range(self.count) for seed in self.seeds]
