"""The commands that judge, with an exit code for CI: prove, audit."""

import sys
from pathlib import Path

from diffcore.cli import show
from nemo_localize.app.inputs import digest_of, load_judges, load_originals, read_calibration, read_captions
from nemo_localize.app.options import Files, Judging, Strict, Tau, UnchangedModel
from nemo_localize.app.work import Work, conclude
from nemo_localize.settings import DrawSettings, SearchSettings, StepSettings

_CONTROLS = 8


def prove(
    model: str,
    captions: Path,
    *,
    neurons: Path,
    controls: Path,
    calibration: Path | None = None,
    tau: Tau = None,
    judging: Judging = Judging(),
    step: StepSettings = StepSettings(),
    drawing: DrawSettings = DrawSettings(),
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Prove that a leak is closed: held-out seeds, paraphrases, dropped tokens, and an adversary that tries its best.

    Shortest form: nemo-localize prove MODEL CAPTIONS --neurons RUN --controls CAPTIONS --calibration RUN

    Exit code 1 means open or inconclusive. An adversary that cannot reopen the known leak of the unedited model, or
    that opens a caption which was never memorised, proves nothing: that is inconclusive.

    Args:
        model: The unedited model.
        captions: Memorised captions.
        neurons: As in apply.
        controls: Captions that were never memorised; the first eight are taken, at least three are needed.
        calibration: Run of calibrate, or its calibration.json.
    """
    from diffcore.io.jsonfile import write_json
    from nemo_localize.app.report import save_proof
    from nemo_localize.calibrate import threshold
    from nemo_localize.files.neurons import read_neurons
    from nemo_localize.verify import prove as find_proof

    found, harmless = read_captions(captions, strict), read_captions(controls, strict)
    innocent = harmless.distinct[:_CONTROLS]
    loaded = work.load(model)
    chosen, separate = read_neurons(neurons, backbone=loaded.backbone)
    first = work.first_step(loaded, step)
    level = threshold(first, read_calibration(calibration), tau=tau)
    judges, originals = load_judges(judging, work), load_originals(judging, found)
    if work.output.dry_run:
        folder = work.folder("prove", loaded)
        return work.plan(captions=len(found.distinct), controls=len(innocent), writes=folder)
    options = {"model": model, "neurons": neurons, "controls": controls, "calibration": calibration, "tau": tau}
    options |= {"judging": judging, "step": step, "drawing": drawing}
    known = {"neurons": digest_of(chosen, separate), "tau": repr(level)}
    fabric = work.fabric()
    with work.open("prove", loaded, [found, harmless], options, **known) as run:
        if not run.finished:
            proof = find_proof(
                first,
                chosen,
                found.distinct,
                innocent,
                tau=level,
                originals=originals,
                copies=judges.copies,
                drawing=work.drawing(drawing),
                run=run,
                fabric=fabric,
            )
            if run.leading:
                write_json(run.folder / "proof.json", proof.to_json())
                save_proof(run, proof)
                conclude(run, proof.summary())
        show(run, work.output)
        return 0 if not run.leading or run.result["verdict"] == "closed" else 1


def audit(
    model: UnchangedModel,
    captions: Path,
    *,
    references: Files,
    ordinary: Path | None = None,
    quantile: float | None = 0.99,
    judging: Judging = Judging(),
    step: StepSettings = StepSettings(),
    search: SearchSettings = SearchSettings(),
    drawing: DrawSettings = DrawSettings(),
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Do all of it: find what is memorised, edit the model, measure, prove. The exit code is for CI.

    Shortest form: nemo-localize audit MODEL CAPTIONS --references ORDINARY

    What first steps leave open is drawn from several seeds, and the pictures decide: memorised, undecided or clean.

    Exit code 0 means that nothing is memorised or undecided, or that the leak is proven closed in the edited model,
    which lies in RUN/model; 1 that it is open, that a caption is undecided or that the proof is inconclusive.

    Args:
        captions: What to audit; captions of the training set, say.
        references: Files of captions that are not memorised, of ordinary style and of the audited captions' style.
        ordinary: Captions that are not memorised, for the threshold and as controls; by default the first reference.
        quantile: Of ordinary captions that sets the threshold.
    """
    from diffcore.models import resolve
    from nemo_localize.audit import Audit, audit_release
    from nemo_localize.files.export import how_to_load

    found = read_captions(captions, strict)
    sets = [read_captions(path, strict) for path in references]
    usual = sets[0] if ordinary is None else read_captions(ordinary, strict)
    loaded = work.load(model)
    if work.output.dry_run:
        folder = work.folder("audit", loaded)
        return work.plan(captions=len(found.distinct), references=sum(map(len, sets)), writes=folder)
    what = Audit(
        step=work.first_step(loaded, step),
        source=resolve(model, download=work.loading.download),
        prompts=found.prompts,
        references={part.path.name: part.prompts for part in sets},
        ordinary=usual.distinct,
        seeds=drawing.seeds,
        drawing=work.drawing(drawing),
        search=search,
        quantile=quantile,
        judges=load_judges(judging, work),
        originals=load_originals(judging, found),
    )
    options = {"model": model, "references": list(references), "ordinary": ordinary, "quantile": quantile}
    options |= {"judging": judging, "step": step, "search": search, "drawing": drawing}
    fabric = work.fabric()
    with work.open("audit", loaded, [found, usual, *sets], options) as run:
        if not run.finished:
            result = audit_release(what, run, fabric)
            if run.leading:
                conclude(run, result)
        show(run, work.output)
        if run.leading and (note := how_to_load(run.folder)):
            print(note, file=sys.stderr)
        return 0 if not run.leading or run.result["closed"] else 1
