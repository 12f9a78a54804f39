"""The whole audit of a model before its release: which prompts leak, an edit that stops them, and whether it holds.

statistics, threshold -> two looks at every prompt -> neurons of the memorised ones -> one small set -> confirmed on
images -> measured on images -> verified
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.calibrate import Calibration, calibrate
from nemo_localize.confirm import confirm
from nemo_localize.evaluate import Evaluation, Judges, evaluate
from nemo_localize.evidence import Evidence, collect_evidence
from nemo_localize.first_step import FirstStep
from nemo_localize.generate import generate
from nemo_localize.images import shows_latents
from nemo_localize.likeness import likeness
from nemo_localize.localize import localize
from nemo_localize.minimal_set import GlobalEdit, minimal_set, within_budget
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.results import Results
from nemo_localize.settings import FIRST_IMAGE_SEED, ImageSettings, Mitigation, SearchSettings
from nemo_localize.statistics import Statistics, collect_statistics, merged
from nemo_localize.verification import Verification
from nemo_localize.verify import verify

MITIGATIONS: tuple[Mitigation, ...] = ("none", "neurons", "random-neurons")
_DAMAGE_PROMPTS, _CONTROLS = 48, 4


@dataclass(frozen=True)
class ConfirmedEdit:
    """The neurons that an audit ablates.

    Attributes:
        neurons: One set for all memorised prompts that images agree with.
        minimal: The smallest set by first steps, which it was widened from.
        widened_for: Prompts whose images asked for all of their candidates.
    """

    neurons: NeuronSet
    minimal: GlobalEdit
    widened_for: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found; parts that were not reached are None.

    Attributes:
        statistics: Activations of the ordinary prompts.
        calibration: Threshold of first steps, and its rate of false alarms.
        evidence: The verdict on each prompt, and what it rests on.
        results: The neurons of each prompt.
        edit: Neurons to ablate, confirmed on images.
        images: Images of the memorised prompts by mitigation.
        evaluation: Measures of those images.
        verification: Tests of whether the leaks are closed.
    """

    statistics: Statistics
    calibration: Calibration
    evidence: Evidence
    results: Results
    edit: ConfirmedEdit | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    verification: Verification | None = None

    @property
    def memorised(self) -> list[str]:
        """The prompts that are memorised."""
        return self.evidence.of("memorised")

    @property
    def neurons(self) -> NeuronSet:
        """The neurons to ablate; none where nothing is memorised or nothing was localized."""
        return self.edit.neurons if self.edit else NO_NEURONS

    @property
    def closed(self) -> bool:
        """Whether nothing is memorised, undecided or failed, or the leak is closed and nothing else is unsettled."""
        settled = not self.evidence.of("undecided") and not self._failed
        return settled and (not self.memorised or (self.verification is not None and self.verification.exit_code == 0))

    @property
    def verdict(self) -> str:
        """None memorised, undecided, or what verification says of the memorised ones."""
        if self.memorised:
            return self.verification.verdict if self.verification else "open"
        return "undecided" if self.evidence.of("undecided") or self._failed else "none memorised"

    @property
    def answer(self) -> str:
        """The verdict in a sentence or two."""
        if not self.memorised:
            return self._none_certain()
        answer = f"{len(self.memorised)} of {len(self.evidence.first)} captions are memorised"
        undecided = len(self.evidence.of("undecided"))
        others = f" {undecided} more are undecided." if undecided else ""
        if self.verification is None:
            return f"{answer}, and no neurons were found for any.{others}"
        summary = self.verification.summary()
        return (
            f"{answer}. With {len(self.neurons)} neurons ablated the verdict is {self.verification.verdict}: "
            f"{summary['closed']} closed, {summary['open']} open, {summary['inconclusive']} inconclusive.{others}"
        )

    def summary(self) -> dict[str, Any]:
        """Returns the audit in figures."""
        found: dict[str, Any] = {
            "captions": len(self.evidence.first),
            "memorised": len(self.memorised),
            "undecided": len(self.evidence.of("undecided")),
            "drawn": len(self.evidence.found.looks),
            "tau": self.calibration.tau,
            "tau_interval": self.calibration.interval,
            "false_alarm_rate": self.calibration.false_alarm_rate,
            "failed": self._failed,
        }
        if self.evaluation is not None:
            found |= {"evaluation": self.evaluation.rows(), "measured_in": self.evaluation.source}
        if self.edit is not None:
            found |= {
                "neurons": len(self.edit.neurons),
                "neurons_of_minimal_set": len(self.edit.minimal.neurons),
                "neurons_of_union": len(self.edit.minimal.union.neurons),
                "damage": self.edit.minimal.chosen.damage,
                "needed_all_candidates": list(self.edit.widened_for),
            }
        found |= {"verdict": self.verdict, "closed": self.closed, "answer": self.answer}
        return found if self.verification is None else found | {"verification": self.verification.summary()}

    @property
    def _failed(self) -> int:
        return sum(result.status == "error" for result in self.results.distinct())

    def _none_certain(self) -> str:
        count, looked_at = len(self.evidence.first), len(self.evidence.found.looks)
        looked = f"the first steps of all were compared, and images of the {looked_at} most consistent ones"
        if looked_at == count:
            looked = "the first steps and the images of all were compared"
        if undecided := len(self.evidence.of("undecided")):
            why = "seeds give images that are alike, but not most of them"
            if not self.evidence.found.usual.telling:
                why = "seeds give images that are alike, and so they do for ordinary captions of this model"
            return f"Undecided for {undecided} of {count} captions: {why}. No other is memorised: {looked}."
        if self._failed:
            return f"{self._failed} of {count} captions failed. No other is memorised: {looked}."
        return f"None of {count} captions is memorised: {looked}."


