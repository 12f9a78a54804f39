"""The commands. Each parses, calls one function, and writes a run folder with a report; heavy imports stand inside."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Output, emit, main, make_app, settings
from diffcore.errors import UserError, printable
from diffcore.runtime import Runtime
from nemo_localize.settings import DrawSettings, Method, SearchSettings, StepSettings

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor

    from diffcore.data.prompts import PromptSet
    from diffcore.models import DiffusionModel
    from diffcore.run import Run
    from nemo_localize.calibration import Calibration
    from nemo_localize.evaluate import Judges
    from nemo_localize.first_step import FirstStep

_LOG = logging.getLogger("diffcore.nemo_localize")

app = make_app(
    "nemo-localize",
    "Find memorised captions of a text-to-image model, switch off the neurons that recognise them, and prove it.\n\n"
    "Start with: nemo-localize demo",
    "nemo-localize",
)

_Flag = Annotated[bool, Parameter(negative="")]
_Files = Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")]


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class Loading:
    """How the model is found and read, and how much of it is computed at once.

    Attributes:
        download: Fetch a repository owner/name; without this word the network is never touched.
        tokenizer: Folder with CLIP's vocabulary, for single files.
        like: Pipeline folder of the same family, for single files: its configurations and tokenizers.
        batch_size: Latents per forward pass; halved where memory runs out.
        up: Look at the up blocks too, which hardly matter in the paper (appendix C.8).
    """

    download: bool = False
    tokenizer: Path | None = None
    like: Path | None = None
    batch_size: int = 64
    up: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; give at least 1")


@Parameter(name="*", group="Judges", negative="")
@dataclass(frozen=True)
class Judging:
    """What looks at pictures. Numbers of different judges do not compare; tables name theirs.

    Attributes:
        sscd: Weights of SSCD (sscd_disc_mixup, TorchScript), the paper's copy detector; else structural similarity.
        clip: Folder of a CLIP, for the fit of pictures and captions; else that is not measured.
        originals: Folder of training images; a column file_name of the captions says which is whose, else by order.
        allow_pickle: Read judges that are pickles or programs; only from authors you trust.
    """

    sscd: Path | None = None
    clip: Path | None = None
    originals: Path | None = None
    allow_pickle: bool = False


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-nemo-localize"), full: _Flag = False, json: _Flag = False) -> int:
    """See memorised portraits found, switched off and drawn again; about a minute on two cores.

    Shortest form: nemo-localize demo

    Exit code 1 means that the leak was not closed: a caption was not localised, or a picture still copies.

    Args:
        out: Run folder.
        full: All 24 memorised captions instead of six; about five minutes.
        json: Print the result as one JSON object.
    """
    from nemo_localize.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["closed"] else 1


@app.command
def statistics(
    model: str,
    references: _Files,
    *,
    strict: _Flag = False,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Learn from ordinary captions how active each value neuron usually is; the U-Net is not called.

    Shortest form: nemo-localize statistics MODEL CAPTIONS

    Captions that are written like the audited ones, but never trained on, belong among them: give several files.

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME.
        references: Files of captions (.txt, .csv, .jsonl), none of them memorised.
        strict: Stop at the first unusable line instead of leaving it out.
    """
    from nemo_localize.statistics import collect_statistics, merged

    sets = [_captions(path, strict) for path in references]
    loaded = _load(model, loading, runtime)
    config = settings(model=model, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"statistics-{loaded.name}"
    if output.dry_run:
        return _plan({"captions": sum(map(len, sets)), "writes": folder / "statistics.safetensors"}, output)
    with _open(folder, "statistics", config, loaded, sets, output) as opened:
        if not opened.finished:
            found = merged(
                [collect_statistics(loaded, part.prompts, source=part.path.name, up=loading.up) for part in sets]
            )
            found.save(folder / "statistics.safetensors")
            dead = int(found.dead.sum())
            opened.finish(
                {"captions": found.num_prompts, "neurons": len(found.mean), "dead": dead, "sources": found.sources}
            )
        _show(opened, output)
    return 0


@app.command
def calibrate(
    model: str,
    captions: Path,
    *,
    quantile: float | None = None,
    strict: _Flag = False,
    step: StepSettings = StepSettings(),
    unit_size: int = 16,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Find from ordinary captions the threshold above which a caption counts as memorised, and its false alarms.

    Shortest form: nemo-localize calibrate MODEL CAPTIONS

    Every second caption sets the threshold, the others tell how often it is wrong.

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME.
        captions: Captions that are not memorised; a thousand are good.
        quantile: Take this quantile, such as 0.99, instead of mean plus standard deviation (paper, section 4).
        strict: Stop at the first unusable line instead of leaving it out.
        unit_size: Captions that share batches; what an interruption costs at most.
    """
    from nemo_localize.calibration import calibrate as find_threshold

    found = _captions(captions, strict)
    loaded = _load(model, loading, runtime)
    config = settings(model=model, quantile=quantile, unit_size=unit_size, step=step, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"calibrate-{loaded.name}"
    if output.dry_run:
        rows = len(found.distinct) * step.num_seeds
        return _plan({"captions": len(found.distinct), "unet_rows": rows, "writes": folder}, output)
    fabric = _fabric(runtime)
    with _open(folder, "calibrate", config, loaded, [found], output) as opened:
        if not opened.finished:
            first = _first_step(loaded, step, loading)
            result = find_threshold(
                first, found.prompts, quantile=quantile, unit_size=unit_size, run=opened, fabric=fabric
            )
            _finish_calibration(opened, result)
        _show(opened, output)
    return 0


@app.command
def detect(
    model: str,
    captions: Path,
    *,
    calibration: Path | None = None,
    strict: _Flag = False,
    step: StepSettings = StepSettings(),
    unit_size: int = 16,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Rank captions by how alike their first denoising steps are from seed to seed: what is memorised comes first.

    Shortest form: nemo-localize detect MODEL CAPTIONS --calibration RUN

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME.
        captions: What to audit.
        calibration: Run of calibrate, or its calibration.json; not needed with --compat reference on SD 1.4.
        strict: Stop at the first unusable line instead of leaving it out.
        unit_size: Captions that share batches; what an interruption costs at most.
    """
    from nemo_localize.calibration import consistency_rows, threshold
    from nemo_localize.page import save_detection, write_page
    from nemo_localize.units import in_units

    found = _captions(captions, strict)
    loaded = _load(model, loading, runtime)
    first = _first_step(loaded, step, loading)
    tau = threshold(first, _calibration(calibration))
    config = settings(model=model, tau=tau, unit_size=unit_size, step=step, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"detect-{loaded.name}"
    if output.dry_run:
        return _plan({"captions": len(found.distinct), "writes": folder}, output)
    fabric = _fabric(runtime)
    with _open(folder, "detect", config, loaded, [found], output) as opened:
        if not opened.finished:
            rows = in_units(
                found.distinct,
                lambda unit: consistency_rows(first, unit),
                unit_size=unit_size,
                run=opened,
                name="captions",
                fabric=fabric,
            )
            if opened.leading:
                opened.finish(save_detection(opened, rows, tau))
                write_page(opened)
        _show(opened, output)
    return 0


@app.command
def localize(
    model: str,
    captions: Path,
    *,
    statistics: Path,
    calibration: Path | None = None,
    authors_table: _Flag = False,
    strict: _Flag = False,
    step: StepSettings = StepSettings(),
    search: SearchSettings = SearchSettings(),
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Find the value neurons of every memorised caption in a list; captions that are not memorised cost one look.

    Shortest form: nemo-localize localize MODEL CAPTIONS --statistics RUN --calibration RUN

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME.
        captions: What to audit.
        statistics: Run of statistics, or its statistics.safetensors.
        calibration: Run of calibrate, or its calibration.json; not needed with --compat reference on SD 1.4.
        authors_table: Write the table of the published code too.
        strict: Stop at the first unusable line instead of leaving it out.
    """
    from nemo_localize.calibration import threshold
    from nemo_localize.localization import localize as find_neurons
    from nemo_localize.page import save_localization, write_page
    from nemo_localize.statistics import Statistics

    found = _captions(captions, strict)
    usual = Statistics.load(_within(statistics, "statistics.safetensors"))
    loaded = _load(model, loading, runtime)
    first = _first_step(loaded, step, loading)
    tau = threshold(first, _calibration(calibration))
    usual.require(loaded, first.sites)
    for difference in usual.differences(first.encoder.tokenize(found.distinct)):
        _LOG.warning("%s: z-scores may tell style instead of memory", difference)
    config = settings(model=model, tau=tau, step=step, search=search, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"localize-{loaded.name}"
    if output.dry_run:
        return _plan({"captions": len(found.distinct), "tau": tau, "writes": folder / "results.jsonl"}, output)
    fabric = _fabric(runtime)
    with _open(folder, "localize", config, loaded, [found], output, usual.fingerprint) as opened:
        if not opened.finished:
            results = find_neurons(
                first, found.prompts, tau=tau, statistics=usual, settings=search, run=opened, fabric=fabric
            )
            if opened.leading:
                opened.finish(save_localization(opened, results, tau, first, usual))
                write_page(opened)
        if authors_table and opened.leading:
            _write_authors_table(opened, first, found)
        _show(opened, output)
    return 0


@app.command
def apply(
    model: str,
    neurons: Path,
    *,
    lora: bool = True,
    download: _Flag = False,
    output: Output = Output(),
) -> int:
    """Write the model with neurons switched off for good: a checkpoint, what undoes it, and the edit as a LoRA.

    Shortest form: nemo-localize apply MODEL RUN

    RUN/model loads in any tool. RUN/delta.safetensors holds the removed rows; keep it to yourself.

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME. It is not changed.
        neurons: Run of localize or audit, results.jsonl, an object of module names and channels as JSON, or a table of
            the published code.
        lora: Write the edit as LoRA in three layouts too.
        download: Fetch a repository owner/name.
    """
    from diffcore.models import resolve
    from diffcore.run import Run, input_hash
    from nemo_localize.export import apply as write_edit
    from nemo_localize.neuron_files import read_neurons

    chosen, reasons = read_neurons(neurons)
    source = resolve(model, download=download)
    folder = output.out or Path("runs") / f"apply-{source.stem}"
    if output.dry_run:
        return _plan({"neurons": len(chosen), "layers": len(chosen.layers), "writes": folder / "model"}, output)
    inputs = {source.name: input_hash(source)}
    config = {"neurons": chosen.to_json(), "lora": lora}
    command = "nemo-localize apply"
    with Run.open(folder, command=command, config=config, inputs=inputs, restart=output.restart) as opened:
        if not opened.finished:
            manifest = write_edit(source, chosen, folder, reasons=reasons, lora=lora)
            opened.finish({key: manifest[key] for key in ("num_neurons", "files", "left_out", "lora")})
        emit(opened.result, output.json)
    print(f"checkpoint: {_checkpoint(folder)}", file=sys.stderr)
    return 0


@app.command
def revert(edit: Path, *, out: Path, json: _Flag = False) -> int:
    """Write the checkpoint as it was before apply, byte for byte.

    Shortest form: nemo-localize revert RUN --out FOLDER

    Args:
        edit: Run folder of apply or audit, with its delta.
        out: Where the restored checkpoint goes; nothing may be there.
        json: Print the result as one JSON object.
    """
    from nemo_localize.export import DELTA
    from nemo_localize.export import revert as restore

    emit({"restored": out, "sha256": restore(_checkpoint(edit), edit / DELTA, out)}, json)
    return 0


@app.command
def generate(
    model: str,
    captions: Path,
    *,
    neurons: Path | None = None,
    per_caption: _Flag = False,
    methods: Annotated[tuple[Method, ...], Parameter(consume_multiple=True, negative="")] = ("none", "neurons"),
    drawing: DrawSettings = DrawSettings(),
    repeat: int = 0,
    strict: _Flag = False,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Draw captions with and without the found neurons, and under other remedies, from the same noise.

    Shortest form: nemo-localize generate MODEL CAPTIONS --neurons RUN

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME.
        captions: What to draw.
        neurons: As in apply.
        per_caption: Switch off for each caption its own neurons, instead of all together.
        methods: Ways side by side; none is the model as it is.
        repeat: Number of the draw, for the ways that draw at random.
        strict: Stop at the first unusable line instead of leaving it out.
    """
    from nemo_localize.generate import generate as draw
    from nemo_localize.neuron_files import read_neurons
    from nemo_localize.neurons import NO_NEURONS
    from nemo_localize.page import save_gallery, write_page
    from nemo_localize.pictures import Drawing

    ways = tuple(dict.fromkeys(methods))
    if neurons is None and {"neurons", "random-neurons"} & set(ways):
        raise UserError("--methods asks for neurons, but there are none; give them with --neurons RUN")
    found = _captions(captions, strict)
    together, separate = (NO_NEURONS, {}) if neurons is None else read_neurons(neurons)
    loaded = _load(model, loading, runtime)
    config = settings(
        model=model, neurons=together.to_json(), per_caption=per_caption, methods=list(ways), drawing=drawing
    ) | settings(repeat=repeat, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"generate-{loaded.name}"
    if output.dry_run:
        images = len(found.distinct) * len(ways) * drawing.num_images
        return _plan({"images": images, "steps_each": drawing.image_steps, "writes": folder}, output)
    with _open(folder, "generate", config, loaded, [found], output) as opened:
        if not opened.finished:
            pictures = draw(
                loaded,
                found.distinct,
                ways,
                drawing.seeds,
                Drawing(drawing.image_guidance, drawing.image_steps, loading.batch_size),
                opened,
                neurons=separate if per_caption else together,
                repeat=repeat,
            )
            save_gallery(opened, found.distinct, pictures, drawing.seeds)
            opened.finish({"captions": len(found.distinct), "images": drawing.num_images, "methods": list(ways)})
            write_page(opened)
        _show(opened, output)
    return 0


@app.command
def evaluate(
    model: str,
    captions: Path,
    *,
    neurons: Path,
    methods: Annotated[tuple[Method, ...], Parameter(consume_multiple=True, negative="")] = (
        "none",
        "neurons",
        "random-neurons",
    ),
    ordinary: Path | None = None,
    judging: Judging = Judging(),
    drawing: DrawSettings = DrawSettings(),
    repeat: int = 0,
    strict: _Flag = False,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure what switching neurons off does to pictures of memorised and of ordinary captions, against other ways.

    Shortest form: nemo-localize evaluate MODEL CAPTIONS --neurons RUN

    Without --sscd and --clip the stated substitutes are taken, and named in the tables.

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME.
        captions: Memorised captions.
        neurons: As in apply.
        methods: Ways side by side.
        ordinary: Captions that must not suffer, at least ten; drawn once each.
        repeat: Number of the draw, for the ways that draw at random.
        strict: Stop at the first unusable line instead of leaving it out.
    """
    from nemo_localize.evaluate import evaluate as measure
    from nemo_localize.generate import generate as draw
    from nemo_localize.neuron_files import read_neurons
    from nemo_localize.page import save_gallery, save_table, write_page
    from nemo_localize.pictures import Drawing, shows_latents

    ways: tuple[Method, ...] = tuple(dict.fromkeys(("none", *methods)))
    found, chosen = _captions(captions, strict), read_neurons(neurons)[0]
    others = None if ordinary is None else _captions(ordinary, strict)
    loaded = _load(model, loading, runtime)
    judges, originals = _judges(judging, runtime, loading), _originals(judging, found)
    config = settings(model=model, neurons=chosen.to_json(), methods=list(ways), drawing=drawing, judging=judging)
    config |= settings(repeat=repeat, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"evaluate-{loaded.name}"
    if output.dry_run:
        images = len(ways) * (len(found.distinct) * drawing.num_images + len(others.distinct if others else ()))
        return _plan({"images": images, "steps_each": drawing.image_steps, "writes": folder}, output)
    sets = [found] if others is None else [found, others]
    with _open(folder, "evaluate", config, loaded, sets, output) as opened:
        if not opened.finished:
            how = Drawing(drawing.image_guidance, drawing.image_steps, loading.batch_size)

            def drawn(texts: tuple[str, ...], seeds: range) -> "dict[str, Tensor]":
                return draw(loaded, texts, ways, seeds, how, opened, neurons=chosen, repeat=repeat)

            pictures = drawn(found.distinct, drawing.seeds)
            kept = (
                None if others is None else {w: p[:, 0] for w, p in drawn(others.distinct, drawing.seeds[:1]).items()}
            )
            result = measure(
                found.distinct,
                pictures,
                originals=originals,
                judges=judges,
                ordinary=kept,
                of_latents=shows_latents(loaded),
            )
            save_gallery(opened, found.distinct, pictures, drawing.seeds, originals)
            save_table(opened, "evaluation", result.rows(), f"Medians over captions. {' '.join(result.notes)}")
            if result.quality:
                save_table(opened, "quality", result.quality_rows(), "Pictures of ordinary captions.")
            opened.finish(result.to_json())
            write_page(opened)
        _show(opened, output)
    return 0


@app.command
def prove(
    model: str,
    captions: Path,
    *,
    neurons: Path,
    controls: Path,
    calibration: Path | None = None,
    judging: Judging = Judging(),
    step: StepSettings = StepSettings(),
    drawing: DrawSettings = DrawSettings(),
    strict: _Flag = False,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
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
        strict: Stop at the first unusable line instead of leaving it out.
    """
    from diffcore.jsonfile import write_json
    from nemo_localize.calibration import threshold
    from nemo_localize.neuron_files import read_neurons
    from nemo_localize.page import save_proof, write_page
    from nemo_localize.pictures import Drawing
    from nemo_localize.prove import prove as find_proof

    found, harmless, chosen = _captions(captions, strict), _captions(controls, strict), read_neurons(neurons)[0]
    loaded = _load(model, loading, runtime)
    first = _first_step(loaded, step, loading)
    tau = threshold(first, _calibration(calibration))
    judges, originals = _judges(judging, runtime, loading), _originals(judging, found)
    config = settings(model=model, neurons=chosen.to_json(), tau=tau, step=step, drawing=drawing, judging=judging)
    config |= settings(loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"prove-{loaded.name}"
    if output.dry_run:
        return _plan(
            {"captions": len(found.distinct), "controls": len(harmless.distinct[:8]), "writes": folder}, output
        )
    fabric = _fabric(runtime)
    with _open(folder, "prove", config, loaded, [found, harmless], output) as opened:
        if not opened.finished:
            proof = find_proof(
                first,
                chosen,
                found.distinct,
                harmless.distinct[:8],
                tau=tau,
                originals=originals,
                copies=judges.copies,
                drawing=Drawing(drawing.image_guidance, drawing.image_steps, loading.batch_size),
                run=opened,
                fabric=fabric,
            )
            if opened.leading:
                write_json(folder / "proof.json", proof.to_json())
                save_proof(opened, proof)
                opened.finish(proof.summary())
                write_page(opened)
        _show(opened, output)
        return 0 if not opened.leading or opened.result["verdict"] == "closed" else 1


@app.command
def audit(
    model: str,
    captions: Path,
    *,
    references: _Files,
    ordinary: Path | None = None,
    quantile: float | None = 0.99,
    judging: Judging = Judging(),
    step: StepSettings = StepSettings(),
    search: SearchSettings = SearchSettings(),
    drawing: DrawSettings = DrawSettings(),
    strict: _Flag = False,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Do all of it: find what is memorised, edit the model, measure, prove. The exit code is for CI.

    Shortest form: nemo-localize audit MODEL CAPTIONS --references ORDINARY

    Exit code 0 means that nothing is memorised, or that the leak is proven closed in the edited model, which lies in
    RUN/model; 1 that it is open or that the proof is inconclusive.

    Args:
        model: Pipeline folder, safetensors file, or zoo:NAME. It is not changed.
        captions: What to audit; captions of the training set, say.
        references: Files of captions that are not memorised, of ordinary style and of the audited captions' style.
        ordinary: Captions that are not memorised, for the threshold and as controls; by default the first reference.
        quantile: Of ordinary captions that sets the threshold.
        strict: Stop at the first unusable line instead of leaving it out.
    """
    from diffcore.models import resolve
    from nemo_localize.page import write_page
    from nemo_localize.pictures import Drawing
    from nemo_localize.release import Audit, audit_release

    found = _captions(captions, strict)
    sets = [_captions(path, strict) for path in references]
    usual = sets[0] if ordinary is None else _captions(ordinary, strict)
    loaded = _load(model, loading, runtime)
    config = settings(model=model, quantile=quantile, judging=judging, step=step, search=search, drawing=drawing)
    config |= settings(loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"audit-{loaded.name}"
    if output.dry_run:
        return _plan({"captions": len(found.distinct), "references": sum(map(len, sets)), "writes": folder}, output)
    what = Audit(
        step=_first_step(loaded, step, loading),
        source=resolve(model, download=loading.download),
        prompts=found.prompts,
        references={part.path.name: part.prompts for part in sets},
        ordinary=usual.distinct,
        seeds=drawing.seeds,
        drawing=Drawing(drawing.image_guidance, drawing.image_steps, loading.batch_size),
        search=search,
        quantile=quantile,
        judges=_judges(judging, runtime, loading),
        originals=_originals(judging, found),
    )
    fabric = _fabric(runtime)
    with _open(folder, "audit", config, loaded, [found, usual, *sets], output) as opened:
        if not opened.finished:
            result = audit_release(what, opened, fabric)
            opened.finish(result)
            if opened.leading:
                write_page(opened)
        _show(opened, output)
        return 0 if not opened.leading or opened.result["closed"] else 1


@app.command
def bench(
    *,
    smoke: _Flag = False,
    json: Path | None = None,
    baseline: Path | None = None,
    fail_below: float | None = None,
) -> int:
    """Time localisation on this machine against the plain sequential algorithm, as ratios in one run.

    Shortest form: nemo-localize bench

    Exit code 1 means that results disagree, a goal was missed, or a ratio fell below the baseline's.

    Args:
        smoke: Tiny sizes; only whether both sides agree.
        json: File for rows of name, value, unit.
        baseline: File that an earlier --json wrote.
        fail_below: Least share of the baseline's ratios, such as 0.8.
    """
    from diffcore.bench import run_cases
    from nemo_localize.bench import cases

    return run_cases(cases(smoke=smoke), smoke=smoke, json_path=json, baseline=baseline, fail_below=fail_below)


@app.command
def report(run: Path, *, json: _Flag = False) -> int:
    """Make the report of a run again from what its folder holds.

    Shortest form: nemo-localize report RUN

    Args:
        run: Run folder of any command.
        json: Print the result as one JSON object.
    """
    from diffcore.run import Run
    from nemo_localize.page import write_page

    with Run.reopen(run) as opened:
        emit({"report": write_page(opened)}, json)
    return 0


def _load(model: str, loading: Loading, runtime: Runtime) -> "DiffusionModel":
    from diffcore.models import load

    runtime.apply_threads()
    return load(model, runtime, download=loading.download, tokenizer=loading.tokenizer, like=loading.like)


def _first_step(model: "DiffusionModel", step: StepSettings, loading: Loading) -> "FirstStep":
    from nemo_localize.first_step import FirstStep

    return FirstStep(model, step, batch_size=loading.batch_size, up=loading.up)


def _captions(path: Path, strict: bool) -> "PromptSet":
    """Reads captions and says what was left out."""
    from diffcore.data.prompts import load_prompts

    found = load_prompts(path, strict=strict)
    for note in found.notes:
        _LOG.warning("%s", note)
    return found


def _calibration(path: Path | None) -> "Calibration | None":
    from nemo_localize.calibration import Calibration

    return None if path is None else Calibration.load(_within(path, "calibration.json"))


def _judges(judging: Judging, runtime: Runtime, loading: Loading) -> "Judges":
    from diffcore.metrics import feature_extractor
    from diffcore.metrics.prompt_fit import clip_text
    from nemo_localize.evaluate import Judges

    pickles = judging.allow_pickle
    copies = judging.sscd and feature_extractor(f"sscd:{judging.sscd}", runtime, allow_pickle=pickles)
    clip = judging.clip and clip_text(
        feature_extractor(f"clip:{judging.clip}", runtime, allow_pickle=pickles), judging.clip
    )
    return Judges(copies=copies, clip=clip, batch_size=loading.batch_size)


def _originals(judging: Judging, captions: "PromptSet") -> "dict[str, Tensor]":
    """Returns the training images of captions, where a folder of them is given."""
    if judging.originals is None:
        return {}
    from diffcore.data import load_images
    from diffcore.metrics.prompt_fit import places_of_prompts

    images = load_images(judging.originals)
    found: dict[str, list[int]] = {}
    for image, place in enumerate(places_of_prompts(captions, images.names)):
        if place >= 0:
            found.setdefault(captions.prompts[place], []).append(image)
    return {prompt: images.unit()[places] for prompt, places in found.items()}


def _within(path: Path, name: str) -> Path:
    """Returns the file that a run folder holds, or the file itself."""
    return path / name if path.is_dir() else path


def _checkpoint(folder: Path) -> Path:
    single = folder / "model.safetensors"
    return single if single.exists() else folder / "model"


def _fabric(runtime: Runtime) -> "Fabric | None":
    """Returns the processes that share the captions, launched; None for a single one."""
    if runtime.devices * runtime.num_nodes == 1:
        return None
    fabric = runtime.fabric()
    fabric.launch()
    return fabric


def _open(
    folder: Path,
    verb: str,
    config: Mapping[str, Any],
    model: "DiffusionModel",
    captions: "list[PromptSet]",
    output: Output,
    statistics: str | None = None,
) -> "Run":
    from diffcore.run import Run

    inputs = {model.name: model.fingerprint} | {printable(part.path.name): part.sha256 for part in captions}
    if statistics is not None:
        inputs["statistics"] = statistics
    command = f"nemo-localize {verb}"
    return Run.open(folder, command=command, config=config, inputs=inputs, restart=output.restart)


def _finish_calibration(run: "Run", found: "Calibration") -> None:
    from dataclasses import asdict

    from nemo_localize.page import write_page

    if run.leading:
        found.save(run.folder / "calibration.json")
        run.finish(asdict(found))
        write_page(run)


def _write_authors_table(run: "Run", first: "FirstStep", captions: "PromptSet") -> None:
    from nemo_localize.authors_table import AuthorsRow, write_authors_table
    from nemo_localize.neuron_files import RESULTS
    from nemo_localize.results import Results

    urls = dict(zip(captions.prompts, captions.columns.get("URL", ()), strict=False))
    results = Results.read_jsonl(run.folder / RESULTS).distinct()
    rows = [AuthorsRow.of(result, urls.get(result.prompt, "")) for result in results]
    write_authors_table(run.folder / "tables" / "published-form.csv", rows, first.sites)


def _plan(planned: dict[str, Any], output: Output) -> int:
    """Prints what a command would do."""
    emit(planned, output.json)
    return 0


def _show(run: "Run", output: Output) -> None:
    """Prints the result, and where the report is."""
    if not run.leading:
        return
    emit(run.result, output.json)
    if (page := run.folder / "report.html").exists():
        print(f"report: {page}", file=sys.stderr)
