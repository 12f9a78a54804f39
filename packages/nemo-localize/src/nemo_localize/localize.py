"""Finding NeMo: the value neurons with which a text-to-image model recognises one memorised prompt.

Notation:

* y is a prompt, S a set of neurons: output channels of the value projections of cross-attention. To ablate S is to
  multiply the outputs of its neurons by 0.
* delta(s, S) is the noise difference of seed s with S ablated, see `first_step`; sim(a, b) is how similar two noise
  differences are, by MS-SSIM.
* A seed is consistent where c(s) = max_r sim(delta(s, {}), delta(r, {})) > tau, see `detect`. A prompt with a
  consistent seed is memorised.
* score(S) = max over consistent seeds s of sim(delta(s, {}), delta(s, S)): how much of the memory is left with S
  ablated. S suppresses the prompt where score(S) <= tau.
* a_i is the mean absolute activation of neuron i over the prompt's tokens, z_i by how many standard deviations that
  differs from ordinary prompts.

`localize_caption` is the method as the paper writes it, one question at a time. `localize` goes through a list of
prompts and asks the same questions in full batches, see `batched`; it finds the same sets.

References:
    Hintersdorf, Struppek et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models",
    NeurIPS 2024, algorithms 1 to 4; layers deepest first and single neurons in the order of the published code.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

from torch import Tensor

from diffcore.denoiser import Condition
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.batched import localize_batch, settings_hash
from nemo_localize.calibrate import threshold
from nemo_localize.candidates import Neurons, candidates_of
from nemo_localize.detect import Look, look
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.results import CaptionResult, Results
from nemo_localize.score import consistency
from nemo_localize.settings import SearchSettings
from nemo_localize.statistics import Statistics, collect_statistics

_SMALL = 1e-9  # keeps relative changes finite, as in the published code


def localize(
    model: DiffusionModel | FirstStep,
    prompts: Sequence[str],
    *,
    ordinary: Sequence[str] = (),
    statistics: Statistics | None = None,
    tau: float | None = None,
    search: SearchSettings | None = None,
    map: Map = each_unit,
) -> Results:
    """Finds the neurons of every memorised prompt of a list; an error with one prompt is recorded and stops no other.

    Args:
        model: A text-conditioned U-Net, or its `FirstStep` where the settings of the step differ from the defaults.
        prompts: Prompts to search; those given twice are computed once.
        ordinary: Prompts that are not memorised, written like the others; a few hundred. Statistics and threshold come
            from them where these are not given.
        statistics: Activations of ordinary prompts on this model.
        tau: Threshold of similarity, from 0 to 1: a seed is consistent above it, and suppressed at or below it.
        search: Candidate sets and refinement; by default those of the published code.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.

    Raises:
        IncompatibleModelError: The statistics are of another model.
        MachineError: Memory does not hold a single row.
        UserError: Neither statistics and threshold nor ordinary prompts are given.

    Example:
        >>> from nemo_localize.planted import Plant, ordinary_captions, planted_model
        >>> model = planted_model([Plant("portrait of 1917 no 1", site=0, neuron=3)]).model
        >>> prompts = ["portrait of 1917 no 1", "plain words"]
        >>> found = localize(model, prompts, ordinary=ordinary_captions(50), tau=0.45)
        >>> [result.status for result in found], len(found.neurons)
        (['localized', 'not_memorised'], 1)
    """
    step, search = FirstStep.of(model), search or SearchSettings()
    if statistics is None:
        if not ordinary:
            raise UserError("there are neither `statistics` nor `ordinary` prompts to compare with; give one of them")
        statistics = collect_statistics(step.model, ordinary, up=step.up)
    statistics.require(step.model, step.sites)
    tau = threshold(step, ordinary=ordinary, map=map) if tau is None else tau
    plainly = step.published or search.refine_failures or search.relative_refinement is not None
    find = _one_by_one if plainly else localize_batch
    work = partial(find, step, tau=tau, statistics=statistics, search=search)
    return Results(tuple(map(work, prompts, name="captions", kind=CaptionResult, unit_size=search.unit_size)))


def _one_by_one(
    step: FirstStep, prompts: list[str], *, tau: float, statistics: Statistics, search: SearchSettings
) -> list[CaptionResult]:
    mark = settings_hash(step, tau, statistics, search)
    found = (localize_caption(step, text, tau=tau, statistics=statistics, search=search) for text in prompts)
    return [replace(result, settings_hash=mark) for result in found]


def localize_caption(
    step: FirstStep,
    prompt: str,
    *,
    tau: float,
    statistics: Statistics,
    search: SearchSettings | None = None,
) -> CaptionResult:
    """Finds the neurons of one prompt, one question at a time, as the paper's algorithms do.

    Only this form reproduces the published code: there, sets that never suppress are refined too, neurons that are both
    outliers and among the most active are tested twice, scores depend on their batch, and refinement may compare
    relative changes.

    Args:
        step: Model and denoising step that are searched.
        prompt: Prompt to find the neurons of.
        tau: Threshold of similarity, from 0 to 1; see `calibrate`.
        statistics: Activations of ordinary prompts on the same model.
        search: Candidate sets and refinement; by default those of the published code.

    Raises:
        MachineError: Memory does not hold a single row.

    Example:
        >>> from nemo_localize.planted import Plant, ordinary_captions, planted_model
        >>> from nemo_localize.statistics import collect_statistics
        >>> model = planted_model([Plant("portrait of 1917 no 1", site=0, neuron=3)]).model
        >>> statistics = collect_statistics(model, ordinary_captions(50))
        >>> found = localize_caption(FirstStep(model), "portrait of 1917 no 1", tau=0.45, statistics=statistics)
        >>> found.status, found.refined["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"]
        ('localized', (3,))
    """
    search = search or SearchSettings()
    started, rows, calls = time.monotonic(), step.num_rows, step.num_calls
    cond, truncated, lost = step.encode([prompt])
    seen = look(step, cond, threshold=tau)
    result = CaptionResult.looked(step.settings.seeds, seen, 0, prompt, tau, truncated[0], lost[0])
    if result.kept_seeds:
        try:
            result = _searched(step, cond, seen, result, statistics, search)
        except _NoScoreError as error:
            result = replace(result, status="error", error=str(error))
    return replace(
        result,
        unet_rows=step.num_rows - rows,
        unet_calls=float(step.num_calls - calls),
        seconds=time.monotonic() - started,
    )


def _searched(
    step: FirstStep, cond: Condition, seen: Look, result: CaptionResult, statistics: Statistics, search: SearchSettings
) -> CaptionResult:
    tau, kept = result.tau, seen.above(0, result.tau)
    before = seen.deltas[0, kept]

    def noise_differences(seeds: Sequence[int], ablated: Neurons) -> Tensor:
        deltas, troubles = step(cond, [Row(0, seed, ablated) for seed in seeds], scale=search.scaling_factor)
        if troubles:
            raise _NoScoreError(next(iter(troubles.values())))
        return deltas

    @cache
    def scores(ablated: Neurons) -> list[float]:
        """Returns sim(delta(s, {}), delta(s, ablated)) of each consistent seed s."""
        return step.similarity(before, noise_differences(kept, ablated)).tolist() if ablated else [1.0] * len(kept)

    def score(ablated: Neurons) -> float:
        return max(scores(ablated))

    # Algorithm 3, initial selection: the first of the nested candidate sets that suppresses.
    early = search.give_up_early and not step.published
    candidates = candidates_of(step, cond, statistics, search)[0]
    index = select(candidates.sets, tau, score, give_up_early=early)
    initial = candidates.sets[index]
    reached = score(initial) <= tau
    result = result.selected(candidates, index, reached=reached, score=score(initial))
    if not reached and not (initial and (search.refine_failures or step.published)):
        return result

    # Algorithm 4, refinement: layers, then neurons, leave the set wherever the score stays below the threshold.
    threshold = search.threshold(tau) if reached else score(initial) - 2 * step.margin
    held, limit = score, threshold
    if search.relative_refinement is not None:
        whole, limit = scores(initial), search.relative_refinement

        def held(ablated: Neurons) -> float:
            return max(abs(now - all_) / (abs(all_) + _SMALL) for now, all_ in zip(scores(ablated), whole, strict=True))

    layers = candidates.layers(index, twice=step.published)
    neurons = refine(layers, limit, held)
    residual = 0.0
    if neurons:
        every = noise_differences(range(step.settings.num_seeds), neurons)
        residual = float(consistency(every[None], published=step.published).max())
    return result.refined_to(candidates.sites.named(neurons), threshold, score=score(neurons), residual=residual)


class _NoScoreError(ValueError):
    """A noise difference could not be computed."""


def select(
    sets: Sequence[Neurons], tau: float, score: Callable[[Neurons], float], *, give_up_early: bool = False
) -> int:
    """Returns the index of the first candidate set that scores at most tau, or of the last one where none does.

    Args:
        sets: Candidate sets, each containing the one before; at least one.
        tau: Threshold of the score.
        score: Function of a set of ablated neurons.
        give_up_early: Look at the last set first, and stop where it does not suppress.

    Example:
        >>> select([frozenset({1}), frozenset({1, 2}), frozenset({1, 2, 3})], 0.4, lambda ablated: 1 - len(ablated) / 3)
        1
    """
    if give_up_early and score(sets[-1]) > tau:
        return len(sets) - 1
    return next((index for index, ablated in enumerate(sets) if score(ablated) <= tau), len(sets) - 1)


def refine(layers: Sequence[Sequence[int]], threshold: float, score: Callable[[Neurons], float]) -> Neurons:
    """Returns what is left after layers, then single neurons, leave the set wherever the score stays below a threshold.

    Greedy, deepest layer first: each test rests on all removals before it.

    Args:
        layers: The set to refine, as lists of neurons, shallowest layer first. A neuron that stands twice in its list
            leaves the set when its second copy goes.
        threshold: Value that the score must stay below, strictly.
        score: Function of a set of ablated neurons.

    Example:
        >>> sorted(refine([[1, 2], [3]], 0.5, lambda ablated: 0.0 if 2 in ablated else 1.0))
        [2]
    """
    kept = [list(layer) for layer in layers]
    for place in reversed(range(len(kept))):
        without = [*kept[:place], [], *kept[place + 1 :]]
        if kept[place] and score(together(without)) < threshold:
            kept = without
    for place in reversed(range(len(kept))):
        for neuron in list(kept[place]):
            others = list(kept[place])
            others.remove(neuron)
            without = [*kept[:place], others, *kept[place + 1 :]]
            if score(together(without)) < threshold:
                kept = without
    return together(kept)


def together(layers: Iterable[Iterable[int]]) -> Neurons:
    """Returns the neurons of all layers as one set."""
    return frozenset(neuron for layer in layers for neuron in layer)
