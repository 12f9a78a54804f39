"""One small set of neurons for many prompts, instead of the union of the prompts' own sets.

Prompts share neurons, and seldom need all of their own. With S_y the own set of prompt y, the chosen set S has the

    least sum_{i in S} w_i   such that   |S ∩ S_y| >= d_y for every y,   d_y = 1 at first,

where w_i grows with the damage of neuron i to ordinary prompts. S is then ablated for all prompts together, and d_y is
raised for those that still show their image, until all are closed or nothing is left to take. Last, superfluous neurons
leave S. Where S damages ordinary prompts beyond a budget, prompts are given up, those first whose own sets weigh most;
their least number is found by halving.
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
_SEEDS = 2  # per ordinary prompt: damage hardly depends on the seed
_WEIGHED = 8  # ordinary prompts on which single neurons are weighed; the set itself is tried on all

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class JointScore:
    """How the first step of one prompt changes when the common set is ablated.

    Attributes:
        prompt: Memorised prompt that is scored.
        num_own: Number of neurons in its own set.
        num_shared: Number of those that the common set holds.
        score: Largest similarity of a consistent seed to itself, before against after.
        residual_consistency: Largest similarity between two seeds with the set ablated.
        closed: Whether the score fell to tau, and the consistency too unless the prompt's own set failed at that.
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
    """One set of neurons, tried on all prompts together.

    Attributes:
        neurons: Neurons that the set holds.
        damage: Damage to ordinary prompts: one minus the mean similarity of their first steps, before against after.
        captions: Scores of the memorised prompts under the set.
    """

    neurons: NeuronSet
    damage: float
    captions: tuple[JointScore, ...]

    @property
    def num_closed(self) -> int:
        """Number of prompts that it closes."""
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
    """A minimal set for many prompts, beside their plain union.

    Attributes:
        chosen: The minimal set with its scores.
        union: Union of the prompts' own sets, with its scores.
        tau: Threshold of the scores, from 0 to 1.
        budget: Largest damage that was allowed.
        left_out: Prompts without neurons to choose from, because they were not localized.
        rounds: Number of covers that were computed.
        exact_cover: Whether every cover was the lightest there is.
        num_rows: Number of latents through the U-Net.
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
        """Prompts left out to stay within the budget."""
        return tuple(caption.prompt for caption in self.chosen.captions if caption.given_up)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the table of both sets."""
        return [self.chosen.row("minimal", self.budget), self.union.row("union", self.budget)]

    def caption_rows(self) -> list[dict[str, Any]]:
        """Returns one row per prompt, worst first."""
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
        ordinary: Prompts that the edit must not change; a few dozen are enough.
        tau: Threshold of scores, from 0 to 1; by default the one of the results.
        budget: Largest damage to ordinary prompts, from 0 to 1; see `CommonSet.damage`.
        progress: Function that is called with what was done, and the number of neurons in the set.

    Raises:
        UserError: No prompt was localized, or there are no ordinary prompts.
        MachineError: Memory does not hold a single row.

    Example:
        >>> from nemo_localize.localize import localize
        >>> from nemo_localize.planted import Plant, ordinary_captions, planted_model
        >>> model = planted_model([Plant("portrait of 1917 no 1", site=0, neuron=3)]).model
        >>> found = localize(model, ["portrait of 1917 no 1"], ordinary=ordinary_captions(50), tau=0.45)
        >>> edit = minimal_set(model, found, ordinary_captions(4))
        >>> edit.neurons == found.neurons, edit.chosen.num_closed
        (True, 1)
    """
    step = FirstStep.of(model)
    localized = [r for r in results.distinct() if r.status == "localized" and r.refined]
    if not localized:
        raise UserError("no caption was localized, so there are no neurons to choose from; localize first")
    if not ordinary:
        raise UserError("there are no ordinary prompts to measure damage on; give some")
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
    active, ablated, damage, rounds, exact = 0, frozenset[int](), 0.0, 0, True
    too_many, count = len(own) + 1, len(own)
    while too_many - active > 1:
        found = _closing(joint, cheapest_first[:count], weights, tell)
        rounds, exact = rounds + found.rounds, exact and found.exact
        felt = spared.damages([found.ablated])[0]
        if felt <= budget:
            active, ablated, damage = count, found.ablated, felt
        else:
            too_many = count
        count = (active + too_many) // 2
    return GlobalEdit(
        chosen=CommonSet(step.sites.named(ablated), damage, joint.described(ablated, cheapest_first[:active])),
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
    """Returns a function that tells whether a set damages ordinary prompts no more than the budget allows."""
    spared = _Ordinary(step, list(dict.fromkeys(ordinary)))
    return lambda neurons: spared.damages([step.sites.numbers(neurons)])[0] <= budget


def _weights(ordinary: "_Ordinary", numbers: Sequence[int]) -> dict[int, float]:
    """Returns the weight of each neuron: 1, plus its damage to ordinary prompts in units of the mean damage."""
    felt = ordinary.damages([frozenset([number]) for number in numbers])
    usual = sum(felt) / len(felt)
    return {number: 1 + (damage / usual if usual > 0 else 1.0) for number, damage in zip(numbers, felt, strict=True)}


class _Closing(NamedTuple):
    """A set that closes all prompts it was made for, except those that stay open without any of their own neurons."""

    ablated: frozenset[int]
    rounds: int
    exact: bool


def _closing(joint: "_Joint", active: Sequence[int], weights: dict[int, float], tell: Progress) -> _Closing:
    """Covers the active prompts with rising demands until all are closed, then removes superfluous neurons."""
    demands, rounds, exact = dict.fromkeys(active, 1), 0, True
    while True:
        cover = lightest_cover([joint.own[i] for i in active], [demands[i] for i in active], weights)
        rounds, exact = rounds + 1, exact and cover.exact
        tell("prompts tried together", len(cover.items))
        scores = joint.scores(cover.items, active)
        lacking = [i for i in active if scores[i] > joint.tau and demands[i] < len(joint.own[i])]
        if not lacking:
            break
        demands |= {i: min(demands[i] + max(demands[i] // 4, 1), len(joint.own[i])) for i in lacking}
    ablated = joint.pruned(cover.items, scores, weights)
    tell("superfluous neurons removed", len(ablated))
    return _Closing(ablated, rounds, exact)


class _Joint:
    """The memorised prompts, and their scores under any set."""

    def __init__(self, step: FirstStep, captions: list[CaptionResult], own: list[frozenset[int]], tau: float) -> None:
        self.step, self.captions, self.own, self.tau = step, captions, own, tau
        self.cond: Condition = step.encode([caption.prompt for caption in captions])[0]
        base = look(step, self.cond)
        if base.errors:
            place, reason = next(iter(base.errors.items()))
            raise UserError(f"prompt {captions[place].prompt!r} cannot be scored: {reason}")
        self.deltas = base.deltas
        seeds = list(step.settings.seeds)
        self.kept = [[seeds.index(seed) for seed in caption.kept_seeds if seed in seeds] for caption in captions]
        if empty := [caption.prompt for caption, kept in zip(captions, self.kept, strict=True) if not kept]:
            raise UserError(f"{empty[0]!r} was localized with other seeds than these; use the same `first_seed`")
        self.known: dict[tuple[frozenset[int], int], tuple[float, float]] = {}

    def measure(self, ablated: frozenset[int], prompts: Sequence[int]) -> None:
        """Computes score and residual consistency of prompts, with all of their seeds in shared batches."""
        self._measure([(ablated, prompt) for prompt in prompts])

    def scores(self, ablated: frozenset[int], prompts: Sequence[int]) -> dict[int, float]:
        """Returns, for each prompt, the value that must fall to tau."""
        self.measure(ablated, prompts)
        return {prompt: self._decisive(ablated, prompt) for prompt in prompts}

    def pruned(self, ablated: frozenset[int], scores: dict[int, float], weights: dict[int, float]) -> frozenset[int]:
        """Removes neurons from the set, heaviest first, wherever all prompts below tau stay below it.

        Neurons of prompts at or above tau stay. The number tried at once doubles with each success.
        """
        closed = sorted((i for i in scores if scores[i] < self.tau), key=lambda i: -scores[i])
        fixed = frozenset[int]().union(*(self.own[i] for i in scores if i not in closed))
        order = sorted(ablated - fixed, key=lambda number: (-weights[number], number))
        place, size = 0, 1
        while closed and place < len(order):
            without = ablated.difference(order[place : place + size])
            opened = self._opened(without, closed)
            if opened is None:
                ablated, place, size = without, place + size, 2 * size
            else:
                closed.remove(opened)
                closed.insert(0, opened)  # the most likely one to open again
                place, size = place + (size == 1), max(size // 2, 1)
        return ablated

    def _opened(self, ablated: frozenset[int], closed: Sequence[int]) -> int | None:
        """Returns a prompt that does not stay below tau, if there is one; few are scored at first, then more."""
        start, count = 0, 1
        while start < len(closed):
            some = closed[start : start + count]
            if not ablated:
                return some[0]
            scores = self.scores(ablated, some)
            if max(scores.values()) >= self.tau:
                return max(scores, key=lambda i: scores[i])
            start, count = start + count, 2 * count
        return None

    def described(self, ablated: frozenset[int], active: Sequence[int]) -> tuple[JointScore, ...]:
        """Returns the scores of every prompt."""
        self.measure(ablated, range(len(self.captions)))
        return tuple(
            JointScore(
                prompt=caption.prompt,
                num_own=len(self.own[place]),
                num_shared=len(self.own[place] & ablated),
                score=self.known[ablated, place][0],
                residual_consistency=self.known[ablated, place][1],
                closed=self._decisive(ablated, place) <= self.tau,
                given_up=place not in active,
            )
            for place, caption in enumerate(self.captions)
        )

    def _decisive(self, ablated: frozenset[int], prompt: int) -> float:
        score, residual = self.known[ablated, prompt]
        return max(score, residual) if self.captions[prompt].mitigated else score

    def _measure(self, wanted: Sequence[tuple[frozenset[int], int]]) -> None:
        wanted = [pair for pair in dict.fromkeys(wanted) if pair not in self.known]
        if not wanted:
            return
        seeds = range(self.step.settings.num_seeds)
        rows = [Row(prompt, seed, ablated) for ablated, prompt in wanted for seed in seeds]
        deltas, troubles = self.step(self.cond, rows)
        deltas = deltas.unflatten(0, (len(wanted), len(seeds)))
        residual = consistency(deltas, published=self.step.published).amax(1).tolist()
        for place, (ablated, prompt) in enumerate(wanted):
            kept = self.kept[prompt]
            score = float(self.step.similarity(self.deltas[prompt, kept], deltas[place, kept]).max())
            self.known[ablated, prompt] = (score, residual[place])
        for index in troubles:  # what cannot be computed counts as not closed
            ablated, prompt = wanted[index // len(seeds)]
            self.known[ablated, prompt] = (1.0, 1.0)


class _Ordinary:
    """Ordinary prompts, and the damage that any set does to them."""

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
            after, troubles = self.step(self.cond, [row for ablated in some for row in self._rows(ablated)])
            alike = torch.cat([self.step.similarity(self.before, own) for own in after.split(len(self.before))])
            alike[list(troubles)] = 0.0  # what cannot be computed counts as destroyed
            found += (1 - alike.unflatten(0, (len(some), -1)).mean(1)).clamp(min=0).tolist()
        return found

    def _rows(self, ablated: frozenset[int]) -> list[Row]:
        return [Row(prompt, seed, ablated) for prompt in range(self.count) for seed in self.seeds]
