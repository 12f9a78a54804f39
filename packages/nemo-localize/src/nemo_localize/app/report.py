"""The report of a run, made from whatever parts its folder holds; it can be made again at any time."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.report import Report, bar_with_interval, histogram
from diffcore.run import Run
from nemo_localize.activations import mean_activations
from nemo_localize.app.report_evidence import add_evidence, visible
from nemo_localize.app.words import MITIGATIONS, renamed, worded
from nemo_localize.detect import Detection
from nemo_localize.evaluate import Evaluation
from nemo_localize.files.results import FILE as RESULTS
from nemo_localize.files.results import read_results
from nemo_localize.first_step import FirstStep
from nemo_localize.results import CaptionResult, Results
from nemo_localize.statistics import Statistics
from nemo_localize.verification import Verification

VERIFICATION = "verification.json"
_SHOWN_CAPTIONS, _SHOWN_SEEDS, _CAPTION_LETTERS = 8, 5, 44
_TITLES = {
    "demo": "Memorised portraits: found, ablated, generated again",
    "audit": "Audit for memorised captions",
    "calibrate": "The threshold of this model",
    "detect": "Which captions are memorised",
    "localize": "Which neurons remember",
    "generate": "Before and after",
    "evaluate": "Before and after, measured",
    "verify": "Is the leak closed?",
}
_LIMITS = (
    "Ablating neurons is suppression, not erasure: an embedding that is optimised for a training image may find it "
    "again. Only verification with its adversary says more.",
    "Detection looks at the first step, an audit also at images of the most suspicious captions: what a model copies "
    "late, or from rare seeds only, may be missed.",
    "z-scores may find a style of caption instead of a memory; captions of the same style that were never trained on "
    "belong among the ordinary captions.",
)


def save_detection(run: Run, found: Sequence[Detection], tau: float) -> dict[str, Any]:
    """Keeps what detection found for the report, and the ranked captions as a table; returns the summary."""
    ranked = sorted((one for one in found if one.error is None), key=lambda one: -one.level)
    table = [{"caption": one.prompt, "consistency": one.level, "memorised": one.level > tau} for one in ranked]
    run.save("detection", {}, rows=table, tau=tau)
    run.table("captions", table)
    errors = len(found) - len(ranked)
    memorised = sum(row["memorised"] for row in table)
    return {"captions": len(found), "memorised": memorised, "errors": errors, "tau": tau}


def save_localization(
    run: Run, results: Results, tau: float, step: FirstStep, statistics: Statistics
) -> dict[str, Any]:
    """Keeps what localization found for the report: the ranking, and how the neurons stand out; returns the summary."""
    save_detection(run, [Detection(r.prompt, r.consistency, error=r.error) for r in results.distinct()], tau)
    return {**save_neurons(run, results, step, statistics), "tau": tau}


def save_neurons(run: Run, results: Results, step: FirstStep, statistics: Statistics) -> dict[str, Any]:
    """Keeps how the found neurons stand out for the report; returns the summary of the results."""
    sites, z = step.sites, _z_scores(results, step, statistics)
    found = [z[row, sorted(sites.numbers(r.refined))] for row, r in enumerate(localized(results)) if r.refined]
    run.save(
        "neurons",
        {"z": z.abs().flatten(), "found": torch.cat([*found, z.new_zeros(0)]).abs()},
        modules=[site.module for site in sites.sites],
        widths=list(sites.widths),
    )
    return results.summary()


def localized(results: Results) -> list[CaptionResult]:
    """Returns the localized captions, each once."""
    return [r for r in results.distinct() if r.status == "localized"]


def _z_scores(results: Results, step: FirstStep, statistics: Statistics) -> Float[Tensor, "localized neurons"]:
    """Returns the z-scores of the localized captions' neurons."""
    prompts = [r.prompt for r in localized(results)]
    if not prompts:
        return torch.zeros(0, step.sites.num_neurons, dtype=torch.float64)
    states = step.encoder(prompts)["encoder_hidden_states"]
    return statistics.z_scores(mean_activations(step.model.backbone, step.sites, states))


