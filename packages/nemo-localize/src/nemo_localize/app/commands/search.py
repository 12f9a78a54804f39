"""The commands that look at first steps: statistics, calibrate, detect, localize."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Flag
from diffcore.errors import UserError
from diffcore.io.files import sha256
from nemo_localize.app.inputs import column, read_calibration, read_captions, read_kinds
from nemo_localize.app.options import (
    AuditedCaptions,
    CalibrationFile,
    Files,
    ModelName,
    Search,
    Step,
    Strict,
    Tau,
    UnitSize,
)
from nemo_localize.app.work import Work
from nemo_localize.settings import SearchSettings, StepSettings

if TYPE_CHECKING:
    from diffcore.data.prompts import PromptSet
    from diffcore.run import Run, RunMap
    from nemo_localize.sites import ValueSites

_LOG = logging.getLogger("diffcore.nemo_localize")


def statistics(
    model: ModelName,
    references: Files = (),
    *,
    import_: Annotated[Path | None, Parameter(name="--import")] = None,
    import_count: int = 50_000,
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Learn from ordinary captions how active each value neuron usually is; the U-Net is not called.

    Shortest form: nemo-localize statistics MODEL CAPTIONS

    Give several files: captions in the style of the audited ones, but never trained on, should be among them.

    Args:
        references: Files of captions (.txt, .csv, .jsonl), none of them memorised.
        import_: Statistics that the published code saved (.pt) of this model, instead of captions or beside them. Of
            the file, a pickle, only tensors are read.
        import_count: Number of captions behind the imported statistics (paper: 50 000), which is their weight beside
            captions.
    """
    from nemo_localize.files.published_statistics import import_statistics
    from nemo_localize.files.statistics import FILE, save_statistics
    from nemo_localize.statistics import collect_statistics, merged

    if not references and import_ is None:
        raise UserError("there are no captions; give files of ordinary ones, or statistics with `import` FILE")
    sets = [read_captions(path, strict) for path in references]
    loaded, up = work.load(model), work.computing.up
    imported = [] if import_ is None else [import_statistics(loaded, import_, num_prompts=import_count, up=up)]

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        parts = [collect_statistics(loaded, part.prompts, source=part.path.name, up=up) for part in sets]
        found = merged([*imported, *parts])
        if run.leading:
            save_statistics(run.folder / FILE, found)
        counts = {"captions": found.num_prompts, "neurons": len(found.mean), "dead": int(found.dead.sum())}
        return {**counts, "sources": found.sources}

    options = {"model": model, "import": import_, "import_count": import_count}
    known = {} if import_ is None else {"import": sha256(import_)}
    job = work.run_of("statistics", loaded, sets, options, **known)
    return job(compute, plan={"captions": sum(map(len, sets)), "imported": len(imported)})


def calibrate(
    model: ModelName,
    captions: Path,
    *,
    quantile: float | None = None,
    strict: Strict = False,
    step: Step = StepSettings(),
    unit_size: UnitSize = 16,
    work: Work = Work(),
) -> int:
    """Find, from ordinary captions, the threshold above which a caption counts as memorised, and its false alarms.

    Shortest form: nemo-localize calibrate MODEL CAPTIONS

    Every second caption sets the threshold; the others measure its false alarms.

    Args:
        captions: File of captions that are not memorised; a thousand are enough.
        quantile: Quantile, such as 0.99, instead of mean plus standard deviation (paper, section 4).
    """
    from nemo_localize.app.report import write_page
    from nemo_localize.calibrate import calibrate as find_threshold
    from nemo_localize.files.calibration import FILE, save_calibration

    found = read_captions(captions, strict)
    loaded = work.load(model)
    first = work.first_step(loaded, step)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        result = find_threshold(first, found.prompts, quantile=quantile, unit_size=unit_size, map=map)
        if run.leading:
            save_calibration(run.folder / FILE, result)
        return asdict(result)

    options = {"model": model, "quantile": quantile, "unit_size": unit_size, "step": step}
    plan = {"captions": len(found.distinct), "unet_rows": len(found.distinct) * step.num_seeds}
    return work.run_of("calibrate", loaded, [found], options)(compute, plan=plan, report=write_page)


