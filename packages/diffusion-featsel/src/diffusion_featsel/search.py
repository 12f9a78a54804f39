"""The search for a set of activations within a budget: down a ranking, or greedily by the value of sets."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_featsel.activation import Activation
from diffusion_featsel.alignment import Alignment
from diffusion_featsel.budget import Budget

Value = Callable[[tuple[str, ...]], Tensor]
"""Function of a set: its value on each fold or pair, or a single one."""
_LEAST_COST = 0.01  # of the budget: activations that cost less are compared as if they cost this


@dataclass(frozen=True)
class SelectSettings:
    """How a set is chosen.

    Attributes:
        max_size: Largest number of activations; None for as many as the budget holds.
        redundancy: Alignment (linear CKA) with a chosen activation at which a candidate is left out, by score.
        ladder: Whether a set must have a coarse and a fine resolution, where candidates have several.
        beam: Number of sets that the search with labels, or by information, carries on at once; 1 is greedy.
        num_random: Number of random sets within the same budget that it is compared with.
        seed: Seed of the random sets.
    """

    max_size: int | None = 4
    redundancy: float = 0.9
    ladder: bool = True
    beam: int = 1
    num_random: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"`max_size` is {self.max_size}; give at least 1")
        if self.beam < 1:
            raise ValueError(f"`beam` is {self.beam}; give at least 1")
        if not 0 < self.redundancy <= 1:
            raise ValueError(f"`redundancy` is {self.redundancy}; give a number above 0, up to 1")


@dataclass(frozen=True)
class Step:
    """One activation that was added.

    Attributes:
        name: Name of the activation.
        value: Value of the set with it.
        gain: How much it raised the value; None where values are scores of single activations.
        standard_error: Standard error of the gain over folds or pairs; None where there is one value only.
        cost: How much it added to the cost, in the budget's unit.
    """

    name: str
    value: float
    gain: float | None
    standard_error: float | None
    cost: float

    def to_json(self) -> dict[str, Any]:
        """Returns the step as plain values."""
        return dict(vars(self))


@dataclass
class Search:
    """The search for a set, and the sets that it is compared with.

    Attributes:
        candidates: Name of each candidate to the activation.
        budget: Largest cost of the set.
        value: Function of a set that is to become large.
        settings: Size, redundancy, ladder, and random sets.
    """

    candidates: Mapping[str, Activation]
    budget: Budget
    value: Value
    settings: SelectSettings
    _known: dict[frozenset[str], Tensor] = field(default_factory=dict)

    def values(self, names: Sequence[str]) -> Tensor:
        """Returns the value of a set on each fold or pair; each set is valued once."""
        key = frozenset(names)
        if key not in self._known:
            # Always in the order of the candidates, so that a set has one value however it was reached.
            self._known[key] = self.value(tuple(name for name in self.candidates if name in key))
        return self._known[key]

    def mean(self, names: Sequence[str]) -> float:
        """Returns the mean value of a set."""
        return float(self.values(names).mean())

    def added_cost(self, chosen: Sequence[str], name: str) -> float:
        """Returns how much more a set costs with one activation added, in the budget's unit."""
        return self.budget.cost([*chosen, name], self.candidates) - self.budget.cost(chosen, self.candidates)

    def fits(self, names: Sequence[str]) -> bool:
        """Returns whether a set is within the budget."""
        return self.budget.fits(names, self.candidates)

    def costs(self, names: Sequence[str]) -> dict[str, dict[str, float | int]]:
        """Returns channels, bytes, and share of the network of each activation."""
        rows = {name: self.candidates[name] for name in names}
        return {n: {"channels": a.channels, "bytes": a.numbers * 2, "flops": a.cost} for n, a in rows.items()}

    def sizes(self) -> list[int]:
        """Returns the numbers of places of the candidates' grids, each once."""
        return sorted({_area(activation) for activation in self.candidates.values()})

    def coarse(self, name: str) -> bool:
        """Returns whether a candidate is in the lower half of the resolutions; the rest is fine."""
        sizes = self.sizes()
        return _area(self.candidates[name]) in sizes[: len(sizes) // 2]

    def ladder_on(self) -> bool:
        """Returns whether the set must have a coarse and a fine resolution."""
        return self.settings.ladder and len(self.sizes()) > 1 and self.settings.max_size != 1

    def ladder_state(self, names: Sequence[str]) -> str:
        """Returns in words whether a set has a coarse and a fine resolution, or need not have."""
        if not self.settings.ladder:
            return "off"
        if len(self.sizes()) < 2:
            return "off: all candidates have the same resolution"
        both = len({self.coarse(name) for name in names}) == 2
        return "met" if both else "not met: no candidate of the other resolutions fits the budget and is no near copy"

    def open(self, chosen: Sequence[str], left_out: Collection[str] = ()) -> list[str]:
        """Returns the candidates that may come next: within the budget, and of the missing half of resolutions.

        Args:
            chosen: The set so far.
            left_out: Candidates that are out of the question.
        """
        if self.settings.max_size is not None and len(chosen) >= self.settings.max_size:
            return []
        out = {*chosen, *left_out}
        free = [name for name in self.candidates if name not in out and self.fits([*chosen, name])]
        if not self.ladder_on() or len({self.coarse(name) for name in chosen}) == 2:
            return free
        if chosen:
            return [name for name in free if self.coarse(name) != self.coarse(chosen[0])] or free
        # The first must leave room for one of the other half, where any does.
        others = {half: [n for n in free if self.coarse(n) != half] for half in (True, False)}
        return [n for n in free if any(self.fits([n, other]) for other in others[self.coarse(n)])] or free

    def by_score(
        self, scores: Mapping[str, float], alignment: Alignment | None
    ) -> tuple[list[Step], dict[str, dict[str, Any]]]:
        """Returns the steps down the ranking, and what was left out as nearly equal to a chosen one."""
        steps: list[Step] = []
        dropped: dict[str, dict[str, Any]] = {}
        while True:
            chosen = [step.name for step in steps]
            if not self.open(chosen, dropped):
                return steps, dropped
            alike = {name: _most_alike(name, chosen, alignment) for name in self.candidates if name not in dropped}
            for name, (cka, like) in alike.items():
                if cka >= self.settings.redundancy and name not in chosen:
                    dropped[name] = {"like": like, "cka": cka}
            free = self.open(chosen, dropped)
            if not free:
                return steps, dropped
            best = max(free, key=lambda name: scores[name])
            steps.append(Step(best, self.mean([*chosen, best]), None, None, self.added_cost(chosen, best)))

    def greedy(self) -> list[Step]:
        """Returns the better of two sets, by gain per cost and by gain; either alone can be far off."""
        found = [self._forward(per_cost) for per_cost in (True, False)]
        return max(found, key=lambda steps: self.mean(_names(steps)))

    def _forward(self, per_cost: bool) -> list[Step]:
        """Returns the best set that the beam ends at, without the steps that it turns out not to need."""
        ends: list[list[Step]] = []
        states: list[list[Step]] = [[]]
        while states:
            grown: dict[frozenset[str], list[Step]] = {}
            for steps in states:
                further = self._further(steps, per_cost)[: self.settings.beam]
                for step in further:
                    grown.setdefault(frozenset(_names([*steps, step])), [*steps, step])
                if not further:
                    ends.append(steps)
            states = sorted(grown.values(), key=lambda steps: self.mean(_names(steps)), reverse=True)
            states = states[: self.settings.beam]
        return max(map(self._backward, ends), key=lambda steps: self.mean(_names(steps)))

    def _further(self, steps: Sequence[Step], per_cost: bool) -> list[Step]:
        """Returns the steps that are worth taking next, best first."""
        chosen = _names(steps)
        free = self.open(chosen)
        rated = [self._rated(chosen, name, per_cost) for name in free]
        forced = len(steps) == 0 or (self.ladder_on() and len(steps) == 1 and self._missing_half(chosen, free))
        worth = rated if forced else [(rate, step) for rate, step in rated if _worth(step)]
        return [step for _, step in sorted(worth, key=lambda item: item[0], reverse=True)]

    def _missing_half(self, chosen: Sequence[str], free: Sequence[str]) -> bool:
        return all(self.coarse(name) != self.coarse(chosen[0]) for name in free)

    def _rated(self, chosen: Sequence[str], name: str, per_cost: bool) -> tuple[float, Step]:
        values = self.values([*chosen, name])
        gains = values - self.values(chosen) if chosen else values
        gain, cost = float(gains.mean()), self.added_cost(chosen, name)
        error = float(gains.std() / math.sqrt(len(gains))) if len(gains) > 1 else None
        rate = gain / max(cost, _LEAST_COST * self.budget.limit) if per_cost else gain
        return rate, Step(name, float(values.mean()), gain, error, cost)

    def _backward(self, steps: list[Step]) -> list[Step]:
        """Returns the steps without those that the set does not need: one pass, in the order of choice."""
        kept = list(steps)
        for step in steps:
            others = [other.name for other in kept if other is not step]
            both = len({self.coarse(name) for name in others}) == 2
            if not others or (self.ladder_on() and not both):
                continue
            losses = self.values([other.name for other in kept]) - self.values(others)
            error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else 0.0
            if float(losses.mean()) <= 0 or float(losses.mean()) < error:
                kept = [other for other in kept if other is not step]
        return kept

    def baselines(self, presets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Returns values of the best single activation, of presets that candidates hold whole, and of random sets."""
        affordable = [name for name in self.candidates if self.fits([name])]
        best = max(affordable, key=lambda name: self.mean([name]))
        rows: dict[str, Any] = {"best single": {"names": [best], "value": self.mean([best])}}
        for name, members in presets.items():
            if all(member in self.candidates for member in members):
                cost = self.budget.cost(members, self.candidates)
                rows[name] = {"names": list(members), "value": self.mean(members), "cost": self.budget.shown(cost)}
        sets = self.random_sets()
        values = [self.mean(names) for names in sets]
        if values:
            rows["random"] = {
                "num_sets": len(values),
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                "best": max(values),
                "values": values,
            }
        return rows

    def random_sets(self) -> list[list[str]]:
        """Returns sets in random order as large as the budget and the largest size allow."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        names, found = list(self.candidates), []
        for _ in range(self.settings.num_random):
            chosen: list[str] = []
            for index in torch.randperm(len(names), generator=generator).tolist():
                full = self.settings.max_size is not None and len(chosen) >= self.settings.max_size
                if not full and self.fits([*chosen, names[index]]):
                    chosen.append(names[index])
            found.append(chosen)
        return found


def _names(steps: Sequence[Step]) -> list[str]:
    return [step.name for step in steps]


def _most_alike(name: str, chosen: Sequence[str], alignment: Alignment | None) -> tuple[float, str]:
    """Returns the largest alignment of a candidate with a chosen activation, and the name of this one."""
    alike = [(alignment.of(name, one), one) for one in chosen] if alignment else []
    return max(alike, default=(0.0, ""))


def _worth(step: Step) -> bool:
    return (step.gain or 0.0) > 0 and (step.gain or 0.0) >= (step.standard_error or 0.0)


def _area(activation: Activation) -> int:
    height, width = activation.grid or (1, 1)
    return height * width