def save_gallery(
    run: Run,
    prompts: Sequence[str],
    images: Mapping[str, Float[Tensor, "prompts seeds c height width"]],
    seeds: Sequence[int],
    originals: Mapping[str, Float[Tensor, "_ c height width"]] | None = None,
) -> None:
    """Keeps for the report some images of each mitigation, and their training images, where they are known."""
    kept = {mitigation: own[:_SHOWN_CAPTIONS, :_SHOWN_SEEDS] for mitigation, own in images.items()}
    shown = list(prompts[:_SHOWN_CAPTIONS])
    known = {
        f"original-{place}": originals[prompt][: min(_SHOWN_SEEDS, len(seeds))]
        for place, prompt in enumerate(shown)
        if originals and prompt in originals
    }
    run.save("gallery", {**kept, **known}, prompts=shown, mitigations=list(kept), seeds=list(seeds[:_SHOWN_SEEDS]))


def save_evaluation(run: Run, measured: Evaluation) -> None:
    """Keeps what was measured on images for the report."""
    told = ["Medians over captions ± median absolute deviations", f"Likeness: {measured.source}", *measured.notes]
    run.keep_table("evaluation", measured.rows(), " ".join(f"{text[:1].upper()}{text[1:]}." for text in told))


def save_verification(run: Run, verification: Verification) -> None:
    """Keeps the checks for the report; `tables/verification-full.csv` has the columns that do not fit on a page."""
    rows = verification.rows()
    run.table("verification-full", rows)
    short = ("prompt", "verdict", "similarity", "residual_consistency", "worst")
    told = [{name: row.get(name) for name in short} for row in rows]
    caption = (
        "Worst caption first, then the controls, which were never memorised. Closest image: how alike the edited "
        f"model's image that is most like the {verification.captions[0].target} is to it, beside what it came from. "
        f"Measured in {verification.source}."
    )
    run.keep_table("verification", told, caption)


def write_page(run: Run) -> Path:
    """Writes `report.html` and its figures from the parts of a run, whichever there are."""
    verb = renamed(str(run.record["command"]).split()[-1])
    report = Report(_TITLES.get(verb, "nemo-localize"), run)
    if run.finished:
        report.answer(_answer(verb, renamed(run.result)))
    if run.has("evidence"):
        add_evidence(report, run)
    _add_gallery(report, run)
    for name in ("verification", "proof"):  # as an earlier version called it
        report.kept_table(name, "Verification", partial(worded, name))
    report.kept_table("evaluation", "Measured", partial(worded, "evaluation"))
    report.kept_table("quality", "What it costs elsewhere", partial(worded, "quality"))
    report.kept_table("sets", "One set for all captions", partial(worded, "sets"))
    report.kept_table("classes", "Detection", partial(worded, "classes"))
    _add_detection(report, run)
    _add_localization(report, run)
    if run.finished and verb == "calibrate":
        _add_calibration(report, run.result)
    report.section("What may not be concluded").points(*_LIMITS)
    return report.save()


def _answer(verb: str, result: Mapping[str, Any]) -> str:
    if "answer" in result:
        return str(result["answer"])
    if verb == "calibrate":
        return (
            f"The threshold is {result['tau']:.3f} ({_rule(result['rule'])} of {result['num_prompts']} captions"
            f"{_within(result.get('interval'))}); {result['false_alarm_rate']:.1%} of {result['num_checked']} others "
            "lie above it."
        )
    if verb == "detect":
        return f"{result['memorised']} of {result['captions']} captions are above the threshold of {result['tau']:.3f}."
    if verb == "localize":
        counts, size = result["counts"], result["refined_neurons"]
        known = counts["localized"] + counts["not_localized"]
        neurons = f", by {size['median']:g} neuron{'s' * (size['median'] != 1)} in the median" if size else ""
        return f"{known} of {result['num_distinct']} captions are memorised; {counts['localized']} localized{neurons}."
    if verb == "evaluate":
        return _evaluated(result["table"])
    if verb == "verify":
        reasons = f" ({'; '.join(result['reasons'])})" if result["reasons"] else ""
        return f"The verdict is {result['verdict']}{reasons}."
    if verb == "generate":
        mitigations = len(result["mitigations"])
        counted = ((result["captions"], "caption"), (result["images"], "image"), (mitigations, "mitigation"))
        captions, images, remedies = (f"{count} {word}{'' if count == 1 else 's'}" for count, word in counted)
        return f"{captions}, {images} of each, with {remedies} side by side."
    return ""


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns how alike a caption's seeds are before and after; empty where that was not measured."""
    every = {row["mitigation"]: row for row in rows if row["captions"] == "all"}
    measure = next((name for name in every["none"] if name.startswith("D_") and not name.endswith("mad")), None)
    if measure is None or "neurons" not in every:
        return ""
    before, after = every["none"][measure], every["neurons"][measure]
    return (
        f"Images of one caption are {before:.3f} alike from seed to seed, and {after:.3f} with the found neurons "
        f"ablated (medians over {every['none']['n']} captions)."
    )


