"""What an audit knows of each caption after two looks: its first step, and pictures of those that are suspicious."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffcore.run import Run
from nemo_localize.calibrate import Calibration, scored
from nemo_localize.first_step import FirstStep
from nemo_localize.images import Drawing
from nemo_localize.likeness import Likeness
from nemo_localize.results import CaptionResult
from nemo_localize.second_look import STEPS, Look, SecondLook, Verdict, looks, second_look
from nemo_localize.units import Rows, in_units, prompt_hash

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_ORDER: tuple[Verdict, ...] = ("memorised", "undecided", "clean")
_UNIT_SIZE = 8


@dataclass(frozen=True)
class Evidence:
    """The verdict on each caption, and what it rests on.

    Attributes:
        verdicts: By evidence: memorised, undecided, clean; in each, those first whose pictures are most alike, and
            captions without pictures by how consistent they are.
        first: The first look at each caption: consistency of its seeds, or why it has none.
        found: The second look.
        calibration: What ordinary captions say of first steps.
        source: What likeness was measured in.
    """

    verdicts: Mapping[str, Verdict]
    first: Rows
    found: SecondLook
    calibration: Calibration
    source: str

    def of(self, verdict: Verdict) -> list[str]:
        """Returns the captions of a verdict."""
        return [prompt for prompt, own in self.verdicts.items() if own == verdict]

    @property
    def consistency(self) -> dict[str, float]:
        """The largest consistency of each caption that has one."""
        return _levels(self.first)

    @property
    def suppressed_below(self) -> float:
        """What neurons must bring first steps down to.

        It is the threshold. Where pictures show a memory whose first step is not above it, it is the paper's, mean plus
        standard deviation of ordinary captions, or else their median.
        """
        found = self.calibration
        lowest = min((self.consistency[prompt] for prompt in self.of("memorised")), default=1.0)
        usual = found.quantiles["0.5"]
        levels = (found.tau, min(found.tau, found.mean + found.sd), min(found.tau, usual))
        return next((level for level in levels if level < lowest), levels[-1])

    def completed(self, searched: Mapping[str, CaptionResult]) -> dict[str, CaptionResult]:
        """Returns a result for every caption, from what was found for the memorised ones."""
        return {row["prompt"]: self._result(row, searched.get(row["prompt"])) for row in self.first}

    def _result(self, row: Mapping[str, Any], searched: CaptionResult | None) -> CaptionResult:
        prompt = row["prompt"]
        if searched is not None:
            # Pictures say that it is memorised; its first step is too ordinary to be searched.
            return replace(searched, status="not_localised") if searched.status == "not_memorised" else searched
        undecided = self.verdicts.get(prompt) == "undecided"
        return CaptionResult(
            prompt,
            prompt_hash(prompt),
            "error" if row["error"] else "undecided" if undecided else "not_memorised",
            error=row["error"],
            consistency=() if row["error"] else tuple(row["consistency"]),
            tau=self.calibration.tau,
            truncated=row["truncated"],
            lost=row["lost"],
        )


def collect_evidence(
    step: FirstStep,
    prompts: Sequence[str],
    ordinary: Sequence[str],
    calibration: Calibration,
    drawing: Drawing,
    judge: Likeness,
    run: Run,
    *,
    originals: Mapping[str, Tensor] | None = None,
    fabric: "Fabric | None" = None,
) -> Evidence:
    """Looks at the first step of all captions, and at pictures of the most consistent ones.

    Args:
        step: The model and its step.
        prompts: Captions to audit.
        ordinary: Captions that are not memorised.
        calibration: Of these, in this run.
        drawing: How pictures are drawn, but for their steps.
        judge: Says how alike pictures are.
        run: Where everything is kept, and read from when the run is resumed.
        originals: Training images by caption, where they are known.
        fabric: Processes that share the work.

    Raises:
        MachineError: Memory does not hold a single row.
    """
    first = scored(step, prompts, name="first-look", run=run, fabric=fabric)
    levels = _levels(first)
    usual = _levels(scored(step, ordinary, name="calibration", run=run, fabric=fabric))

    def look(texts: Sequence[str], seeds: Sequence[int]) -> list[Look]:
        def work(unit: list[str]) -> Rows:
            return [asdict(one) for one in looks(step.model, unit, seeds, drawing, judge, originals)]

        rows = in_units(texts, work, unit_size=_UNIT_SIZE, run=run, name=f"look-{len(seeds)}", fabric=fabric)
        return [Look.from_json(row) for row in rows]

    low = calibration.tau if calibration.interval is None else calibration.interval[0]
    found = second_look(
        look,
        sorted(levels, key=lambda prompt: -levels[prompt]),
        sorted(usual, key=lambda prompt: -usual[prompt]),
        certain=sum(level >= low for level in levels.values()),
        rows_per_picture=STEPS if drawing.guidance_scale == 1 else 2 * STEPS,
        allowed_rows=(len(levels) + len(usual)) * step.settings.num_seeds * step.rows_per_row,
    )
    return Evidence(_ranked(found, levels), first, found, calibration, judge.source)


def _ranked(found: SecondLook, levels: Mapping[str, float]) -> dict[str, Verdict]:
    verdicts: dict[str, Verdict] = {prompt: "clean" for prompt in levels}
    verdicts |= found.verdicts()
    typical = {look.prompt: look.typical for look in found.looks if look.error is None}
    order = sorted(levels, key=lambda text: (_ORDER.index(verdicts[text]), -typical.get(text, -1.0), -levels[text]))
    return {prompt: verdicts[prompt] for prompt in order}


def _levels(rows: Rows) -> dict[str, float]:
    return {row["prompt"]: max(row["consistency"]) for row in rows if row["error"] is None}
