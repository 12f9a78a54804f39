"""The commands that judge, with an exit code for CI: verify, audit."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_localize.app.inputs import digest_of_neurons, load_judges, load_originals, read_calibration, read_captions
from nemo_localize.app.options import Files, ImageOptions, Judging, Search, Step, Strict, Tau, UnchangedModel
from nemo_localize.app.work import Work
from nemo_localize.settings import SearchSettings, StepSettings

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap

_CONTROLS = 8


def verify(
    model: str,
    captions: Path,
    *,
    neurons: Path,
    controls: Path,
    calibration: Path | None = None,
    tau: Tau = None,
    judging: Judging = Judging(),
    step: Step = StepSettings(),
    images: ImageOptions = ImageOptions(),
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Test whether a leak is closed: held-out seeds, paraphrases, dropped tokens, and an adversarial search.

    Shortest form: nemo-localize verify MODEL CAPTIONS --neurons RUN --controls CAPTIONS --calibration RUN

    Exit code 1 means open or inconclusive. The verdict is inconclusive where the search cannot reopen the known leak of
    the unedited model, or opens a caption that was never memorised.

    Args:
        model: The unedited model: pipeline folder, safetensors file, or zoo:NAME.
        captions: File of memorised captions.
        neurons: Run or file with neurons, as in export.
        controls: File of captions that were never memorised; the first eight are taken, at least three are needed.
        calibration: Run of calibrate, or its calibration.json.
    """
    from diffcore.io.jsonfile import write_json
    from nemo_localize.app.report import VERIFICATION, save_verification, write_page
    from nemo_localize.calibrate import threshold
    from nemo_localize.files.neurons import read_neurons
    from nemo_localize.verify import verify as test_edit

    found, harmless = read_captions(captions, strict), read_captions(controls, strict)
    innocent = harmless.distinct[:_CONTROLS]
    loaded = work.load(model)
    chosen, separate = read_neurons(neurons, backbone=loaded.backbone)
    first = work.first_step(loaded, step)
    level = threshold(first, read_calibration(calibration), tau=tau)
    judges, originals = load_judges(judging, work), load_originals(judging, found)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        verification = test_edit(
            first,
            chosen,
            found.distinct,
            innocent,
            tau=level,
            originals=originals,
            copies=judges.copies,
            settings=images.settings(work.computing.batch_size),
            map=map,
        )
        if run.leading:
            write_json(run.folder / VERIFICATION, verification.to_json())
            save_verification(run, verification)
        return verification.summary()

    options = {"model": model, "neurons": neurons, "controls": controls, "calibration": calibration, "tau": tau}
    options |= {"judging": judging, "step": step, "images": images}
    job = work.run_of(
        "verify", loaded, [found, harmless], options, neurons=digest_of_neurons(chosen, separate), tau=repr(level)
    )
    plan = {"captions": len(found.distinct), "controls": len(innocent)}
    return job(compute, plan=plan, report=write_page, passed=lambda result: result["verdict"] == "closed")


def audit(
    model: UnchangedModel,
    captions: Path,
    *,
    references: Files,
    ordinary: Path | None = None,
    quantile: float | None = 0.99,
    judging: Judging = Judging(),
    step: Step = StepSettings(),
    search: Search = SearchSettings(),
    images: ImageOptions = ImageOptions(),
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Audit a model: find memorised captions, edit the model, measure and verify the edit, with an exit code for CI.

    Shortest form: nemo-localize audit MODEL CAPTIONS --references ORDINARY

    Captions that first steps leave open are generated from several seeds; the images decide: memorised, undecided or
    clean.

    Exit code 0 means that nothing is memorised or undecided, or that every known leak was tested and found closed in
    the edited model, which lies in RUN/model; 1 that one is open, that a caption is undecided or that the tests are
    inconclusive.

    Args:
        captions: File of captions to audit, such as captions of the training set.
        references: Files of captions that are not memorised, of ordinary style and of the audited captions' style.
        ordinary: File of captions that are not memorised, for threshold and controls; by default the first reference.
        quantile: Quantile of ordinary captions that sets the threshold.
    """
    from diffcore.models import resolve
    from nemo_localize.app.audit_run import AuditRun
    from nemo_localize.app.report import write_page
    from nemo_localize.audit import audit as audit_model
    from nemo_localize.files.export import how_to_load, require_editable

    found = read_captions(captions, strict)
    sets = [read_captions(path, strict) for path in references]
    usual = sets[0] if ordinary is None else read_captions(ordinary, strict)
    source = resolve(model, download=work.loading.download)
    if work.loading.allow_pickle:
        require_editable(source)
    loaded = work.load(model)
    first, judges, originals = work.first_step(loaded, step), load_judges(judging, work), load_originals(judging, found)
    settings = images.settings(work.computing.batch_size)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        kept = AuditRun(run, first, source, images.seeds(), settings, originals)
        return audit_model(
            first,
            found.prompts,
            usual.distinct,
            references={part.path.name: part.prompts for part in sets},
            seeds=images.seeds(),
            settings=settings,
            search=search,
            quantile=quantile,
            judges=judges,
            originals=originals,
            map=map,
            on_part=kept.keep if run.leading else None,
        ).summary()

    options = {"model": model, "references": list(references), "ordinary": ordinary, "quantile": quantile}
    options |= {"judging": judging, "step": step, "search": search, "images": images}
    job = work.run_of("audit", loaded, [found, usual, *sets], options)
    plan = {"captions": len(found.distinct), "references": sum(map(len, sets))}
    code = job(compute, plan=plan, report=write_page, passed=lambda result: result["closed"])
    if not work.output.dry_run and (note := how_to_load(job.folder)):
        print(note, file=sys.stderr)
    return code
