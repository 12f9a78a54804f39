"""The console script `diffcore`: look at models and into them, sample, and measure images.

Heavy imports stand inside the commands.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, Output, emit, main, make_app, settings, track
from diffcore.cli.commands.adapters import adapter_app
from diffcore.cli.commands.zoo import zoo_app
from diffcore.errors import UserError
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel

app = make_app(
    "diffcore",
    "Look at diffusion models on disk and into them, and sample, without running anything from their folders.\n\n"
    "Start with: diffcore info FOLDER",
    "diffcore",
)
app.command(adapter_app)
app.command(zoo_app)


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class Loading:
    """How a model is found and read.

    Attributes:
        download: Fetch a repository owner/name; without this word the network is never touched.
        allow_pickle: Read weights that are pickles, with torch's restricted unpickler; only from authors you trust.
        prediction_type: What the network predicts, where the files do not say.
        tokenizer: Folder with CLIP's vocabulary, for single files.
        like: Pipeline folder of the same family, for single files: its configurations and tokenizers.
        text_encoder: Folder with a T5 and its vocabulary, for PixArt, SD3 and Flux folders that came without.
    """

    download: bool = False
    allow_pickle: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None
    tokenizer: Path | None = None
    like: Path | None = None
    text_encoder: Path | None = None


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def info(model: str, *, loading: Loading = Loading(), output: Output = Output()) -> int:
    """Tell what a model is, before anything of it is loaded: components, sizes, schedule, fingerprint.

    Shortest form: diffcore info FOLDER

    A model that is unsafe or broken is refused with the reason, exit code 2. With --out, writes a report with the noise
    schedule drawn.

    Args:
        model: Pipeline folder, backbone folder, or safetensors file.
    """
    from diffcore.checkpoint import inspect_model
    from diffcore.checkpoint.describe import describe
    from diffcore.models import resolve
    from diffcore.models.schedules import schedule_of

    if output.dry_run:
        read = model if loading.download else resolve(model).name
        emit({"reads": read, "writes": "nothing" if output.out is None else output.out}, output.json)
        return 0
    path = resolve(model, download=loading.download)
    inventory = inspect_model(path, allow_pickle=loading.allow_pickle)
    described = describe(inventory)
    prediction, schedule, known_from = schedule_of(inventory, loading.prediction_type)
    result = described | {"prediction_type": prediction, "prediction_type_from": known_from}
    result["schedule"] = None if schedule is None else repr(schedule)
    if output.out is not None:
        from diffcore.models.page import write_model_page
        from diffcore.run import Run

        inputs = {described["name"]: described["fingerprint"]}
        config = settings(loading=loading)
        with Run.open(
            output.out, command="diffcore info", config=config, inputs=inputs, restart=output.restart
        ) as opened:
            write_model_page(result, schedule, opened)
            opened.finish(result)
        print(f"report: {output.out / 'report.html'}", file=sys.stderr)
    emit(result if output.json else _flattened(result), output.json)
    return 0


@app.command
def hooks(
    model: str,
    patterns: tuple[str, ...],
    *,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    json: bool = False,
) -> int:
    """List the modules that patterns match, what they put out, and how much of a forward pass it takes to get there.

    Shortest form: diffcore hooks FOLDER '*attn2.to_v'

    Args:
        model: Pipeline folder, backbone folder, or safetensors file.
        patterns: Shell patterns on dotted names; * crosses dots.
        json: Print one JSON object.
    """
    from diffcore.hooks import match
    from diffcore.models.probe import site_table

    loaded = _load(model, loading, runtime)
    sites = match(loaded.backbone, patterns)
    table = site_table(loaded.backbone, cond=77 if loaded.prompts is None else loaded.empty_condition(1))
    rows = [{"module": row.name, "shape": row.shape, "cost": row.cost} for row in (table[site.key] for site in sites)]
    if json:
        emit({"sites": rows}, as_json=True)
        return 0
    width = max(len(row["module"]) for row in rows)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) if row["shape"] else "does not run"
        print(f"{row['module']:<{width}}  {shape:<16}  {row['cost']:.1%} of a forward pass")
    return 0


@app.command
def sample(
    model: str,
    prompts: tuple[str, ...] = (),
    *,
    steps: int = 50,
    solver: Literal["ddim", "euler", "heun"] = "ddim",
    guidance_scale: float = 1.0,
    count: int = 1,
    size: int | None = None,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Draw images and write them as PNG files and one grid.

    Shortest form: diffcore sample FOLDER 'a portrait of a woman' --guidance-scale 7.5

    Image i of a prompt starts from noise that depends on the seed and i alone.

    Args:
        model: Pipeline folder, backbone folder, or safetensors file.
        prompts: One or more; a model without prompts draws its classes in turn.
        steps: Solver steps.
        solver: How each step is taken.
        guidance_scale: Classifier-free guidance; 0 and 1 are off.
        count: Images per prompt.
        size: Side in pixels; by default what the model was trained for.
        adapter: LoRA to fuse in: a safetensors file, or a folder of PEFT.
        adapter_scale: Its strength; 1 is what it was trained for.
    """
    from diffcore.models.draw import draw_images, planned_images
    from diffcore.run import Run

    if steps < 1 or count < 1:
        raise UserError(f"--steps is {steps} and --count is {count}; both must be at least 1")
    guidance_scale = guidance_scale or 1.0  # at 0 the formula would leave the prompt out
    loaded = _load(model, loading, runtime)
    if adapter is not None:
        loaded = loaded.with_adapter(adapter, adapter_scale)
    options: dict[str, Any] = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "size": size}
    fused = {} if adapter is None else {"adapter": adapter, "adapter_scale": adapter_scale}
    config = settings(prompts=list(prompts), count=count, **options, **fused, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"sample-{loaded.name}"
    inputs = {loaded.name: loaded.fingerprint}
    planned = planned_images(loaded, prompts, count=count, steps=steps, guidance_scale=guidance_scale, size=size)
    if output.dry_run:
        emit({**planned, "steps": steps, "writes": folder}, output.json)
        return 0
    with Run.open(folder, command="diffcore sample", config=config, inputs=inputs, restart=output.restart) as opened:
        if not opened.finished:
            opened.finish(draw_images(loaded, opened, prompts, count=count, seed=runtime.seed, **options))
        emit(opened.result, output.json)
    print(f"images: {folder / 'figures'}", file=sys.stderr)
    return 0


@app.command
def metrics(
    real: Path,
    fake: Path,
    *,
    features: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    prompts: Path | None = None,
    clip: Path | None = None,
    batch_size: int = 32,
    max_pixels: int = 64_000_000,
    allow_pickle: Flag = False,
    strict: Flag = False,
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure generated images against real ones: every metric from one reading of the images, with intervals.

    Shortest form: diffcore metrics REAL FAKE

    Fréchet distance beside its real-against-real value and extrapolated, kernel distance (KID), precision, recall,
    density, coverage; the CLIP score where prompts are given. Interrupted, the same command goes on where it stopped.

    Args:
        real: Folder or zip of real images, or clean-fid's statistics (.npz) of their Inception features.
        fake: Folder or zip of generated images.
        features: Networks to compare in: inception:FILE, clip:FOLDER, dino:FOLDER, sscd:FILE (a share of copies as
            well), random:SEED; by default random:0, which needs no file.
        prompts: Text, CSV or JSON lines with the prompts of the generated images, in the order of the numbers in their
            names, or with a column file_name; or the folder itself, where a text file beside each image holds its own.
        clip: Folder of the CLIP that judges images by their prompts; by default the one among the features.
        batch_size: Images per forward pass; results depend on it in their last bits.
        max_pixels: Width times height above which a file is left out undecoded.
        allow_pickle: Run TorchScript files (inception, sscd), which are code; only from authors you trust. ONNX files,
            which SSCD may be in, are data.
        strict: Stop at the first unreadable image or prompt instead of leaving it out.
    """
    from diffcore.metrics.prepare import prepare, refuse_place
    from diffcore.run import Run

    folder = output.out or Path("runs") / f"metrics-{real.stem}-{fake.stem}"
    refuse_place(folder, (real, fake))
    runtime.apply_threads()
    options: dict[str, Any] = {"prompts": prompts, "clip": clip, "batch_size": batch_size, "max_pixels": max_pixels}
    ready = prepare(real, fake, features, runtime, **options, allow_pickle=allow_pickle, strict=strict)
    if output.dry_run:
        emit({**ready.plan(), "writes": folder}, output.json)
        return 0
    config = settings(runtime=runtime, **ready.config)
    command, inputs = "diffcore metrics", ready.inputs
    with Run.open(folder, command=command, config=config, inputs=inputs, restart=output.restart) as opened:
        if not opened.finished:
            opened.finish(ready.measure(opened, track))
        emit(opened.result if output.json else _lines_of_metrics(opened.result), output.json)
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return 0


def _load(model: str, loading: Loading, runtime: Runtime) -> "DiffusionModel":
    from diffcore.models import load

    runtime.apply_threads()
    return load(
        model,
        runtime,
        download=loading.download,
        allow_pickle=loading.allow_pickle,
        prediction_type=loading.prediction_type,
        tokenizer=loading.tokenizer,
        like=loading.like,
        text_encoder=loading.text_encoder,
    )


def _flattened(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a line per component in place of the table."""
    lines = {
        row["component"]: ", ".join(
            str(part)
            for part in (
                row["class"],
                f"{row['parameters']:,} parameters" if row["parameters"] else None,
                f"{row['megabytes']:g} MB" if row["megabytes"] else None,
                row["precision"] or None,
                row["variant"],
            )
            if part
        )
        for row in result["components"]
    }
    warnings = "; ".join(result["warnings"]) or "none"
    return {**result, "parameters": f"{result['parameters']:,}", "warnings": warnings, "components": lines}


def _lines_of_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a line per number in place of the table."""
    rows = result["metrics"]
    lines = {
        f"{row['metric']} ({row['features']})": f"{row['value']:.4g}"
        + ("" if row["low"] is None else f"  [{row['low']:.4g}, {row['high']:.4g}]")
        for row in rows
    }
    return {name: value for name, value in result.items() if name != "metrics"} | lines
