"""NeMo on a list of prompts: what `localize.localize_caption` finds, from forward passes filled by many prompts.

The prompts' searches run side by side. Questions wait in the order in which they were asked, each forward pass takes as
many as fit, and a search goes on when all of its questions are answered. So the batches, and with them every low bit,
follow from the prompts alone. A score nearer to its threshold than batches move it is computed again, alone.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import Condition
from diffcore.digests import digest_of_values
from nemo_localize.candidates import Candidates, candidates_of
from nemo_localize.detect import look
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.results import CaptionResult
from nemo_localize.score import consistency
from nemo_localize.search import Answers, Question, Refinement, Search, Selection, refine, select
from nemo_localize.settings import SearchSettings, described
from nemo_localize.statistics import Statistics


def settings_hash(step: FirstStep, tau: float, statistics: Statistics, search: SearchSettings) -> str:
    """Returns a digest of all that a result depends on."""
    parts = [step.digest, step.model.fingerprint, tau, statistics.fingerprint, statistics.num_prompts]
    parts += [float(statistics.mean.sum()), described(search)]
    return digest_of_values(parts)[:16]


def localize_batch(
    step: FirstStep, prompts: list[str], *, tau: float, statistics: Statistics, search: SearchSettings
) -> list[CaptionResult]:
    """Returns what `localize.localize_caption` finds for each prompt, with the same arguments."""
    started, calls = time.monotonic(), step.num_calls
    cond, truncated, lost = step.encode(prompts)
    seen = look(step, cond, threshold=tau)
    kept = {place: seeds for place in range(len(prompts)) if (seeds := seen.above(place, tau))}
    candidates = candidates_of(step, cond, statistics, search) if kept else []
    searches = {
        place: _search(candidates[place], seeds, step.settings.num_seeds, tau, search) for place, seeds in kept.items()
    }
    outcomes = _run(step, cond, seen.deltas, searches, scale=search.scaling_factor)
    mark, results = settings_hash(step, tau, statistics, search), []
    for place, prompt in enumerate(prompts):
        result = CaptionResult.looked(step.settings.seeds, seen, place, prompt, tau, truncated[place], lost[place])
        if place in outcomes:
            result = _finished(result, candidates[place], outcomes[place], search.threshold(tau))
        results.append(replace(result, settings_hash=mark))
    seconds, total = time.monotonic() - started, sum(result.unet_rows for result in results)
    shares = [result.unet_rows / total for result in results]
    return [
        replace(result, unet_calls=(step.num_calls - calls) * share, seconds=seconds * share)
        for result, share in zip(results, shares, strict=True)
    ]


def _search(
    candidates: Candidates, kept: Sequence[int], num_seeds: int, tau: float, search: SearchSettings
) -> Search[tuple[Selection, Refinement | None]]:
    """Selects and refines the neurons of one prompt, and asks how consistent its seeds remain without them.

    The score alone does not notice a second memory, which all seeds may show once the first is suppressed.
    """
    selection = yield from select(candidates.sets, kept, tau, give_up_early=search.give_up_early)
    if not selection.reached:
        return selection, None
    layers = candidates.layers(selection.index)[::-1]
    refinement = yield from refine(
        selection.scores, layers, search.threshold(tau), num_seeds=num_seeds, residual_threshold=tau
    )
    return selection, refinement


def _finished(result: CaptionResult, candidates: Candidates, outcome: "_Outcome", limit: float) -> CaptionResult:
    """Returns a result with what a search found for it, and what the search cost."""
    rows, ties = result.unet_rows + outcome.num_rows, result.near_ties + outcome.near_ties
    result = replace(result, unet_rows=rows, near_ties=ties)
    if outcome.found is None:
        return replace(result, status="error", error=outcome.error)
    selection, refinement = outcome.found
    score = max(selection.scores.values())
    result = result.selected(candidates, selection.index, reached=selection.reached, score=score)
    if refinement is None:
        return result
    score, residual = max(refinement.scores.values()), max(refinement.residual, default=0.0)
    neurons = candidates.sites.named(refinement.neurons)
    return result.refined_to(neurons, limit, score=score, residual=residual)


@dataclass
class _Outcome:
    """How a search ended: what it found or why it failed, and what it cost."""

    found: tuple[Selection, Refinement | None] | None = None
    error: str | None = None
    num_rows: int = 0
    near_ties: int = 0


@dataclass
class _Job:
    """One prompt's search, and what it waits for."""

    prompt: int
    search: Search[tuple[Selection, Refinement | None]]
    questions: list[Question] = field(default_factory=list)
    answers: list[tuple[float, ...] | None] = field(default_factory=list)