def audit(
    model: DiffusionModel | FirstStep,
    prompts: Sequence[str],
    ordinary: Sequence[str],
    *,
    references: Mapping[str, Sequence[str]] | None = None,
    seeds: Sequence[int] = range(FIRST_IMAGE_SEED, FIRST_IMAGE_SEED + 10),
    settings: ImageSettings | None = None,
    search: SearchSettings | None = None,
    quantile: float | None = 0.99,
    judges: Judges | None = None,
    originals: Mapping[str, Tensor] | None = None,
    map: Map = each_unit,
    on_part: Callable[[Any], None] | None = None,
) -> Audit:
    """Finds what is memorised, a set of neurons that stops it, and tests whether the leak is closed.

    Args:
        model: The model, or its `FirstStep` where settings differ from the defaults.
        prompts: Prompts to audit, such as captions of the training set.
        ordinary: Prompts that are not memorised: they set the threshold, and must not be damaged.
        references: Lists of prompts by name, ordinary ones and others of the audited prompts' style, from which the
            statistics are collected; by default the ordinary ones.
        seeds: Seeds of the images; none of localization, none of verification.
        settings: How images are generated.
        search: Candidate sets and refinement; by default those of the published code.
        quantile: Quantile of ordinary prompts that sets the threshold; None is mean plus standard deviation.
        judges: Networks that compare images; a missing one is replaced by a measure that needs no weights.
        originals: Training images by prompt, where they are known.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.
        on_part: Function called with each part as soon as it is known: `Statistics`, `Calibration`, `Evidence`,
            `Results`, `ConfirmedEdit`, the images by mitigation, `Evaluation`, `Verification`.

    Raises:
        UserError: An input is missing, or does not fit the others.
        MachineError: Memory does not hold a single row.
    """
    step, settings, judges = FirstStep.of(model), settings or ImageSettings(), judges or Judges()
    originals, tell = originals or {}, on_part or (lambda part: None)
    judge = likeness(judges.copies, of_latents=shows_latents(step.model))

    sources = references or {"ordinary": ordinary}
    statistics = merged([collect_statistics(step.model, own, source=key, up=step.up) for key, own in sources.items()])
    tell(statistics)
    calibration = calibrate(step, ordinary, quantile=quantile, map=map)
    tell(calibration)
    evidence = collect_evidence(
        step, prompts, ordinary, calibration, judge=judge, settings=settings, originals=originals, map=map
    )
    tell(evidence)
    memorised, tau = evidence.of("memorised"), evidence.suppressed_below
    found = localize(step, memorised, tau=tau, statistics=statistics, search=search, map=map)
    by_prompt = evidence.completed({result.prompt: result for result in found})
    results = Results(tuple(by_prompt[prompt] for prompt in prompts))
    tell(results)
    if not any(result.status == "localized" for result in results):
        return Audit(statistics, calibration, evidence, results)

    spared = ordinary[:_DAMAGE_PROMPTS]
    common = minimal_set(step, results, spared, tau=tau)
    neurons, stubborn = confirm(
        step.model,
        results,
        common.neurons,
        memorised,
        seeds,
        judge=judge,
        settings=settings,
        originals=originals,
        affordable=within_budget(step, spared),
        map=map,
    )
    edit = ConfirmedEdit(neurons, common, tuple(stubborn))
    tell(edit)
    images = generate(
        step.model, memorised, seeds, mitigations=MITIGATIONS, neurons=neurons, settings=settings, map=map
    )
    tell(images)
    evaluation = evaluate(memorised, images, originals=originals, judges=judges, of_latents=shows_latents(step.model))
    tell(evaluation)
    controls = [text for text in dict.fromkeys(ordinary) if text not in set(prompts)][:_CONTROLS]
    verification = verify(
        step,
        neurons,
        memorised,
        controls,
        tau=tau,
        originals=originals,
        copies=judges.copies,
        settings=settings,
        map=map,
    )
    tell(verification)
    return Audit(statistics, calibration, evidence, results, edit, images, evaluation, verification)
