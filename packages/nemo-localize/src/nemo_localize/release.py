"""The whole audit of a model before its release: which captions leak, an edit that stops them, and whether it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffcore.jsonfile import write_json
from diffcore.run import Run
from nemo_localize.calibration import Calibration, calibrate
from nemo_localize.confirm import confirm
from nemo_localize.evaluate import Judges, evaluate
from nemo_localize.export import apply as write_edit
from nemo_localize.export import checkpoint_in
from nemo_localize.first_step import FirstStep
from nemo_localize.generate import generate
from nemo_localize.global_edit import minimal_set, within_budget
from nemo_localize.likeness import likeness
from nemo_localize.localization import localize
from nemo_localize.neuron_files import by_caption
from nemo_localize.neurons import NeuronSet
from nemo_localize.page import save_gallery, save_localization, save_proof, save_table, write_page
from nemo_localize.pictures import Drawing, shows_latents
from nemo_localize.prove import prove
from nemo_localize.results import Results
from nemo_localize.settings import Method, SearchSettings
from nemo_localize.statistics import Statistics, collect_statistics, merged

if TYPE_CHECKING:
    from lightning.fabric import Fabric

_WAYS: tuple[Method, ...] = ("none", "neurons", "random-neurons")
_DAMAGE_CAPTIONS, _CONTROLS = 48, 4


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

    The run folder ends up with the statistics, the threshold, `results.jsonl`, `neurons.json`, the edited checkpoint
    as `apply` writes it, pictures, tables and the proof.

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
    tau = calibration.tau
    results = localize(
        step, audit.prompts, tau=tau, statistics=statistics, settings=audit.search, run=run, fabric=fabric
    )
    summary = save_localization(run, results, tau, step, statistics)
    memorised = [r.prompt for r in results.distinct() if r.status in ("localised", "not_localised")]
    failed = summary["counts"]["error"]
    found = {"captions": len(results.distinct()), "memorised": len(memorised), "failed": failed, "tau": tau}
    found["false_alarm_rate"] = calibration.false_alarm_rate
    if not memorised:
        answer = f"None of {found['captions']} captions is memorised (tau {tau:.3f})."
        return found | {"verdict": "none memorised", "closed": not failed, "answer": answer}
    if not summary["counts"]["localised"]:
        answer = f"{len(memorised)} of {found['captions']} captions are memorised, and no neurons were found for any."
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
    counts = proof.summary()
    answer = (
        f"{len(memorised)} of {found['captions']} captions are memorised. With {len(neurons)} neurons off the proof is "
        f"{proof.verdict}: {counts['closed']} closed, {counts['open']} open, {counts['inconclusive']} undecided."
    )
    return (
        found
        | chosen
        | {"verdict": proof.verdict, "closed": proof.exit_code == 0 and not failed, "answer": answer}
        | {"proof": counts}
    )


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
        save_table(run, "sets", common.rows(), "Sets for all captions together; damage is what ordinary captions feel.")
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
    save_table(run, "evaluation", measured.rows(), f"Medians over captions. {' '.join(measured.notes)}")
    return {"evaluation": measured.rows(), "measured_in": measured.source}
