"""The commands. Each parses, calls one function, and writes a run folder with a report; heavy imports stand inside."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, Output, emit, main, make_app, settings, show
from diffcore.cli.package_commands import add_package_commands
from diffcore.errors import UserError, printable
from diffcore.runtime import Runtime
from immiscible_noise.settings import Arm, EvaluationSettings, TrainSettings, arm_named

_LOG = logging.getLogger("diffcore.immiscible_noise")

if TYPE_CHECKING:
    from diffcore.data import ImageSet
    from diffcore.run import Run

app = make_app(
    "immiscible-noise",
    "Train diffusion and flow models faster by assigning noise to images inside the batch.\n\n"
    "Start with: immiscible-noise demo",
    "immiscible-noise",
)
add_package_commands(app, timed="the assignment on this machine against the authors' way and other trainers'")


@Parameter(name="*", group="Data", negative="")
@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read.

    Attributes:
        size: Side in pixels; images are cropped to the centre square and resized. Needed where sizes differ.
        split: Folder inside the data to read, such as train.
        grey: Read as grey images.
        strict: Stop at the first unreadable image instead of leaving it out.
    """

    size: int | None = None
    split: str | None = None
    grey: bool = False
    strict: bool = False


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-immiscible-noise"), full: Flag = False, json: Flag = False) -> int:
    """See the effect on 1797 real handwritten digits: three arms, pictures, numbers; about a minute on two cores.

    Shortest form: immiscible-noise demo

    Exit code 1 means that the effect was not there: assignment above 0.75 of the vanilla Fréchet distance at 5 solver
    steps, or a class-conditional accuracy of 0.98 or less with labels respected.

    Args:
        out: Run folder.
        full: Train twice as long, as the benchmark does.
        json: Print the result as one JSON object.
    """
    from immiscible_noise.app.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["passed"] else 1


