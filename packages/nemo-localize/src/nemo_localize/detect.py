"""Whether captions are memorised: how alike their first denoising steps are from seed to seed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffcore.denoiser import Condition
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.score import consistency


@dataclass
class Baseline:
    """The first step of some captions with all neurons on.

    Attributes:
        deltas: Stretched noise differences: (prompts, seeds, channels, height, width).
        consistency: Of each caption's seeds.
        errors: By index of the caption, why it has neither.
        near_ties: By index of the caption, how many of its seeds were near a threshold and computed again, alone.
        rows: What each caption cost.
    """

    deltas: Tensor
    consistency: list[list[float]]
    errors: dict[int, str]
    near_ties: dict[int, int]
    rows: list[int]


def measure(
    step: FirstStep,
    cond: Condition,
    *,
    threshold: float | None = None,
) -> Baseline:
    """Computes all seeds of all captions.

    Args:
        step: What computes.
        cond: One row per caption.
        threshold: What consistencies will be compared with: a caption with one near it is computed again, row by row.

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
    found = consistency(deltas, reference=step.reference).tolist()
    cost = [len(seeds) * step.rows_per_row] * count
    near_ties = {}
    for prompt in range(count):
        near = 0 if threshold is None else sum(abs(value - threshold) < step.margin for value in found[prompt])
        if near and prompt not in errors:
            near_ties[prompt] = near
            deltas[prompt] = step.alone(cond, [Row(prompt, seed) for seed in seeds])[0]
            found[prompt] = consistency(deltas[prompt : prompt + 1]).tolist()[0]
            cost[prompt] *= 2
    return Baseline(deltas, found, errors, near_ties, cost)


def encode(step: FirstStep, prompts: Sequence[str]) -> tuple[Condition, list[bool], list[str]]:
    """Returns the condition of captions, on the model's device; which were truncated; and what was cut of each."""
    tokens = step.encoder.tokenize(prompts)
    cond = {key: value.to(step.device) for key, value in step.encoder.encode(tokens).items()}
    return cond, tokens.truncated.tolist(), list(tokens.lost)
