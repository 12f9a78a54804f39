"""The commands that find what is memorised, and where: statistics, calibrate, detect, localize."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from diffcore.cli import Flag, show
from diffcore.errors import UserError
from diffcore.io.files import sha256
from nemo_localize.app.inputs import column, read_calibration, read_captions, read_kinds, within
from nemo_localize.app.options import (
    AuditedCaptions,
    CalibrationFile,
    Files,
    ModelName,
    Strict,
    Tau,
    UnitSize,
)
from nemo_localize.app.work import Work, conclude
from nemo_localize.settings import SearchSettings, StepSettings

if TYPE_CHECKING:
    from diffcore.data.prompts import PromptSet
    from diffcore.run import Run
    from nemo_localize.first_step import FirstStep

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

    Captions that are written like the audited ones, but never trained on, belong among them: give several files.

    Args:
        references: Files of captions (.txt, .csv, .jsonl), none of them memorised.
        import_: Statistics that the published code saved (.pt) of this model, instead of captions or beside them. The
            file is a pickle, of which nothing but tensors is read.
        import_count: Of how many captions those are (paper: 50 000), which the file does not say; matters beside
            captions alone.
    """
    from nemo_localize.files.published_statistics import import_statistics
    from nemo_localize.statistics import collect_statistics, merged

    if not references and import_ is None:
        raise UserError("there are no captions; give files of ordinary ones, or statistics with --import FILE")
    sets = [read_captions(path, strict) for path in references]
    loaded, up = work.load(model), work.loading.up
    path = work.folder("statistics", loaded) / "statistics.safetensors"
    imported = [] if import_ is None else [import_statistics(loaded, import_, num_prompts=import_count, up=up)]
    if work.output.dry_run:
        return work.plan(captions=sum(map(len, sets)), imported=len(imported), writes=path)
    options = {"model": model, "import": import_, "import_count": import_count}
    known = {} if import_ is None else {"import": sha256(import_)}
    with work.open("statistics", loaded, sets, options, **known) as run:
        if not run.finished:
            parts = [collect_statistics(loaded, part.prompts, source=part.path.name, up=up) for part in sets]
            found = merged([*imported, *parts])
            found.save(path)
            counts = {"captions": found.num_prompts, "neurons": len(found.mean), "dead": int(found.dead.sum())}
            run.finish({**counts, "sources": found.sources})
        show(run, work.output)
    return 0


def calibrate(
    model: ModelName,
    captions: Path,
    *,
    quantile: float | None = None,
    strict: Strict = False,
    step: StepSettings = StepSettings(),
    unit_size: UnitSize = 16,
    work: Work = Work(),
) -> int:
    """Find from ordinary captions the threshold above which a caption counts as memorised, and its false alarms.

    Shortest form: nemo-localize calibrate MODEL CAPTIONS

    Every second caption sets the threshold, the others tell how often it is wrong.

    Args:
        captions: Captions that are not memorised; a thousand are good.
        quantile: Take this quantile, such as 0.99, instead of mean plus standard deviation (paper, section 4).
    """
    from nemo_localize.calibrate import calibrate as find_threshold

    found = read_captions(captions, strict)
    loaded = work.load(model)
    if work.output.dry_run:
        rows = len(found.distinct) * step.num_seeds
        return work.plan(captions=len(found.distinct), unet_rows=rows, writes=work.folder("calibrate", loaded))
    options = {"model": model, "quantile": quantile, "unit_size": unit_size, "step": step}
    fabric = work.fabric()
    with work.open("calibrate", loaded, [found], options) as run:
        if not run.finished:
            first = work.first_step(loaded, step)
            result = find_threshold(
                first, found.prompts, quantile=quantile, unit_size=unit_size, run=run, fabric=fabric
            )
            if run.leading:
                result.save(run.folder / "calibration.json")
                conclude(run, asdict(result))
        show(run, work.output)
    return 0