@app.command
def train(
    data: Path,
    *,
    arm: Arm = Arm(),
    training: TrainSettings = TrainSettings(),
    images: DataOptions = DataOptions(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Train a pixel-space model on a folder or zip of images.

    Shortest form: immiscible-noise train FOLDER --method assignment --size 32

    Writes averaged weights at steps that double up to the last, a sample grid, and resumes when run again.

    Args:
        data: Folder or zip of images; sub-folders are classes.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.train import train as train_model

    config = settings(data=data, arm=arm, training=training, images=images, runtime=runtime)
    loaded, inputs = _load(data, images, runtime, need_labels=training.class_conditional)
    _check_training(loaded, [arm], training, runtime)
    folder = output.out or Path("runs") / f"train-{data.stem}-{arm.name}"
    if output.dry_run:
        return _plan(loaded, training, [arm.name], 1, folder, output.json)
    with _open(folder, "train", config, inputs, output) as opened:
        if not opened.finished:
            recipe = train_model(loaded, opened, arm, training, runtime)
            if not opened.leading:
                return 0
            if recipe.settings.network == "unet":
                from immiscible_noise.export import export_model

                export_model(recipe, opened)
            opened.finish({"arm": recipe.arm.name, "steps": training.steps, "images": len(loaded)})
            write_page(opened)
        show(opened, output)
    return 0


@app.command
def evaluate(
    model: Path,
    data: Path,
    *,
    evaluation: EvaluationSettings = EvaluationSettings(),
    images: DataOptions = DataOptions(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure a trained model: Fréchet distance against solver steps and against samples seen.

    Shortest form: immiscible-noise evaluate RUN FOLDER

    Distances are taken in the features of a small classifier that is trained once on the folder's labels (its accuracy
    and hash are printed), or without labels in principal components of the pixels.

    Args:
        model: Run folder of train.
        data: The images it was trained on, or others of the same kind.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.compare import evaluate_training
    from immiscible_noise.train import read_recipe

    config = settings(model=model, data=data, evaluation=evaluation, images=images, runtime=runtime)
    loaded, inputs = _load(data, images, runtime, at_least=2)
    folder = output.out or model / "evaluation"
    if output.dry_run:
        weights = read_recipe(model).settings.snapshot_steps
        emit({**_seen(loaded), "weights_of_steps": weights, "writes": folder}, output.json)
        return 0
    with _open(folder, "evaluate", config, inputs, output) as opened:
        if not opened.finished:
            opened.finish(evaluate_training(model, loaded, opened, evaluation, runtime).summary())
            write_page(opened)
        show(opened, output)
    return 0


@app.command
def compare(
    data: Path,
    *,
    arms: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("vanilla", "assignment", "half"),
    seeds: int = 3,
    training: TrainSettings = TrainSettings(),
    evaluation: EvaluationSettings = EvaluationSettings(),
    images: DataOptions = DataOptions(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Train several arms on the same seeds and show them in one figure.

    Shortest form: immiscible-noise compare FOLDER --arms vanilla assignment --size 16

    Arms of one seed share initial weights, data order and noise, so that they differ by the arm alone.

    Args:
        data: Folder or zip of images; sub-folders are classes.
        arms: Any of vanilla, assignment, half (strength 0.5), ignore (labels ignored), knn, knn-inner.
        seeds: Trainings per arm.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.compare import compare as run_arms
    from immiscible_noise.diagnosis import diagnose_images

    chosen = [arm_named(name) for name in dict.fromkeys(arms)]
    if not chosen:
        raise UserError("--arms names none; give at least one, such as --arms vanilla assignment")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; give a number of at least 1")
    shared: dict[str, Any] = {"training": training, "evaluation": evaluation, "images": images, "runtime": runtime}
    config = settings(data=data, arms=list(arms), seeds=seeds, **shared)
    loaded, inputs = _load(data, images, runtime, need_labels=training.class_conditional, at_least=2)
    _check_training(loaded, chosen, training, runtime)
    folder = output.out or Path("runs") / f"compare-{data.stem}"
    if output.dry_run:
        return _plan(loaded, training, [arm.name for arm in chosen], seeds, folder, output.json)
    with _open(folder, "compare", config, inputs, output) as opened:
        if not opened.finished:
            first = runtime.seed
            diagnose_images(loaded, opened, (training.batch_size,), 4, training.normalisation, first)
            study = run_arms(loaded, inputs, opened, chosen, range(first, first + seeds), training, evaluation, runtime)
            opened.finish(study.summary())
            write_page(opened)
        show(opened, output)
    return 0


@app.command
def diagnose(
    data: Path,
    *,
    batch_sizes: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (64, 256, 1024),
    k: int = 4,
    images: DataOptions = DataOptions(),
    normalisation: Literal["symmetric", "standard"] = "symmetric",
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure, before any training, what assigning noise would do to your images, and get a recommendation.

    Shortest form: immiscible-noise diagnose FOLDER --size 32

    Reports by batch size: how far the distance between image and noise falls, how Gaussian the noise stays, and how
    much of the class it gives away.

    Args:
        data: Folder or zip of images; sub-folders are classes.
        batch_sizes: Batches to try.
        k: Draws per image for nearest-of-k selection.
        normalisation: symmetric (pixels in [-1, 1]) or standard (mean 0, variance 1).
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.diagnosis import diagnose_images

    if k < 1:
        raise UserError(f"--k is {k}; give the number of noise draws per image, at least 1")
    if not batch_sizes or min(batch_sizes) < 2:
        raise UserError(
            f"--batch-sizes is {batch_sizes}; give numbers of at least 2: one image has nothing to exchange"
        )
    config = settings(
        data=data, batch_sizes=list(batch_sizes), k=k, normalisation=normalisation, images=images, runtime=runtime
    )
    loaded, inputs = _load(data, images, runtime, at_least=2)
    folder = output.out or Path("runs") / f"diagnose-{data.stem}"
    if output.dry_run:
        emit({**_seen(loaded), "writes": folder}, output.json)
        return 0
    with _open(folder, "diagnose", config, inputs, output) as opened:
        if not opened.finished:
            opened.finish(diagnose_images(loaded, opened, batch_sizes, k, normalisation, runtime.seed))
            write_page(opened)
        show(opened, output)
    return 0


def _open(folder: Path, verb: str, config: dict[str, Any], inputs: dict[str, str], output: Output) -> "Run":
    from diffcore.run import Run

    command = f"immiscible-noise {verb}"
    return Run.open(folder, command=command, config=config, inputs=inputs, restart=output.restart)


def _load(
    data: Path, options: DataOptions, runtime: Runtime, *, need_labels: bool = False, at_least: int = 1
) -> tuple["ImageSet", dict[str, str]]:
    """Reads the images, says what was left out, and checks what training needs before anything expensive starts."""
    from diffcore.data import load_images

    runtime.apply_threads()
    channels = 1 if options.grey else 3
    images = load_images(data, size=options.size, split=options.split, channels=channels, strict=options.strict)
    for name, reason in images.skipped:
        _LOG.warning("left out %s: it %s", printable(name), printable(reason, 200))
    for note in images.notes:
        _LOG.info("%s", note)
    height, width = images.images.shape[-2:]
    if height != width:
        raise UserError(
            f"{printable(data)} has {width} x {height} images; make them square with --size {min(height, width)}"
        )
    if need_labels and images.labels is None:
        raise UserError(
            f"{printable(data)} has no sub-folders, so there are no labels; leave out --class-conditional, "
            "or put the images of each class into a folder of its own"
        )
    if len(images) < at_least:
        raise UserError(f"{printable(data)} has {len(images)} readable image; this command needs at least {at_least}")
    return images, {printable(data.name): images.sha256}


def _check_training(images: "ImageSet", arms: list[Arm], training: TrainSettings, runtime: Runtime) -> None:
    """Refuses settings that do not fit the images, the machine or one another, before a folder is made."""
    from immiscible_noise.build import check_unet

    size = images.images.shape[-1]
    if training.for_image_size(size).network == "unet":
        check_unet(size, training.width)
    processes = runtime.devices * runtime.num_nodes
    if training.batch_size % processes:
        raise UserError(f"--batch-size is {training.batch_size}, which {processes} processes cannot share equally")
    if not training.class_conditional and any(arm.condition != "auto" for arm in arms):
        raise UserError(
            "labels matter to the noise (--condition, arm 'ignore') only in class-conditional training; "
            "add --class-conditional"
        )


def _seen(images: "ImageSet") -> dict[str, Any]:
    shape = "x".join(map(str, images.images.shape[1:]))
    return {"images": len(images), "shape": shape, "classes": len(images.classes)}


def _plan(images: "ImageSet", training: TrainSettings, arms: list[str], seeds: int, folder: Path, json: bool) -> int:
    """Prints what a command would do."""
    from immiscible_noise.train import recipe_for

    recipe = recipe_for(images, Arm(), training, 0)
    parameters = sum(p.numel() for p in recipe.denoiser().parameters())
    runs = len(arms) * seeds
    emit(
        {
            **_seen(images),
            "network": recipe.settings.network,
            "parameters": parameters,
            "trainings": runs,
            "arms": ", ".join(arms),
            "steps_each": training.steps,
            "images_seen_each": training.steps * training.batch_size,
            # Weights, gradients, two Adam moments and the average, in float32.
            "megabytes_of_weights_in_memory": round(parameters * 4 * 5 / 1e6, 1),
            "megabytes_on_disk": round(runs * parameters * 4 * (len(training.snapshot_steps) + 4) / 1e6, 1),
            "writes": folder,
        },
        json,
    )
    return 0
