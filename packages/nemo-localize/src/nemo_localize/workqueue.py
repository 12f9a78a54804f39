"""A work queue that fills each forward pass with the questions of many captions' searches.

Questions wait in the order in which they were asked; a search goes on when all of its questions are answered. So the
batches, and with them every low bit, follow from the captions alone.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import Condition
from nemo_localize.batched import Answers, Question, Search
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.score import consistency, reference_similarity, similarity

T = TypeVar("T")


@dataclass
class _Job(Generic[T]):
    """One caption's search, and what it waits for."""

    prompt: int
    search: Search[T]
    questions: list[Question] = field(default_factory=list)
    answers: list[tuple[float, ...] | None] = field(default_factory=list)


@dataclass
class Outcome(Generic[T]):
    """How a search ended.

    Attributes:
        found: What it returned; None where it failed.
        error: Why it failed.
        num_rows: Rows that it cost.
        near_ties: Scores so near to their threshold that they were computed again, alone.
    """

    found: T | None = None
    error: str | None = None
    num_rows: int = 0
    near_ties: int = 0


def run_searches(
    step: FirstStep,
    cond: Condition,
    unblocked: Float[Tensor, "prompts seeds channels height width"],
    searches: Mapping[int, Search[T]],
    *,
    scale: float = 0.0,
) -> dict[int, Outcome[T]]:
    """Runs searches side by side and returns how each ended.

    Args:
        step: What answers.
        cond: Of all captions.
        unblocked: Their stretched noise differences with all neurons on.
        searches: By index of the caption.
        scale: What neurons that are off are multiplied with.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    outcomes: dict[int, Outcome[T]] = {prompt: Outcome() for prompt in searches}
    waiting: deque[tuple[_Job[T], int]] = deque()
    for prompt, search in searches.items():
        _advance(_Job(prompt, search), None, outcomes, waiting)
    while waiting:
        batch = _next_batch(waiting, step.batch_size)
        _answer(step, cond, unblocked, batch, outcomes, scale)
        for job in {id(job): job for job, _ in batch}.values():
            if outcomes[job.prompt].error is not None:
                job.search.close()
                waiting = deque(pair for pair in waiting if pair[0] is not job)
            elif all(answer is not None for answer in job.answers):
                _advance(job, [answer for answer in job.answers if answer is not None], outcomes, waiting)
    return outcomes


def _advance(
    job: _Job[T], answers: Answers | None, outcomes: dict[int, Outcome[T]], waiting: deque[tuple[_Job[T], int]]
) -> None:
    """Sends a search its answers and queues what it asks next."""
    try:
        job.questions = next(job.search) if answers is None else job.search.send(answers)
    except StopIteration as finished:
        outcomes[job.prompt].found = finished.value
        return
    job.answers = [None] * len(job.questions)
    waiting.extend((job, index) for index in range(len(job.questions)))


def _next_batch(waiting: deque[tuple[_Job[T], int]], batch_size: int) -> list[tuple[_Job[T], int]]:
    """Takes whole questions while their rows fit, at least one: seeds that are compared as a batch stay together."""
    batch, rows = [], 0
    while waiting:
        job, index = waiting[0]
        rows += len(job.questions[index].seeds)
        if batch and rows > batch_size:
            break
        batch.append(waiting.popleft())
    return batch


def _answer(
    step: FirstStep,
    cond: Condition,
    unblocked: Tensor,
    batch: list[tuple[_Job[T], int]],
    outcomes: dict[int, Outcome[T]],
    scale: float,
) -> None:
    """Answers the questions of one batch."""
    asked = [_Asked(job.prompt, job.questions[index]) for job, index in batch]
    crowd = [one for one in asked if not one.question.alone]
    scores = dict(zip(crowd, _scores(step, cond, unblocked, crowd, outcomes, scale), strict=True))
    for one in asked:
        near = sum(abs(score - one.question.threshold) < step.margin for score in scores.get(one, ()))
        if near or one.question.alone:
            scores[one] = _scores(step, cond, unblocked, [one], outcomes, scale, alone=True)[0]
            outcomes[one.prompt].near_ties += near
    for (job, index), one in zip(batch, asked, strict=True):
        job.answers[index] = scores[one]


class _Asked(NamedTuple):
    """A question about a caption."""

    prompt: int
    question: Question

    @property
    def rows(self) -> list[Row]:
        return [Row(self.prompt, seed, self.question.off) for seed in self.question.seeds]


def _scores(
    step: FirstStep,
    cond: Condition,
    unblocked: Tensor,
    asked: Sequence[_Asked],
    outcomes: dict[int, Outcome[T]],
    scale: float,
    *,
    alone: bool = False,
) -> Answers:
    """Returns the answer of each question, each row in a batch of its own where asked for."""
    rows = [row for one in asked for row in one.rows]
    if not rows:
        return []
    deltas, troubles = (step.alone if alone else step)(cond, rows, scale=scale)
    for row in rows:
        outcomes[row.prompt].num_rows += step.rows_per_row
    for index, reason in troubles.items():
        outcomes[rows[index].prompt].error = reason
    values = _compared(step, unblocked, asked, rows, deltas).tolist()
    remaining = iter(values)
    return [tuple(islice(remaining, len(one.question.seeds))) for one in asked]


def _compared(
    step: FirstStep, unblocked: Tensor, asked: Sequence[_Asked], rows: Sequence[Row], deltas: Tensor
) -> Tensor:
    """Returns one similarity per row: to the same seed with all neurons on, or to the seed most like it."""
    before = unblocked[[row.prompt for row in rows], [row.seed for row in rows]]
    sizes = [len(one.question.seeds) for one in asked]
    if step.reference:
        pairs = zip(before.split(sizes), deltas.split(sizes), strict=True)
        values = torch.cat([reference_similarity(a, b) for a, b in pairs])
    else:
        values = similarity(before, deltas)
    parts = list(values.split(sizes))
    for place, (one, own) in enumerate(zip(asked, deltas.split(sizes), strict=True)):
        if one.question.among:
            parts[place] = consistency(own[None], reference=step.reference)[0]
    return torch.cat(parts)
