"""The report of a run, made from what its folder holds, whichever of it there is: it can be made again at any time."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.metrics import resize
from diffcore.report import Report, bar_with_interval, histogram
from diffcore.run import Run
from nemo_localize.activations import mean_activations
from nemo_localize.evidence import Evidence
from nemo_localize.first_step import FirstStep
from nemo_localize.neuron_files import RESULTS
from nemo_localize.proof import Proof
from nemo_localize.results import CaptionResult, Results
from nemo_localize.statistics import Statistics

_SHOWN_CAPTIONS, _SHOWN_SEEDS, _CAPTION_LETTERS = 8, 6, 44
_WAYS = {
    "none": "before",
    "neurons": "found neurons off",
    "random-neurons": "as many random neurons off",
    "embedding-adjustment": "embedding adjusted",
    "attention-scaling": "attention scaled",
    "random-tokens-1": "1 random token",
    "random-tokens-4": "4 random tokens",
    "random-tokens-10": "10 random tokens",
}
_TITLES = {
    "demo": "Memorised portraits: found, switched off, looked at again",
    "audit": "Audit for memorised captions",
    "calibrate": "The threshold of this model",
    "detect": "Which captions are memorised",
    "localize": "Which neurons remember",
    "generate": "Before and after",
    "evaluate": "Before and after, measured",
    "prove": "Is the leak closed?",
}
_LIMITS = (
    "Switching neurons off is suppression, not erasure: an embedding that is optimised for a training image may find "
    "it again. Only a proof with its adversarial audit says more.",
    "Detection looks at the first step: what a model copies late, or from rare seeds only, is missed.",
    "z-scores may find a style of caption instead of a memory; captions of the same style that were never trained on "
    "belong among the reference captions.",
)


def save_detection(run: Run, rows: Sequence[Mapping[str, Any]], tau: float) -> dict[str, Any]:
    """Keeps what detection found for the report, and the ranked captions as a table; returns the summary."""
    ranked = sorted((row for row in rows if row["error"] is None), key=lambda row: -max(row["consistency"]))
    table = [
        {"caption": row["prompt"], "consistency": max(row["consistency"]), "memorised": max(row["consistency"]) > tau}
        for row in ranked
    ]
    run.save("detection", {}, rows=table, tau=tau)
    run.table("captions", table)
    errors = len(rows) - len(ranked)
    memorised = sum(row["memorised"] for row in table)
    return {"captions": len(rows), "memorised": memorised, "errors": errors, "tau": tau}


def save_localization(
    run: Run, results: Results, tau: float, step: FirstStep, statistics: Statistics
) -> dict[str, Any]:
    """Keeps what localisation found for the report: the ranking, and how the neurons stand out; returns the summary."""
    rows = [{"prompt": r.prompt, "consistency": r.consistency, "error": r.error} for r in results.distinct()]
    save_detection(run, rows, tau)
    return {**save_neurons(run, results, step, statistics), "tau": tau}


def save_neurons(run: Run, results: Results, step: FirstStep, statistics: Statistics) -> dict[str, Any]:
    """Keeps how the found neurons stand out for the report; returns the summary of the results."""
    sites, z = step.sites, _z_scores(results, step, statistics)
    found = [z[row, sorted(sites.numbers(r.refined))] for row, r in enumerate(localised(results)) if r.refined]
    run.save(
        "neurons",
        {"z": z.abs().flatten(), "found": torch.cat([*found, z.new_zeros(0)]).abs()},
        modules=[site.module for site in sites.sites],
        widths=list(sites.widths),
    )
    return results.summary()


def save_evidence(
    run: Run,
    evidence: Evidence,
    pictures: Mapping[str, Float[Tensor, "seeds c height width"]],
    originals: Mapping[str, Float[Tensor, "_ c height width"]] | None = None,
) -> None:
    """Keeps for the report how an audit judged each caption, and the pictures of those that it has most evidence of.

    Args:
        run: Of the audit.
        evidence: All of it.
        pictures: Of the captions to show, in their order.
        originals: Training images by caption, where they are known.
    """
    looks = {look.prompt: look for look in evidence.found.looks}
    rows = [
        {
            "number": number,
            "caption": prompt,
            "verdict": verdict,
            "likeness": looks[prompt].typical if prompt in looks and looks[prompt].error is None else None,
            "upper tenth": looks[prompt].upper if prompt in looks and looks[prompt].error is None else None,
            "consistency": evidence.consistency[prompt],
        }
        for number, (prompt, verdict) in enumerate(evidence.verdicts.items(), 1)
    ]
    known = {
        f"original-{place}": originals[prompt][:1]
        for place, prompt in enumerate(pictures)
        if originals and prompt in originals
    }
    usual, calibration = evidence.found.usual, evidence.calibration
    run.save(
        "evidence",
        {**{f"seeds-{place}": images for place, images in enumerate(pictures.values())}, **known},
        rows=rows,
        shown=list(pictures),
        ordinary=[look.typical for look in usual.looks],
        memorised_above=usual.memorised_above,
        undecided_above=usual.undecided_above,
        telling=usual.telling,
        tau=calibration.tau,
        interval=calibration.interval,
        references=calibration.num_prompts,
        source=evidence.source,
    )
    run.table("captions", rows)


def localised(results: Results) -> list[CaptionResult]:
    """Returns the localised captions, each once."""
    return [r for r in results.distinct() if r.status == "localised"]


def _z_scores(results: Results, step: FirstStep, statistics: Statistics) -> Float[Tensor, "localised neurons"]:
    """Returns the z-scores of the localised captions' neurons."""
    prompts = [r.prompt for r in localised(results)]
    if not prompts:
        return torch.zeros(0, step.sites.num_neurons, dtype=torch.float64)
    states = step.encoder(prompts)["encoder_hidden_states"]
    return statistics.z_scores(mean_activations(step.model.backbone, step.sites, states))