def _rule(rule: str) -> str:
    return rule.replace("mean + sd", "mean plus standard deviation")


def _within(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"; 95 % interval {interval[0]:.3f} to {interval[1]:.3f}"


def _add_gallery(report: Report, run: Run) -> None:
    if not run.has("gallery"):
        return
    gallery = run.load("gallery")
    fields = renamed(gallery.fields)
    prompts, mitigations, seeds = (fields[name] for name in ("prompts", "mitigations", "seeds"))
    report.section("Before and after")
    for place, prompt in enumerate(prompts):
        original = gallery.tensors.get(f"original-{place}")
        rows = torch.cat([visible(gallery.tensors[mitigation][place]) for mitigation in mitigations])
        labels = [MITIGATIONS.get(str(mitigation), str(mitigation)) for mitigation in mitigations]
        if original is not None:
            filler = torch.ones(len(seeds) - len(original), *original.shape[1:])
            rows, labels = torch.cat([original, filler, rows]), ["training image", *labels]
        report.images(
            rows,
            f"“{prompt}”: each column starts from the same noise, seeds {seeds[0]} to {seeds[-1]}.",
            columns=len(seeds),
            row_labels=labels,
        )


def _add_detection(report: Report, run: Run) -> None:
    if not run.has("detection"):
        return
    part = run.load("detection")
    rows, tau = part.fields["rows"], part.fields["tau"]
    report.section("Captions, most consistent first")
    figure = histogram(
        {f"{len(rows)} captions": [row["consistency"] for row in rows]},
        x_label="largest likeness of two seeds' first steps",
        bins=min(40, max(len(rows) // 2, 10)),
        threshold=tau,
        threshold_label=f"threshold {tau:.3f}",
    )
    report.plot(
        "consistency",
        figure,
        f"How alike first steps are, {len(rows)} captions; those right of the threshold count as memorised.",
    )
    report.table(worded("captions", rows), "All captions; the table is also in tables/captions.csv.")


def _add_localization(report: Report, run: Run) -> None:
    if not (run.folder / RESULTS).exists():
        return
    results = read_results(run.folder / RESULTS)
    found = localized(results)
    report.section("Neurons")
    shown = [_row(r) for r in results.distinct() if r.status not in ("not_memorised", "undecided")]
    report.table(
        shown,
        "Memorised captions, and the neurons that were found for each. Before and after: the largest likeness of two "
        "seeds' first steps, without and with these neurons ablated. Which neurons they are stands in results.jsonl.",
    )
    if not found or not run.has("neurons"):
        return
    part = run.load("neurons")
    counts = Counter(name for r in found if r.refined for name, _ in r.refined)
    modules = part.fields["modules"]
    figure = bar_with_interval(
        [_short(module) for module in modules],
        [float(counts[module]) for module in modules],
        x_label="neurons found, over captions",
    )
    total = sum(part.fields["widths"])
    report.plot("layers", figure, f"Neurons in each layer, {len(found)} captions; {total:,} were searched.")
    figure = histogram(
        {"all neurons": part.tensors["z"].numpy(), "found neurons": part.tensors["found"].numpy()},
        x_label="how far a neuron stands out for its caption, in standard deviations",
    )
    report.plot("z-scores", figure, f"How far neurons stand out from what is usual, {len(found)} captions.")


def _add_calibration(report: Report, result: Mapping[str, Any]) -> None:
    report.section("What ordinary captions reach")
    report.table(
        [
            {"share of ordinary captions": f"{float(q):.0%}", "first steps no more alike than": value}
            for q, value in result["quantiles"].items()
        ]
    )


def _row(result: CaptionResult) -> dict[str, Any]:
    refined = result.refined
    return {
        "caption": _cut(result.prompt),
        "status": result.status.replace("_", " "),
        "before": result.max_consistency,
        "candidates": len(result.initial),
        "neurons": None if refined is None else len(refined),
        "after": result.residual_consistency,
    }


def _short(module: str) -> str:
    """Returns a layer's name without what all layers have in common."""
    short = re.sub(r"_blocks?|\.attentions|\.transformer_blocks\.0|\.attn2|\.to_v", "", module)
    return short.replace(".", " ", 1)


def _cut(text: str) -> str:
    return text if len(text) <= _CAPTION_LETTERS else text[: _CAPTION_LETTERS - 1] + "…"