def detect(
    model: ModelName,
    captions: AuditedCaptions,
    *,
    calibration: CalibrationFile = None,
    tau: Tau = None,
    strict: Strict = False,
    step: Step = StepSettings(),
    unit_size: UnitSize = 16,
    work: Work = Work(),
) -> int:
    """Rank captions by how alike their first denoising steps are from seed to seed: what is memorised comes first.

    Shortest form: nemo-localize detect MODEL CAPTIONS --calibration RUN
    """
    from nemo_localize.app.report import save_detection, write_page
    from nemo_localize.calibrate import threshold
    from nemo_localize.detect import detect as find_consistency

    found = read_captions(captions, strict)
    loaded = work.load(model)
    first = work.first_step(loaded, step)
    level = threshold(first, read_calibration(calibration), tau=tau)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        detections = find_consistency(first, found.distinct, unit_size=unit_size, map=map)
        return save_detection(run, detections, level) if run.leading else {}

    options = {"model": model, "calibration": calibration, "tau": tau, "unit_size": unit_size, "step": step}
    job = work.run_of("detect", loaded, [found], options, tau=repr(level))
    return job(compute, plan={"captions": len(found.distinct)}, report=write_page)


def localize(
    model: ModelName,
    captions: AuditedCaptions,
    *,
    statistics: Path,
    calibration: CalibrationFile = None,
    tau: Tau = None,
    authors_table: Flag = False,
    strict: Strict = False,
    step: Step = StepSettings(),
    search: Search = SearchSettings(),
    work: Work = Work(),
) -> int:
    """Find the value neurons of every memorised caption in a list; captions that are not memorised cost one look.

    Shortest form: nemo-localize localize MODEL CAPTIONS --statistics RUN --calibration RUN

    Where the captions have a column type of VM or TM, verbatim and template memories are also counted apart.

    Args:
        statistics: Run of statistics, or its statistics.safetensors.
        authors_table: Write the table of the published code too.
    """
    from nemo_localize.app.report import save_localization, write_page
    from nemo_localize.calibrate import threshold
    from nemo_localize.files.results import FILE, write_results
    from nemo_localize.files.statistics import load_statistics
    from nemo_localize.localize import localize as find_neurons

    found = read_captions(captions, strict)
    usual = load_statistics(statistics)
    loaded = work.load(model)
    first = work.first_step(loaded, step)
    level = threshold(first, read_calibration(calibration), tau=tau)
    usual.require(loaded, first.sites)
    for difference in usual.differences(first.encoder.tokenize(found.distinct)):
        _LOG.warning("%s: z-scores may tell style instead of memory", difference)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        results = find_neurons(first, found.prompts, tau=level, statistics=usual, search=search, map=map)
        if not run.leading:
            return {}
        write_results(run.folder / FILE, results)
        return save_localization(run, results, level, first, usual) | results.by_kind(read_kinds(found) or {})

    options = {"model": model, "statistics": statistics, "calibration": calibration, "tau": tau}
    options |= {"step": step, "search": search}
    job = work.run_of("localize", loaded, [found], options, statistics=usual.fingerprint, tau=repr(level))
    code = job(compute, plan={"captions": len(found.distinct), "tau": level}, report=write_page)
    if authors_table and (job.folder / FILE).exists() and not work.output.dry_run:
        _write_authors_table(job.folder, first.sites, found)
    return code


def _write_authors_table(folder: Path, sites: "ValueSites", captions: "PromptSet") -> None:
    from nemo_localize.files.published_table import AuthorsRow, write_authors_table
    from nemo_localize.files.results import FILE, read_results

    # A row for every caption of the list, given twice or not: readers go through both side by side.
    results = read_results(folder / FILE)
    rows = [AuthorsRow.of(result, url) for result, url in zip(results, column(captions, "url"), strict=True)]
    write_authors_table(folder / "tables" / "published-form.csv", rows, sites)