class _Asked(NamedTuple):
    """A question about a prompt."""

    prompt: int
    question: Question

    @property
    def rows(self) -> list[Row]:
        return [Row(self.prompt, seed, self.question.ablated) for seed in self.question.seeds]


def _run(
    step: FirstStep,
    cond: Condition,
    before: Float[Tensor, "prompts seeds channels height width"],
    searches: Mapping[int, Search[tuple[Selection, Refinement | None]]],
    *,
    scale: float = 0.0,
) -> dict[int, _Outcome]:
    """Runs searches side by side and returns how each ended.

    Args:
        step: The model that answers.
        cond: Condition of all prompts.
        before: Noise differences of all prompts and seeds with no neuron ablated.
        searches: Searches by index of the prompt.
        scale: Factor of the ablated neurons' outputs.
    """
    outcomes = {prompt: _Outcome() for prompt in searches}
    waiting: deque[tuple[_Job, int]] = deque()
    for prompt, search in searches.items():
        _advance(_Job(prompt, search), None, outcomes, waiting)
    while waiting:
        batch = _next_batch(waiting, step.batch_size)
        _answer(step, cond, before, batch, outcomes, scale)
        for job in {id(job): job for job, _ in batch}.values():
            if outcomes[job.prompt].error is not None:
                job.search.close()
                waiting = deque(pair for pair in waiting if pair[0] is not job)
            elif all(answer is not None for answer in job.answers):
                _advance(job, [answer for answer in job.answers if answer is not None], outcomes, waiting)
    return outcomes


def _advance(
    job: _Job, answers: Answers | None, outcomes: dict[int, _Outcome], waiting: deque[tuple[_Job, int]]
) -> None:
    """Sends a search its answers and queues what it asks next."""
    try:
        job.questions = next(job.search) if answers is None else job.search.send(answers)
    except StopIteration as finished:
        outcomes[job.prompt].found = finished.value
        return
    job.answers = [None] * len(job.questions)
    waiting.extend((job, index) for index in range(len(job.questions)))


def _next_batch(waiting: deque[tuple[_Job, int]], batch_size: int) -> list[tuple[_Job, int]]:
    """Takes whole questions while their rows fit, at least one."""
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
    before: Tensor,
    batch: list[tuple[_Job, int]],
    outcomes: dict[int, _Outcome],
    scale: float,
) -> None:
    """Answers the questions of one batch; those with a score near its threshold again, row by row."""
    asked = [_Asked(job.prompt, job.questions[index]) for job, index in batch]
    answers = _scores(step, cond, before, asked, outcomes, scale)
    for (job, index), one, answer in zip(batch, asked, answers, strict=True):
        near = sum(abs(score - one.question.threshold) < step.margin for score in answer)
        if near:
            answer = _scores(step, cond, before, [one], outcomes, scale, alone=True)[0]
            outcomes[one.prompt].near_ties += near
        job.answers[index] = answer


def _scores(
    step: FirstStep,
    cond: Condition,
    before: Tensor,
    asked: Sequence[_Asked],
    outcomes: dict[int, _Outcome],
    scale: float,
    *,
    alone: bool = False,
) -> Answers:
    """Returns the answer of each question: similarities to the same seed before, or to the seed most like it."""
    rows = [row for one in asked for row in one.rows]
    deltas, troubles = (step.alone if alone else step)(cond, rows, scale=scale)
    for row in rows:
        outcomes[row.prompt].num_rows += step.rows_per_row
    for index, reason in troubles.items():
        outcomes[rows[index].prompt].error = reason
    sizes = [len(one.question.seeds) for one in asked]
    values = step.similarity(before[[row.prompt for row in rows], [row.seed for row in rows]], deltas)
    parts = list(values.split(sizes))
    for place, (one, own) in enumerate(zip(asked, deltas.split(sizes), strict=True)):
        if one.question.among:
            parts[place] = consistency(own[None])[0]
    remaining = iter(torch.cat(parts).tolist())
    return [tuple(islice(remaining, size)) for size in sizes]