def detect(
    model: ModelName,
    captions: AuditedCaptions,
    *,
    calibration: CalibrationFile = None,
    tau: Tau = None,
    strict: Strict = False,
    step: StepSettings = StepSettings(),
    unit_size: UnitSize = 16,
    work: Work = Work(),
) -> int:
    """Rank captions by how alike their first denoising steps are from seed to seed: what is memorised comes first.

    Shortest form: nemo-localize detect MODEL CAPTIONS --calibration RUN
    """
    from nemo_localize.app.report import save_detection
    from nemo_localize.calibrate import consistency_rows, threshold
    from nemo_localize.units import in_units

    found = read_captions(captions, strict)
    loaded = work.load(model)
    first = work.first_step(loaded, step)
    level = threshold(first, read_calibration(calibration), tau=tau)
    if work.output.dry_run:
        return work.plan(captions=len(found.distinct), writes=work.folder("detect", loaded))
    options = {"model": model, "calibration": calibration, "tau": tau, "unit_size": unit_size, "step": step}
    fabric = work.fabric()
    with work.open("detect", loaded, [found], options, tau=repr(level)) as run:
        if not run.finished:
            rows = in_units(
                found.distinct,
                lambda unit: consistency_rows(first, unit),
                unit_size=unit_size,
                run=run,
                fabric=fabric,
            )
            if run.leading:
                conclude(run, save_detection(run, rows, level))
        show(run, work.output)
    return 0


def localize(
    model: ModelName,
    captions: AuditedCaptions,
    *,
    statistics: Path,
    calibration: CalibrationFile = None,
    tau: Tau = None,
    authors_table: Flag = False,
    strict: Strict = False,
    step: StepSettings = StepSettings(),
    search: SearchSettings = SearchSettings(),
    work: Work = Work(),
) -> int:
    """Find the value neurons of every memorised caption in a list; captions that are not memorised cost one look.

    Shortest form: nemo-localize localize MODEL CAPTIONS --statistics RUN --calibration RUN

    Where a column type of the captions says VM or TM, verbatim and template memories are also counted apart.

    Args:
        statistics: Run of statistics, or its statistics.safetensors.
        authors_table: Write the table of the published code too.
    """
    from nemo_localize.app.report import save_localization
    from nemo_localize.calibrate import threshold
    from nemo_localize.files.neurons import RESULTS
    from nemo_localize.localize import localize as find_neurons
    from nemo_localize.statistics import Statistics

    found = read_captions(captions, strict)
    usual = Statistics.load(within(statistics, "statistics.safetensors"))
    loaded = work.load(model)
    first = work.first_step(loaded, step)
    level = threshold(first, read_calibration(calibration), tau=tau)
    usual.require(loaded, first.sites)
    for difference in usual.differences(first.encoder.tokenize(found.distinct)):
        _LOG.warning("%s: z-scores may tell style instead of memory", difference)
    if work.output.dry_run:
        return work.plan(captions=len(found.distinct), tau=level, writes=work.folder("localize", loaded) / RESULTS)
    options = {"model": model, "statistics": statistics, "calibration": calibration, "tau": tau}
    options |= {"step": step, "search": search}
    known = {"statistics": usual.fingerprint, "tau": repr(level)}
    fabric = work.fabric()
    with work.open("localize", loaded, [found], options, **known) as run:
        if not run.finished:
            results = find_neurons(
                first, found.prompts, tau=level, statistics=usual, settings=search, run=run, fabric=fabric
            )
            if run.leading:
                summary = save_localization(run, results, level, first, usual)
                conclude(run, summary | results.by_kind(read_kinds(found) or {}))
        if authors_table and run.leading:
            _write_authors_table(run, first, found)
        show(run, work.output)
    return 0


def _write_authors_table(run: "Run", first: "FirstStep", captions: "PromptSet") -> None:
    from nemo_localize.files.neurons import RESULTS
    from nemo_localize.files.published_table import AuthorsRow, write_authors_table
    from nemo_localize.results import Results

    # A row for every caption of the list, given twice or not: readers go through both side by side.
    urls = column(captions, "url")
    results = Results.read_jsonl(run.folder / RESULTS)
    rows = [AuthorsRow.of(result, url) for result, url in zip(results, urls, strict=True)]
    write_authors_table(run.folder / "tables" / "published-form.csv", rows, first.sites)
