"""Which captions are memorised, and by which value neurons.

References:
    Hintersdorf, Struppek et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models",
    NeurIPS 2024.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffcore.run import Run
from nemo_localize.activations import mean_activations
from nemo_localize.batched import Question, Refinement, Search, Selection, refine, select
from nemo_localize.candidates import Candidates, candidate_sets
from nemo_localize.detect import Baseline, encode, measure
from nemo_localize.first_step import FirstStep
from nemo_localize.results import CaptionResult, Results
from nemo_localize.settings import SearchSettings, described
from nemo_localize.statistics import Statistics
from nemo_localize.units import Rows, in_units, prompt_hash
from nemo_localize.workqueue import Outcome, run_searches

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Found:
    """What the search for one caption's neurons found.

    Attributes:
        selection: Of the candidate sets.
        refinement: Of the selected one; None where there was none.
        threshold: What refinement held scores against.
    """

    selection: Selection
    refinement: Refinement | None
    threshold: float


def localize(
    step: FirstStep,
    prompts: Sequence[str],
    *,
    tau: float,
    statistics: Statistics,
    settings: SearchSettings | None = None,
    run: Run | None = None,
    fabric: "Fabric | None" = None,
) -> Results:
    """Finds the neurons of every memorised caption. One caption's failure never costs the others.

    Args:
        step: The model, and the step that is looked at.
        prompts: Captions; those given twice are computed once.
        tau: Above it a seed counts as consistent; at or below it as suppressed. See `threshold`.
        statistics: Of ordinary captions.
        settings: Of the search.
        run: Where finished captions are kept, and read from when the run is resumed. `results.jsonl` is written there.
        fabric: Processes that share the captions, all with the same `step`; they give the same results as one.

    Raises:
        IncompatibleModelError: The statistics are of another model.
        MachineError: Memory does not hold a single row.
    """
    settings = settings or SearchSettings()
    statistics.require(step.model, step.sites)
    mark = settings_hash(step, tau, statistics, settings)
    rows = in_units(
        prompts,
        lambda unit: _localize_unit(step, unit, tau, statistics, settings, mark),
        unit_size=settings.unit_size,
        run=run,
        name="captions",
        fabric=fabric,
    )
    results = Results(tuple(CaptionResult.from_json(row) for row in rows))
    if run is not None and run.leading:
        results.write_jsonl(run.folder / "results.jsonl")
    return results


def settings_hash(step: FirstStep, tau: float, statistics: Statistics, settings: SearchSettings) -> str:
    """Returns a digest of all that a result depends on."""
    parts = [step.digest, step.model.fingerprint, tau, statistics.fingerprint, statistics.num_prompts]
    parts += [float(statistics.mean.sum()), described(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def search_neurons(
    candidates: Candidates,
    kept: Sequence[int],
    num_seeds: int,
    tau: float,
    settings: SearchSettings,
    *,
    margin: float = 0.0,
    together: bool = False,
) -> Search[Found]:
    """Selects and refines the neurons of one caption, and asks how consistent its seeds remain without them.

    Similarity to the step with all neurons on is blind to a second memory: every seed may now show that one instead.

    Args:
        candidates: Its candidate sets.
        kept: Its consistent seeds, most consistent first.
        num_seeds: All of its seeds.
        tau: The threshold.
        settings: Of the search.
        margin: How near two scores may be to count as equal, where tau is not reached and refinement is asked for.
        together: Scores depend on their batch: ask all seeds at once, and nothing that the published code would not.
    """
    early = settings.give_up_early and not together
    selection = yield from select(candidates.sets, kept, tau, together=together, give_up_early=early)

    def among_all(off: frozenset[int]) -> Question:
        return Question(off, tuple(range(num_seeds)), tau, among=True)

    initial = candidates.sets[selection.index]
    threshold = settings.threshold(tau) if selection.reached else max(selection.scores.values())
    # The published code refines what failed like everything else.
    if not selection.reached and not (initial and (settings.refine_failures or together)):
        return Found(selection, None, threshold)
    exact = not selection.reached or settings.relative_refinement is not None
    if exact and not together:  # scores are compared with the whole set's, which must not hang on its batch
        (values,) = yield [Question(initial, tuple(kept), threshold, alone=True)]
        selection = Selection(selection.index, selection.reached, dict(zip(kept, values, strict=True)))
        # A removal that changes nothing leaves the score at exactly this level, and must not hang on its last bits.
        threshold = threshold if selection.reached else max(values) - 2 * margin
    refinement = yield from refine(
        selection,
        candidates.order(selection.index, twice=together),
        threshold,
        relative=settings.relative_refinement,
        together=together,
        last=among_all,
    )
    return Found(selection, refinement, threshold)


def _localize_unit(
    step: FirstStep, prompts: list[str], tau: float, statistics: Statistics, settings: SearchSettings, mark: str
) -> Rows:
    started, calls = time.monotonic(), step.num_calls
    cond, truncated, lost = encode(step, prompts)
    base = measure(step, cond, threshold=tau)
    kept = [_consistent(base, prompt, tau) for prompt in range(len(prompts))]
    activations = mean_activations(step.model.backbone, step.sites, cond["encoder_hidden_states"])
    z = statistics.z_scores(activations)
    rounds = settings.rounds(max(step.sites.widths))
    candidates = {
        prompt: candidate_sets(z[prompt], activations[prompt], step.sites, rounds)
        for prompt in range(len(prompts))
        if kept[prompt]
    }
    searches = {
        prompt: search_neurons(
            candidates[prompt],
            kept[prompt],
            step.settings.num_seeds,
            tau,
            settings,
            margin=step.margin,
            together=step.reference,
        )
        for prompt in candidates
    }
    outcomes = run_searches(step, cond, base.deltas, searches, scale=settings.scaling_factor)
    rows = []
    for prompt, text in enumerate(prompts):
        result = _described(step, base, prompt, kept[prompt], tau, candidates.get(prompt), outcomes.get(prompt))
        rows.append(
            {"prompt": text, "prompt_hash": prompt_hash(text), "truncated": truncated[prompt], "lost": lost[prompt]}
            | result
            | {"settings_hash": mark}
        )
    seconds, total = time.monotonic() - started, sum(row["unet_rows"] for row in rows)
    for row in rows:
        row["unet_calls"] = (step.num_calls - calls) * row["unet_rows"] / total
        row["seconds"] = seconds * row["unet_rows"] / total
    return rows


def _consistent(base: Baseline, prompt: int, tau: float) -> list[int]:
    """Returns the seeds above tau, most consistent first; none for captions that failed."""
    if prompt in base.errors:
        return []
    values = base.consistency[prompt]
    return sorted((seed for seed, value in enumerate(values) if value > tau), key=lambda seed: -values[seed])


def _described(
    step: FirstStep,
    base: Baseline,
    prompt: int,
    kept: list[int],
    tau: float,
    candidates: Candidates | None,
    outcome: Outcome[Found] | None,
) -> dict[str, Any]:
    """Returns the result of one caption as plain values."""
    error = base.errors.get(prompt)
    row: dict[str, Any] = {
        "status": "error" if error else "not_memorised",
        "error": error,
        "consistency": None if error else {"per_seed": base.consistency[prompt], "max": max(base.consistency[prompt])},
        "kept_seeds": [step.settings.seeds[seed] for seed in sorted(kept)],
        "tau": tau,
        "near_ties": base.near_ties.get(prompt, 0),
        "unet_rows": base.rows[prompt],
    }
    if outcome is None or candidates is None:
        return row
    row["unet_rows"] += outcome.num_rows
    row["near_ties"] += outcome.near_ties
    if outcome.found is None:
        return row | {"status": "error", "error": outcome.error}
    return row | _found_row(step, candidates, outcome.found, tau)


def _found_row(step: FirstStep, candidates: Candidates, found: Found, tau: float) -> dict[str, Any]:
    selection, refinement = found.selection, found.refinement
    theta, k = candidates.rounds[selection.index]
    residual = max(refinement.residual, default=None) if refinement else None
    return {
        "status": "localised" if selection.reached else "not_localised",
        "theta": theta,
        "k": k,
        "rounds": selection.index + 1,
        "tau_ref": found.threshold,
        "initial": step.sites.named(candidates.sets[selection.index]).to_json(),
        "refined": step.sites.named(refinement.neurons).to_json() if refinement else None,
        "score_initial": max(selection.scores.values()),
        "score_refined": max(refinement.scores.values()) if refinement else None,
        "residual_consistency": residual,
        "mitigated": selection.reached and residual is not None and residual <= tau,
    }
