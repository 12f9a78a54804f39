"""Detection: whether a prompt is memorised, from how similar its seeds' first denoising steps are.

The consistency of seed s of prompt y is c(y, s) = max over other seeds r of sim(delta(y, s), delta(y, r)): how similar
its noise difference is to that of the seed most like it. Seeds share nothing but the prompt, so high values mean that
the prompt itself carries the image. A prompt counts as memorised where a seed's consistency is above the threshold tau.

References:
    Hintersdorf, Struppek et al. 2024, section 3.1 and algorithm 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import Condition
from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.score import consistency


@dataclass(frozen=True)
class Detection:
    """How consistent the seeds of one prompt are.

    Attributes:
        prompt: Prompt that was looked at.
        consistency: Consistency of each seed, from 0 to 1; empty for prompts that failed.
        truncated: Whether the text encoder saw less than the whole prompt.
        lost: The part of the prompt that it did not see.
        error: Why there is no consistency; None where there is.
    """

    prompt: str
    consistency: tuple[float, ...] = ()
    truncated: bool = False
    lost: str = ""
    error: str | None = None

    @property
    def level(self) -> float:
        """The largest consistency of a seed; 0 for prompts that failed."""
        return max(self.consistency, default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Returns the detection as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Detection":
        """Returns the detection that `to_json` wrote."""
        return cls(**{**row, "consistency": tuple(row["consistency"])})


def detect(
    model: DiffusionModel | FirstStep,
    prompts: Sequence[str],
    *,
    unit_size: int = 16,
    name: str = "captions",
    map: Map = each_unit,
) -> list[Detection]:
    """Returns how consistent the seeds of each prompt are: memorised prompts have the highest levels.

    Args:
        model: A text-conditioned U-Net, or its `FirstStep` where settings differ from the defaults.
        prompts: Prompts to look at; those given twice are computed once.
        unit_size: Number of prompts that share batches.
        name: Name under which a resumable map keeps the results.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.

    Raises:
        MachineError: Memory does not hold a single row.

    Example:
        >>> from nemo_localize.planted import Plant, planted_model
        >>> model = planted_model([Plant("portrait of 1917 no 1", site=0, neuron=3)], side=8).model
        >>> found = detect(model, ["portrait of 1917 no 1", "plain words"])
        >>> found[0].level > found[1].level
        True
    """
    return map(partial(_detect_unit, FirstStep.of(model)), prompts, name=name, kind=Detection, unit_size=unit_size)


def _detect_unit(step: FirstStep, prompts: list[str]) -> list[Detection]:
    cond, truncated, lost = step.encode(prompts)
    return look(step, cond).detections(prompts, truncated, lost)


@dataclass(frozen=True, eq=False)
class Look:
    """The first step of some prompts with no neuron ablated.

    Attributes:
        deltas: Noise difference of each prompt and seed, stretched to [0, 1].
        consistency: Consistency of each prompt's seeds.
        errors: Reason why a prompt has neither, by its index.
        near_ties: Number of a prompt's seeds so near the threshold that they were computed again alone, by its index.
        rows: Number of rows that each prompt cost.
    """

    deltas: Float[Tensor, "prompts seeds channels height width"]
    consistency: list[list[float]]
    errors: dict[int, str]
    near_ties: dict[int, int]
    rows: list[int]

    def above(self, place: int, tau: float) -> list[int]:
        """Returns the seeds of a prompt whose consistency is above tau, most consistent first; none if it failed."""
        if place in self.errors:
            return []
        values = self.consistency[place]
        return sorted((seed for seed, value in enumerate(values) if value > tau), key=lambda seed: -values[seed])

    def detections(self, prompts: Sequence[str], truncated: Sequence[bool], lost: Sequence[str]) -> list[Detection]:
        """Returns what was seen of each prompt, in order."""
        return [
            Detection(
                prompt,
                () if place in self.errors else tuple(self.consistency[place]),
                truncated[place],
                lost[place],
                self.errors.get(place),
            )
            for place, prompt in enumerate(prompts)
        ]


def look(step: FirstStep, cond: Condition, *, threshold: float | None = None) -> Look:
    """Computes the first step of all seeds of all prompts (algorithm 1).

    Args:
        step: First denoising step of the model.
        cond: Condition with one row per prompt.
        threshold: Value that consistencies will be compared with: a prompt with one near it is computed again, row by
            row, so that the decision does not depend on what shared its batch.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    count, seeds = len(next(iter(cond.values()))), range(step.settings.num_seeds)
    rows = [Row(prompt, seed) for prompt in range(count) for seed in seeds]
    flat, troubles = step(cond, rows)
    deltas = flat.unflatten(0, (count, len(seeds)))
    errors: dict[int, str] = {}
    for index, reason in troubles.items():
        errors.setdefault(rows[index].prompt, reason)
    found = consistency(deltas, published=step.published).tolist()
    cost = [len(seeds) * step.rows_per_row] * count
    near_ties = {}
    for prompt in range(count):
        near = 0 if threshold is None else sum(abs(value - threshold) < step.margin for value in found[prompt])
        if near and prompt not in errors:
            near_ties[prompt] = near
            deltas[prompt] = step.alone(cond, [Row(prompt, seed) for seed in seeds])[0]
            found[prompt] = consistency(deltas[prompt : prompt + 1]).tolist()[0]
            cost[prompt] *= 2
    return Look(deltas, found, errors, near_ties, cost)
