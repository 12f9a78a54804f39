"""The whole audit of a model before its release: which captions leak, an edit that stops them, and whether it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffcore.io.jsonfile import write_json
from diffcore.run import Run
from nemo_localize.app.report import save_evaluation, save_gallery, save_neurons, save_proof, save_table, write_page
from nemo_localize.app.report_evidence import save_evidence
from nemo_localize.calibrate import Calibration, calibrate
from nemo_localize.confirm import confirm
from nemo_localize.evaluate import Judges, evaluate
from nemo_localize.evidence import Evidence, collect_evidence
from nemo_localize.files.export import apply as write_edit
from nemo_localize.files.export import checkpoint_in
from nemo_localize.files.neurons import RESULTS, by_caption
from nemo_localize.first_step import FirstStep
from nemo_localize.generate import generate
from nemo_localize.images import Drawing, seen, shows_latents
from nemo_localize.likeness import likeness
from nemo_localize.localize import localize
from nemo_localize.minimal_set import minimal_set, within_budget
from nemo_localize.neurons import NeuronSet
from nemo_localize.results import Results
from nemo_localize.second_look import FIRST_SEEDS, quick_latents
from nemo_localize.settings import Method, SearchSettings
from nemo_localize.statistics import Statistics, collect_statistics, merged
from nemo_localize.verify import prove

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_WAYS: tuple[Method, ...] = ("none", "neurons", "random-neurons")
_DAMAGE_CAPTIONS, _CONTROLS = 48, 4
_SHOWN, _SHOWN_CLEAN = 12, 4  # captions whose pictures the report shows, where some are suspicious and where none is


@dataclass(frozen=True)
class Audit:
    """What an audit needs.

    Attributes:
        step: The model, and the step and seeds of localisation.
        source: The model's files, which the edit is written from.
        prompts: Captions to audit.
        references: Ordinary captions and others of the same style, by name: what neurons usually do.
        ordinary: Captions that are not memorised: they set the threshold, and must not suffer.
        seeds: Of the pictures.
        drawing: How they are drawn.
        search: Settings.
        quantile: Of ordinary captions that sets the threshold; None is mean plus standard deviation.
        judges: Networks that look at pictures.
        originals: Training images by caption, where they are known.
    """

    step: FirstStep
    source: Path
    prompts: Sequence[str]
    references: Mapping[str, Sequence[str]]
    ordinary: Sequence[str]
    seeds: Sequence[int]
    drawing: Drawing
    search: SearchSettings = field(default_factory=SearchSettings)
    quantile: float | None = None
    judges: Judges = field(default_factory=Judges)
    originals: Mapping[str, Tensor] = field(default_factory=dict)


def audit_release(audit: Audit, run: Run, fabric: "Fabric | None" = None) -> dict[str, Any]:
    """Finds what is memorised, edits the model, and proves; returns the summary, with `closed` as its verdict.

    `closed` says that nothing is memorised, undecided or failed, or that the leak is proven closed and nothing else is
    undecided or failed. The run folder ends up with the statistics, the threshold, `results.jsonl`, `neurons.json`, the
    edited checkpoint as `apply` writes it, pictures, tables and the proof.

    Args:
        audit: What and how.
        run: Where everything is kept; interrupted, it goes on where it stopped.
        fabric: Processes that share localisation and proof.

    Raises:
        UserError: What was given does not fit together.
        MachineError: Memory or disk do not suffice.
    """
    step = audit.step
    statistics, calibration = _usual(audit, run, fabric)
    evidence = _looked(audit, calibration, run, fabric)
    memorised, tau = evidence.of("memorised"), evidence.suppressed_below
    searched = localize(step, memorised, tau=tau, statistics=statistics, settings=audit.search, run=run, fabric=fabric)
    by_prompt = evidence.completed({result.prompt: result for result in searched})
    results = Results(tuple(by_prompt[prompt] for prompt in audit.prompts))
    if run.leading:
        results.write_jsonl(run.folder / RESULTS)
    counts = save_neurons(run, results, step, statistics)["counts"]
    found = _counted(evidence) | {"failed": counts["error"]}
    unsettled = found["undecided"] + found["failed"] > 0
    if not memorised:
        verdict = "undecided" if unsettled else "none memorised"
        answer = _none_certain(found, telling=evidence.found.usual.telling)
        return found | {"verdict": verdict, "closed": not unsettled, "answer": answer}
    answer = f"{len(memorised)} of {found['captions']} captions are memorised"
    others = f" {found['undecided']} more are undecided." if found["undecided"] else ""
    if not counts["localised"]:
        answer += f", and no neurons were found for any.{others}"
        return found | {"verdict": "open", "closed": False, "answer": answer}
    neurons, chosen = _edit(audit, run, results, memorised, tau)
    found |= _measured(audit, run, memorised, neurons)
    controls = [text for text in dict.fromkeys(audit.ordinary) if text not in set(audit.prompts)][:_CONTROLS]
    proof = prove(
        step,
        neurons,
        memorised,
        controls,
        tau=tau,
        originals=audit.originals,
        copies=audit.judges.copies,
        drawing=audit.drawing,
        run=run,
        fabric=fabric,
    )
    write_json(run.folder / "proof.json", proof.to_json())
    save_proof(run, proof)
    summary = proof.summary()
    answer += (
        f". With {len(neurons)} neurons off the proof is {proof.verdict}: {summary['closed']} closed, "
        f"{summary['open']} open, {summary['inconclusive']} inconclusive.{others}"
    )
    closed = proof.exit_code == 0 and not unsettled
    return found | chosen | {"verdict": proof.verdict, "closed": closed, "answer": answer, "proof": summary}


def _looked(audit: Audit, calibration: Calibration, run: Run, fabric: "Fabric | None") -> Evidence:
    """Returns the evidence on each caption, and keeps it for the report with the pictures of those that have most."""
    model = audit.step.model
    judge = likeness(audit.judges.copies, of_latents=shows_latents(model))
    evidence = collect_evidence(
        audit.step,
        audit.prompts,
        audit.ordinary,
        calibration,
        audit.drawing,
        judge,
        run,
        originals=audit.originals,
        fabric=fabric,
    )
    if run.leading:
        suspicious = len(evidence.of("memorised") + evidence.of("undecided"))
        prompts = list(evidence.verdicts)[: max(_SHOWN_CLEAN, min(suspicious, _SHOWN))]
        latents = quick_latents(model, prompts, FIRST_SEEDS, audit.drawing) if prompts else ()
        shown = [seen(model, own).cpu() for own in latents]
        save_evidence(run, evidence, dict(zip(prompts, shown, strict=True)), audit.originals)
        write_page(run)
    return evidence


def _counted(evidence: Evidence) -> dict[str, Any]:
    """Returns the summary of what was looked at and found."""
    calibration = evidence.calibration
    return {
        "captions": len(evidence.first),
        "memorised": len(evidence.of("memorised")),
        "undecided": len(evidence.of("undecided")),
        "drawn": len(evidence.found.looks),
        "tau": calibration.tau,
        "tau_interval": calibration.interval,
        "false_alarm_rate": calibration.false_alarm_rate,
    }


def _none_certain(found: Mapping[str, Any], *, telling: bool) -> str:
    """Returns the answer of an audit that found no certain memory."""
    count = found["captions"]
    looked = f"the first steps of all were compared, and pictures of the {found['drawn']} most consistent ones"
    if found["drawn"] == count:
        looked = "the first steps and the pictures of all were compared"
    if found["undecided"]:
        why = "seeds draw pictures that are alike, but not most of them"
        if not telling:
            why = "seeds draw pictures that are alike, and so they do for ordinary captions of this model"
        return f"Undecided for {found['undecided']} of {count} captions: {why}. No other is memorised: {looked}."
    if found["failed"]:
        return f"{found['failed']} of {count} captions failed. No other is memorised: {looked}."
    return f"None of {count} captions is memorised: {looked}."


def _usual(audit: Audit, run: Run, fabric: "Fabric | None") -> tuple[Statistics, Calibration]:
    """Returns how active neurons usually are, and the threshold."""
    up = any(site.module.startswith("up_blocks") for site in audit.step.sites.sites)
    statistics = merged(
        [
            collect_statistics(audit.step.model, prompts, source=name, up=up)
            for name, prompts in audit.references.items()
        ]
    )
    calibration = calibrate(audit.step, audit.ordinary, quantile=audit.quantile, run=run, fabric=fabric)
    if run.leading:
        statistics.save(run.folder / "statistics.safetensors")
        calibration.save(run.folder / "calibration.json")
    return statistics, calibration


def _edit(
    audit: Audit, run: Run, results: Results, memorised: Sequence[str], tau: float
) -> tuple[NeuronSet, dict[str, Any]]:
    """Returns a small set for all captions that pictures agree with, and writes the edited checkpoint."""
    spared = audit.ordinary[:_DAMAGE_CAPTIONS]
    common = minimal_set(audit.step, results, spared, tau=tau)
    judge = likeness(audit.judges.copies, of_latents=shows_latents(audit.step.model))
    neurons, stubborn = confirm(
        audit.step.model,
        results,
        common.neurons,
        memorised,
        audit.seeds,
        audit.drawing,
        run,
        judge=judge,
        originals=audit.originals,
        affordable=within_budget(audit.step, spared),
    )
    captions = {prompt: found.to_json() for prompt, found in by_caption(results).items()}
    if run.leading:
        write_json(
            run.folder / "neurons.json",
            {"neurons": neurons.to_json(), "captions": captions, "minimal_set": common.to_json()},
        )
        save_table(
            run,
            "sets",
            common.rows(),
            "One set of neurons for all captions. Change: one minus the likeness of first steps of ordinary captions, "
            f"before and after; bearable up to {common.budget:g}.",
        )
        if checkpoint_in(run.folder) is None:
            write_edit(audit.source, neurons, run.folder, reasons=by_caption(results))
    return neurons, {
        "neurons": len(neurons),
        "neurons_of_minimal_set": len(common.neurons),
        "neurons_of_union": len(common.union.neurons),
        "damage": common.chosen.damage,
        "needed_all_candidates": stubborn,
    }


def _measured(audit: Audit, run: Run, memorised: Sequence[str], neurons: NeuronSet) -> dict[str, Any]:
    """Draws before and after, and measures; what is drawn with the confirmed set is kept apart from what was tried."""
    model = audit.step.model
    pictures = generate(model, memorised, _WAYS, audit.seeds, audit.drawing, run, neurons=neurons, repeat=len(neurons))
    save_gallery(run, memorised, pictures, audit.seeds, audit.originals)
    if run.leading:
        write_page(run)
    measured = evaluate(
        memorised,
        pictures,
        originals=audit.originals,
        judges=audit.judges,
        of_latents=shows_latents(model),
    )
    save_evaluation(run, measured)
    return {"evaluation": measured.rows(), "measured_in": measured.source}
