"""The commands: each reads its inputs and hands its computation to a job; heavy imports stand inside."""

from pathlib import Path
from typing import Any, Literal

from diffcore.cli import Flag, Job, Output, main, make_app, settings
from diffcore.cli.package_commands import add_package_commands
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from immiscible_noise.app.options import (
    Data,
    Evaluation,
    Noise,
    Numbers,
    Presets,
    Training,
    check_training,
    plan_of_trainings,
    seen,
)
from immiscible_noise.coupling import PRESETS, Coupling
from immiscible_noise.study.settings import EvaluationSettings, TrainSettings

app = make_app(
    "immiscible-noise",
    "Train diffusion and flow models faster by assigning noise to images inside the batch.\n\n"
    "Start with: immiscible-noise demo",
    "immiscible-noise",
)
add_package_commands(app, timed="the assignment on this machine against the published code and other trainers'")


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-immiscible-noise"), full: Flag = False, json: Flag = False) -> int:
    """See the effect on 1797 real handwritten digits: three couplings, images and numbers; a minute on two cores.

    Shortest form: immiscible-noise demo

    Exit code 1 means that the effect was not there: assignment above 0.75 of the vanilla Fréchet distance at 5 solver
    steps, or a class-conditional accuracy of 0.98 or less with labels respected.

    Args:
        out: Run folder of the demo.
        full: Train twice as long, as the benchmark does.
        json: Print the result as one JSON object.
    """
    from immiscible_noise.app import demo as tour
    from immiscible_noise.app.report import write_page

    images = tour.load_digits()
    job = Job("immiscible-noise demo", out, Output(json=json), {"full": full, "seed": 0}, {"digits": images.sha256})
    return job(
        lambda run, _: tour.tour(images, run, full=full),
        plan={},
        report=write_page,
        passed=lambda result: result["passed"],
    )


