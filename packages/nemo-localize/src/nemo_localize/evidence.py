"""What an audit knows of each prompt after two looks: at its first step, and at images of the suspicious ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from diffcore.digests import digest_of
from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.calibrate import Calibration
from nemo_localize.detect import Detection, detect
from nemo_localize.first_step import FirstStep
from nemo_localize.likeness import Likeness
from nemo_localize.results import CaptionResult
from nemo_localize.second_look import STEPS, Look, SecondLook, Verdict, looks, second_look
from nemo_localize.settings import ImageSettings

_ORDER: tuple[Verdict, ...] = ("memorised", "undecided", "clean")
_UNIT_SIZE = 8


@dataclass(frozen=True)
class Evidence:
    """The verdict on each prompt, and what it rests on.

    Attributes:
        verdicts: Verdicts by prompt: memorised, then undecided, then clean; within each, most similar images first,
            then prompts without images by consistency.
        first: The first look at each prompt: consistency of its seeds, or why it has none.
        found: Second look, at images of prompts.
        calibration: Threshold of first steps, from ordinary prompts.
        source: Description of the measure of likeness.
    """

    verdicts: Mapping[str, Verdict]
    first: tuple[Detection, ...]
    found: SecondLook
    calibration: Calibration
    source: str

    def of(self, verdict: Verdict) -> list[str]:
        """Returns the prompts with a verdict."""
        return [prompt for prompt, own in self.verdicts.items() if own == verdict]

    @property
    def consistency(self) -> dict[str, float]:
        """The largest consistency of each prompt that has one."""
        return _levels(self.first)

    @property
    def suppressed_below(self) -> float:
        """The threshold that ablation must bring first steps down to.

        It is tau. Where images show a memory whose first step is not above tau, it is the paper's threshold, mean plus
        standard deviation over ordinary prompts, or where that is too high as well their median.
        """
        found = self.calibration
        lowest = min((self.consistency[prompt] for prompt in self.of("memorised")), default=1.0)
        usual = found.quantiles["0.5"]
        levels = (found.tau, min(found.tau, found.mean + found.sd), min(found.tau, usual))
        return next((level for level in levels if level < lowest), levels[-1])

    def completed(self, searched: Mapping[str, CaptionResult]) -> dict[str, CaptionResult]:
        """Returns a result for every prompt, from what was found for the memorised ones."""
        return {first.prompt: self._result(first, searched.get(first.prompt)) for first in self.first}

    def _result(self, first: Detection, searched: CaptionResult | None) -> CaptionResult:
        if searched is not None:
            # Images say that it is memorised; its first step is too ordinary to be searched.
            return replace(searched, status="not_localized") if searched.status == "not_memorised" else searched
        undecided = self.verdicts.get(first.prompt) == "undecided"
        return CaptionResult(
            first.prompt,
            digest_of(first.prompt),
            "error" if first.error else "undecided" if undecided else "not_memorised",
            error=first.error,
            consistency=first.consistency,
            tau=self.calibration.tau,
            truncated=first.truncated,
            lost=first.lost,
        )


def collect_evidence(
    model: DiffusionModel | FirstStep,
    prompts: Sequence[str],
    ordinary: Sequence[str],
    calibration: Calibration,
    *,
    judge: Likeness,
    settings: ImageSettings | None = None,
    originals: Mapping[str, Tensor] | None = None,
    map: Map = each_unit,
) -> Evidence:
    """Looks at the first step of all prompts, and at images of the most consistent ones.

    Args:
        model: The model, or its `FirstStep` where settings differ from the defaults.
        prompts: Prompts to audit; those given twice are looked at once.
        ordinary: Prompts that are not memorised.
        calibration: Threshold that was found from the ordinary prompts.
        judge: Measure of how similar images are.
        settings: How images are generated; their number of steps is fixed.
        originals: Training images by prompt, where they are known.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    step, settings = FirstStep.of(model), settings or ImageSettings()
    first = detect(step, list(dict.fromkeys(prompts)), name="first-look", map=map)
    levels = _levels(first)
    usual = _levels(detect(step, list(dict.fromkeys(ordinary)), name="calibration", map=map))

    def look(texts: Sequence[str], seeds: Sequence[int]) -> list[Look]:
        def work(unit: list[str]) -> list[Look]:
            return looks(step.model, unit, seeds, settings, judge, originals)

        return map(work, texts, name=f"look-{len(seeds)}", kind=Look, unit_size=_UNIT_SIZE)

    low = calibration.tau if calibration.interval is None else calibration.interval[0]
    found = second_look(
        look,
        sorted(levels, key=lambda prompt: -levels[prompt]),
        sorted(usual, key=lambda prompt: -usual[prompt]),
        certain=sum(level >= low for level in levels.values()),
        rows_per_image=STEPS if settings.guidance_scale == 1 else 2 * STEPS,
        allowed_rows=(len(levels) + len(usual)) * step.settings.num_seeds * step.rows_per_row,
    )
    return Evidence(_ranked(found, levels), tuple(first), found, calibration, judge.source)


def _ranked(found: SecondLook, levels: Mapping[str, float]) -> dict[str, Verdict]:
    verdicts: dict[str, Verdict] = {prompt: "clean" for prompt in levels}
    verdicts |= found.verdicts()
    typical = {look.prompt: look.typical for look in found.looks if look.error is None}
    order = sorted(levels, key=lambda text: (_ORDER.index(verdicts[text]), -typical.get(text, -1.0), -levels[text]))
    return {prompt: verdicts[prompt] for prompt in order}


def _levels(found: Sequence[Detection]) -> dict[str, float]:
    return {one.prompt: one.level for one in found if one.error is None}
