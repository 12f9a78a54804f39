"""A work queue that fills each forward pass with the questions of many captions' searches.

Questions wait in the order in which they were asked; a search goes on when all of its questions are answered. So the
batches, and with them every low bit, follow from the captions alone.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import Condition
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.score import reference_similarity, similarity
from nemo_localize.search import Answers, Question, Search

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
) -> dict[int, Outcome[T]]:
    """Runs searches side by side and returns how each ended.

    Args:
        step: What answers.
        cond: Of all captions.
        unblocked: Their stretched noise differences with all neurons on.
        searches: By index of the caption.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    outcomes: dict[int, Outcome[T]] = {prompt: Outcome() for prompt in searches}
    waiting: deque[tuple[_Job[T], int]] = deque()
    for prompt, search in searches.items():
        _advance(_Job(prompt, search), None, outcomes, waiting)
    while waiting:
        batch = _next_batch(waiting, step.batch_size)
        _answer(step, cond, unblocked, batch, outcomes)
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
) -> None:
    """Answers the questions of one batch."""
    questions = [job.questions[index] for job, index in batch]
    rows = [
        Row(job.prompt, seed, job.questions[index].off) for job, index in batch for seed in job.questions[index].seeds
    ]
    crowd = [place for place, question in enumerate(_spread(questions)) if not question.alone]
    scores = [question.threshold for question in _spread(questions)]  # nearer than any margin: computed alone below
    if crowd:
        groups = [len(question.seeds) for question in questions if not question.alone]
        fresh = _scores(step, cond, unblocked, [rows[place] for place in crowd], groups, outcomes)
        for place, score in zip(crowd, fresh, strict=True):
            scores[place] = score
    for place, question in enumerate(_spread(questions)):
        near = abs(scores[place] - question.threshold) < step.margin
        if near or question.alone:
            (scores[place],) = _scores(step, cond, unblocked, [rows[place]], [1], outcomes)
            outcomes[rows[place].prompt].near_ties += near
    remaining = iter(scores)
    for job, index in batch:
        job.answers[index] = tuple(islice(remaining, len(job.questions[index].seeds)))


def _spread(questions: list[Question]) -> list[Question]:
    """Returns each question once per row."""
    return [question for question in questions for _ in question.seeds]


def _scores(
    step: FirstStep,
    cond: Condition,
    unblocked: Tensor,
    rows: list[Row],
    groups: list[int],
    outcomes: dict[int, Outcome[T]],
) -> list[float]:
    """Returns the similarity of each row to the same seed with all neurons on; `groups` are compared as one batch."""
    deltas, troubles = step(cond, rows)
    for row in rows:
        outcomes[row.prompt].num_rows += step.rows_per_row
    for index, reason in troubles.items():
        outcomes[rows[index].prompt].error = reason
    before = unblocked[[row.prompt for row in rows], [row.seed for row in rows]]
    if step.reference:
        pairs = zip(before.split(groups), deltas.split(groups), strict=True)
        return torch.cat([reference_similarity(a, b) for a, b in pairs]).double().tolist()
    return similarity(before, deltas).double().tolist()