@app.command
def train(
    data: Path,
    *,
    noise: Noise = Coupling(),
    training: Training = TrainSettings(),
    images: Data = Data(),
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
    from immiscible_noise.study.export import export_model
    from immiscible_noise.study.train import train as train_model

    runtime.apply_threads()
    loaded, inputs = images.read(data)
    check_training(loaded, [noise], training, runtime)

    def compute(run: Any, _: Any) -> dict[str, Any]:
        recipe = train_model(loaded, run, noise, training, runtime)
        if run.leading and recipe.settings.network == "unet":
            export_model(recipe, run)
        return {"coupling": noise.name, "steps": training.steps, "images": len(loaded)}

    config = settings(data=data, noise=noise, training=training, images=images, runtime=runtime)
    folder = output.out or Path("runs") / f"train-{data.stem}-{noise.name}"
    job = Job("immiscible-noise train", folder, output, config, inputs)
    return job(compute, plan=lambda: plan_of_trainings(loaded, training, [noise]), report=write_page)


@app.command
def evaluate(
    model: Path,
    data: Path,
    *,
    evaluation: Evaluation = EvaluationSettings(),
    images: Data = Data(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure a trained model: Fréchet distance against solver steps and against samples seen.

    Shortest form: immiscible-noise evaluate RUN FOLDER

    Distances are taken in the features of a small classifier that is trained once on the folder's labels (its accuracy
    and hash are printed), or without labels in principal components of the pixels.

    Args:
        model: Run folder of train.
        data: Folder or zip of the images it was trained on, or of others of the same kind.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.study.compare import evaluate_training
    from immiscible_noise.study.train import read_recipe

    runtime.apply_threads()
    loaded, inputs = images.read(data, at_least=2)
    config = settings(model=model, data=data, evaluation=evaluation, images=images, runtime=runtime)
    job = Job("immiscible-noise evaluate", output.out or model / "evaluation", output, config, inputs)
    return job(
        lambda run, _: evaluate_training(model, loaded, run, evaluation, runtime).summary(),
        plan=lambda: seen(loaded) | {"weights_of_steps": read_recipe(model).settings.snapshot_steps},
        report=write_page,
    )


@app.command
def compare(
    data: Path,
    *,
    couplings: Presets = ("vanilla", "assignment", "half"),
    seeds: int = 3,
    training: Training = TrainSettings(),
    evaluation: Evaluation = EvaluationSettings(),
    images: Data = Data(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Train with several couplings of noise and images on the same seeds and show them in one figure.

    Shortest form: immiscible-noise compare FOLDER --couplings vanilla assignment --size 16

    The trainings of one seed share initial weights, data order and noise, so that they differ by the coupling alone.

    Args:
        data: Folder or zip of images; sub-folders are classes.
        couplings: Any of vanilla, assignment, half (strength 0.5), ignore (labels ignored), knn, knn-inner, early
            (assigned in the first half of the training), flip (assigned, then negated).
        seeds: Number of trainings per coupling.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.study.compare import compare as compare_couplings
    from immiscible_noise.study.diagnosis import diagnose_images

    chosen = [PRESETS[name] for name in dict.fromkeys(couplings)]
    if not chosen:
        raise UserError("--couplings names none; give at least one, such as --couplings vanilla assignment")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; give a number of at least 1")
    runtime.apply_threads()
    loaded, inputs = images.read(data, at_least=2)
    check_training(loaded, chosen, training, runtime)
    first = runtime.seed

    def compute(run: Any, _: Any) -> dict[str, Any]:
        diagnose_images(loaded, run, (training.batch_size,), 4, training.normalisation, first)
        numbers = range(first, first + seeds)
        return compare_couplings(loaded, inputs, run, chosen, numbers, training, evaluation, runtime).summary()

    groups: dict[str, Any] = {"training": training, "evaluation": evaluation, "images": images, "runtime": runtime}
    config = settings(data=data, couplings=list(couplings), seeds=seeds, **groups)
    folder = output.out or Path("runs") / f"compare-{data.stem}"
    job = Job("immiscible-noise compare", folder, output, config, inputs)
    return job(compute, plan=lambda: plan_of_trainings(loaded, training, chosen, seeds), report=write_page)


@app.command
def plan(
    data: Path,
    *,
    epochs: int = 1,
    window: int = 1024,
    strength: float = 1.0,
    use_labels: Flag = False,
    images: Data = Data(),
    normalisation: Literal["symmetric", "standard"] = "symmetric",
    seed: int = 0,
    output: Output = Output(),
) -> int:
    """Choose the noise of every visit of a training ahead, so that batches of one gain what large ones do.

    Shortest form: immiscible-noise plan LATENTS.safetensors

    Writes plan.safetensors into the run folder: the order of the samples, and for each visit the seed of its noise. A
    trainer takes the order as its sampler and the noise of a visit from `read_plan(path).noise(visits, like=x)`.

    Args:
        data: Cached latents, a safetensors file with a tensor `latents` (samples, ...) and perhaps integers `labels`;
            or a folder or zip of images for a training in pixel space.
        epochs: Number of shuffled passes over the samples.
        window: Number of upcoming visits that exchange their noises.
        strength: Share of each window that is assigned; 1 is the paper, 0 ordinary noise.
        use_labels: Exchange noise inside a label only; needed where the network is told the label.
        normalisation: symmetric (pixels in [-1, 1]) or standard (mean 0, variance 1); latents stay as they are.
        seed: Number that fixes order and noise.
    """
    from immiscible_noise.app.planning import build_plan, read_samples
    from immiscible_noise.app.report import write_page

    for name, value in (("--epochs", epochs), ("--window", window)):
        if value < 1:
            raise UserError(f"{name} is {value}; give a number of at least 1")
    if not 0 <= strength <= 1:
        raise UserError(f"--strength is {strength}; give a share from 0 to 1")
    samples, labels, inputs = read_samples(data, images, normalisation)
    if use_labels and labels is None:
        raise UserError(
            f"{data} has no labels for --use-labels: a file of latents needs a tensor `labels`, images a sub-folder "
            "for each class"
        )
    given = {"epochs": epochs, "window": window, "strength": strength, "use_labels": use_labels, "seed": seed}
    config = settings(data=data, **given, normalisation=normalisation, images=images)
    folder = output.out or Path("runs") / f"plan-{data.stem}"
    return Job("immiscible-noise plan", folder, output, config, inputs)(
        lambda run, _: build_plan(
            samples, labels if use_labels else None, run, epochs=epochs, window=window, strength=strength, seed=seed
        ),
        plan=lambda: {"samples": len(samples), "shape": "x".join(map(str, samples.shape[1:])), **given},
        report=write_page,
    )


@app.command
def diagnose(
    data: Path,
    *,
    batch_sizes: Numbers = (64, 256, 1024),
    k: int = 4,
    images: Data = Data(),
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
        batch_sizes: Numbers of images per batch that are tried.
        k: Number of draws per image for nearest-of-k selection.
        normalisation: symmetric (pixels in [-1, 1]) or standard (mean 0, variance 1).
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.study.diagnosis import diagnose_images

    if k < 1:
        raise UserError(f"--k is {k}; give the number of noise draws per image, at least 1")
    if not batch_sizes or min(batch_sizes) < 2:
        raise UserError(
            f"--batch-sizes is {batch_sizes}; give numbers of at least 2: one image has nothing to exchange"
        )
    runtime.apply_threads()
    loaded, inputs = images.read(data, at_least=2)

    def compute(run: Any, _: Any) -> dict[str, Any]:
        result = diagnose_images(loaded, run, batch_sizes, k, normalisation, runtime.seed)
        advice = PRESETS[result["coupling"]]
        options = f"--method {advice.method}"
        if advice.method == "assignment":
            labelled = "" if loaded.labels is None else " --class-conditional --condition block"
            options += f" --strength {advice.strength:g}{labelled}"
        return {"options_of_train": options, **result}

    config = settings(
        data=data, batch_sizes=list(batch_sizes), k=k, normalisation=normalisation, images=images, runtime=runtime
    )
    folder = output.out or Path("runs") / f"diagnose-{data.stem}"
    return Job("immiscible-noise diagnose", folder, output, config, inputs)(
        compute, plan=lambda: seen(loaded), report=write_page
    )