def save_gallery(
    run: Run,
    prompts: Sequence[str],
    pictures: Mapping[str, Float[Tensor, "prompts seeds c height width"]],
    seeds: Sequence[int],
    originals: Mapping[str, Float[Tensor, "_ c height width"]] | None = None,
) -> None:
    """Keeps for the report some pictures of each way, and the training images beside them, where they are known."""
    kept = {way: images[:_SHOWN_CAPTIONS, :_SHOWN_SEEDS] for way, images in pictures.items()}
    shown = list(prompts[:_SHOWN_CAPTIONS])
    known = {
        f"original-{place}": originals[prompt][: min(_SHOWN_SEEDS, len(seeds))]
        for place, prompt in enumerate(shown)
        if originals and prompt in originals
    }
    run.save("gallery", {**kept, **known}, prompts=shown, ways=list(kept), seeds=list(seeds[:_SHOWN_SEEDS]))


def save_table(run: Run, name: str, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
    """Keeps a table for the report: evaluation, proof, detection against classes."""
    run.save(f"table-{name}", {}, rows=[dict(row) for row in rows], caption=caption)
    run.table(name, rows)


def save_proof(run: Run, proof: Proof) -> None:
    """Keeps the proof for the report; `tables/proof-full.csv` has the columns that do not fit on a page."""
    short = ("prompt", "verdict", "similarity", "residual_consistency", "worst")
    rows = proof.rows()
    run.table("proof-full", rows)
    told = [{name.replace("_", " "): row.get(name) for name in short} for row in rows]
    save_table(run, "proof", told, f"Worst caption first. Likeness: {proof.source}.")


def write_page(run: Run) -> Path:
    """Writes `report.html` and its figures from what a run has."""
    verb = str(run.record["command"]).split()[-1]
    report = Report(_TITLES.get(verb, "nemo-localize"), run)
    if run.finished:
        report.answer(_answer(verb, run.result))
    elif _has(run, "gallery"):
        report.answer("This run goes on; type its command again if it was interrupted.")
    _add_evidence(report, run)
    _add_gallery(report, run)
    _add_table(report, run, "proof", "Proof")
    _add_table(report, run, "evaluation", "Measured")
    _add_table(report, run, "quality", "What it costs elsewhere")
    _add_table(report, run, "sets", "One set for all captions")
    _add_table(report, run, "classes", "Detection")
    _add_detection(report, run)
    _add_localization(report, run)
    if run.finished and verb == "calibrate":
        _add_calibration(report, run.result)
    report.section("What may not be concluded").points(*_LIMITS)
    return report.save(run.folder / "report.html")


def _answer(verb: str, result: Mapping[str, Any]) -> str:
    if "answer" in result:
        return str(result["answer"])
    if verb == "calibrate":
        return (
            f"tau = {result['tau']:.3f} ({result['rule']} of {result['num_prompts']} captions); "
            f"{result['false_alarm_rate']:.1%} of {result['num_checked']} others lie above it."
        )
    if verb == "detect":
        return f"{result['memorised']} of {result['captions']} captions are memorised (tau {result['tau']:.3f})."
    if verb == "localize":
        counts, size = result["counts"], result["refined_neurons"]
        known = counts["localised"] + counts["not_localised"]
        neurons = f", by {size['median']:g} neurons in the median" if size else ""
        return f"{known} of {result['num_distinct']} captions are memorised; {counts['localised']} localised{neurons}."
    if verb == "prove":
        reasons = f" ({'; '.join(result['reasons'])})" if result["reasons"] else ""
        return f"The proof is {result['verdict']}{reasons}."
    if verb == "generate":
        return f"{result['captions']} captions, {result['images']} images each, under {len(result['methods'])} ways."
    return ""


def _add_evidence(report: Report, run: Run) -> None:
    if not _has(run, "evidence"):
        return
    part = run.load("evidence")
    rows, told = part.fields["rows"], part.fields
    report.section("Captions, by evidence")
    pictures = [part.tensors[f"seeds-{place}"] for place in range(len(told["shown"]))]
    originals = [part.tensors.get(f"original-{place}") for place in range(len(pictures))]
    columns = [f"seed {number}" for number in range(1, len(pictures[0]) + 1)]
    if any(original is not None for original in originals):
        blank = torch.ones_like(pictures[0][:1])
        pictures = [
            torch.cat([own, _sized(original, own) if original is not None else blank])
            for own, original in zip(pictures, originals, strict=True)
        ]
        columns.append("training image")
    report.images(
        _visible(torch.cat(pictures)),
        "The captions of most evidence, numbered as in the table: what the model draws for each from other seeds, in "
        "few steps. Seeds of a memorised caption agree.",
        row_labels=[str(number) for number in range(1, len(pictures) + 1)],
        column_labels=columns,
    )
    report.table(
        [
            {
                "": row["number"],
                "caption": row["caption"],
                "verdict": row["verdict"],
                "pictures alike": row["likeness"],
                "a tenth of them": row["upper tenth"],
                "first steps alike": row["consistency"],
            }
            for row in rows
        ],
        _told(told),
    )


def _told(told: Mapping[str, Any]) -> str:
    """Returns what the columns of the captions mean, and what decides."""
    text = (
        "Pictures alike: what half of the pairs of seeds reach, or half of the seeds to the training image; beside it "
        f"what a tenth of them reach. Measured in {told['source']}. Memorised: the first is above "
        f"{told['memorised_above']:.3f}; undecided: the second is above {told['undecided_above']:.3f}. Both follow "
        f"from pictures of {len(told['ordinary'])} ordinary captions. "
    )
    if not told["telling"]:
        text += "Ordinary captions draw pictures that are as alike, so pictures do not tell memories here. "
    text += (
        "A dash: not drawn, since its first steps are ordinary. First steps alike: the largest likeness of two seeds"
    )
    tau = f"the threshold is {told['tau']:.3f}"
    if told["interval"] is not None:
        tau += f" (95 % interval {told['interval'][0]:.3f} to {told['interval'][1]:.3f})"
    return f"{text}; {tau}, from {told['references']} ordinary captions."


def _sized(images: Tensor, like: Tensor) -> Tensor:
    """Returns images in the size of others."""
    return resize(images, (like.shape[-2], like.shape[-1])).clamp(0, 1).to(like)


def _add_gallery(report: Report, run: Run) -> None:
    if not _has(run, "gallery"):
        return
    gallery = run.load("gallery")
    prompts, ways, seeds = (gallery.fields[name] for name in ("prompts", "ways", "seeds"))
    report.section("Before and after")
    for place, prompt in enumerate(prompts):
        original = gallery.tensors.get(f"original-{place}")
        rows = torch.cat([_visible(gallery.tensors[way][place]) for way in ways])
        labels = [_WAYS.get(str(way), str(way)) for way in ways]
        if original is not None:
            filler = torch.ones(len(seeds) - len(original), *original.shape[1:])
            rows, labels = torch.cat([original, filler, rows]), ["training image", *labels]
        report.images(
            rows,
            f"“{prompt}”: each column starts from the same noise, seeds {seeds[0]} to {seeds[-1]}.",
            columns=len(seeds),
            row_labels=labels,
        )


def _add_table(report: Report, run: Run, name: str, heading: str) -> None:
    if _has(run, f"table-{name}"):
        part = run.load(f"table-{name}")
        report.section(heading).table(part.fields["rows"], part.fields["caption"])


def _add_detection(report: Report, run: Run) -> None:
    if not _has(run, "detection"):
        return
    part = run.load("detection")
    rows, tau = part.fields["rows"], part.fields["tau"]
    report.section("Captions, most consistent first")
    figure = histogram(
        {f"{len(rows)} captions": [row["consistency"] for row in rows]},
        x_label="largest similarity of two seeds' first steps",
        bins=min(40, max(len(rows) // 2, 10)),
        threshold=tau,
        threshold_label=f"tau = {tau:.3f}",
    )
    report.figure(run.figure("consistency", figure), f"Consistency of {len(rows)} captions; memorised right of tau.")
    report.table(rows, "All captions; the table is also in tables/captions.csv")


def _add_localization(report: Report, run: Run) -> None:
    if not (run.folder / RESULTS).exists():
        return
    results = Results.read_jsonl(run.folder / RESULTS)
    found = localised(results)
    report.section("Neurons")
    report.table([_row(r) for r in results.distinct() if r.status != "not_memorised"], "Memorised captions")
    if not found or not _has(run, "neurons"):
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
    report.figure(
        run.figure("layers", figure), f"Neurons in each layer, {len(found)} captions; {total:,} were searched."
    )
    figure = histogram(
        {"all neurons": part.tensors["z"].numpy(), "found neurons": part.tensors["found"].numpy()},
        x_label="|z| of a neuron for its caption",
    )
    report.figure(run.figure("z-scores", figure), f"How far neurons stand out, {len(found)} captions; areas are equal.")


def _add_calibration(report: Report, result: Mapping[str, Any]) -> None:
    report.section("Quantiles of ordinary captions")
    report.table([{"quantile": q, "consistency": value} for q, value in result["quantiles"].items()])


def _visible(images: Tensor) -> Tensor:
    """Returns images as they are, and of latents the first three channels."""
    return images if images.shape[1] in (1, 3) else images[:, :3]


def _row(result: CaptionResult) -> dict[str, Any]:
    refined = result.refined
    return {
        "caption": _cut(result.prompt),
        "status": result.status.replace("_", " "),
        "consistency": result.max_consistency,
        "candidates": len(result.initial),
        "neurons": None if refined is None else len(refined),
        "score after": result.score_refined,
        "consistency after": result.residual_consistency,
        "which": "" if refined is None else _cut(", ".join(f"{_short(name)}[{i}]" for name, i in refined)),
    }


def _short(module: str) -> str:
    """Returns a layer's name without what all layers have in common."""
    short = re.sub(r"_blocks?|\.attentions|\.transformer_blocks\.0|\.attn2|\.to_v", "", module)
    return short.replace(".", " ", 1)


def _cut(text: str) -> str:
    return text if len(text) <= _CAPTION_LETTERS else text[: _CAPTION_LETTERS - 1] + "…"


def _has(run: Run, part: str) -> bool:
    return not run.missing([part])
