"""The commands: each reads its inputs and hands its computation to a job; heavy imports stand inside."""

from pathlib import Path
from typing import Any, Literal

from diffcore.cli import Flag, Job, Output, main, make_app, settings
from diffcore.cli.package_commands import add_package_commands
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from immiscible_noise.app.options import (
    Captions,
    Data,
    Evaluation,
    Features,
    FineTuning,
    Noise,
    Numbers,
    Presets,
    Training,
    seen,
)
from immiscible_noise.coupling import PRESETS, Coupling
from immiscible_noise.study.settings import EvaluationSettings

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
    training: Training = Training(),
    tuning: FineTuning = FineTuning(),
    captions: Captions = Captions(),
    images: Data = Data(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Train a pixel-space model on a folder or zip of images, or fine-tune a trained model on it.

    Shortest form: immiscible-noise train FOLDER --method assignment --size 32

    A LoRA of a Stable Diffusion: immiscible-noise train FOLDER --model MODEL --lora-rank 16

    Writes averaged weights at steps that double up to the last, a sample grid, and resumes when run again. A new U-Net
    lies in RUN/model, a fine-tuned model too, a LoRA in RUN/lora; diffusers loads them.

    Args:
        data: Folder or zip of images; sub-folders are classes.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.app.training import prepare

    runtime.apply_threads()
    work = prepare(data, images, training, tuning, captions, runtime, [noise])
    config = {**settings(data=data, noise=noise, images=images, runtime=runtime), **work.config}
    folder = output.out or Path("runs") / f"train-{data.stem}-{noise.name}"
    job = Job("immiscible-noise train", folder, output, config, work.inputs)
    return job(lambda run, _: work.train(run, noise, runtime), plan=work.plan, report=write_page)


@app.command
def evaluate(
    run: Path,
    data: Path,
    *,
    base: str | None = None,
    evaluation: Evaluation = EvaluationSettings(),
    features: Features = Features(),
    captions: Captions = Captions(),
    images: Data = Data(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure a trained model: Fréchet distance against solver steps and against samples seen.

    Shortest form: immiscible-noise evaluate RUN FOLDER

    Distances are taken in the features of a small classifier that is trained once on the folder's labels (its accuracy
    and hash are printed), or without labels in principal components of the pixels, or in those of --features. A
    fine-tuned model is sampled with the captions of the folder. Images are read at the size of the training.

    Args:
        run: Run folder of train.
        data: Folder or zip of the images that its model was trained on, or of others of the same kind.
        base: Model that was fine-tuned, where it is no longer at the place that the training names.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.app.training import bound_recipe
    from immiscible_noise.study.compare import check_evaluation, evaluate_training

    runtime.apply_threads()
    bound = bound_recipe(run, data, images, captions, runtime, base)
    check_evaluation(bound.recipe, bound.images, evaluation)
    extractor = features.load(runtime)
    groups: dict[str, Any] = {"evaluation": evaluation, "features": features, "captions": captions, "images": images}
    config = settings(run=run, data=data, base=base, runtime=runtime, **groups)
    job = Job("immiscible-noise evaluate", output.out or run / "evaluation", output, config, bound.inputs)

    def compute(part: Any, _: Any) -> dict[str, Any]:
        recipe = bound.with_data(part)
        study = evaluate_training(run, recipe, bound.images, part, evaluation, runtime, extractor=extractor)
        return study.summary()

    return job(
        compute,
        plan=lambda: seen(bound.images) | {"weights_of_steps": bound.recipe.settings.snapshot_steps},
        report=write_page,
    )


@app.command
def compare(
    data: Path,
    *,
    couplings: Presets = ("vanilla", "assignment", "half"),
    seeds: int = 3,
    training: Training = Training(),
    tuning: FineTuning = FineTuning(),
    captions: Captions = Captions(),
    evaluation: Evaluation = EvaluationSettings(),
    features: Features = Features(),
    images: Data = Data(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Train, or fine-tune, with several couplings of noise and images on the same seeds, and show them in one figure.

    Shortest form: immiscible-noise compare FOLDER --couplings vanilla assignment --size 16

    Of a Stable Diffusion: immiscible-noise compare FOLDER --model MODEL --couplings vanilla half --seeds 1

    The trainings of one seed share initial weights, data order and noise, so that they differ by the coupling alone.

    Args:
        data: Folder or zip of images; sub-folders are classes.
        couplings: Any of vanilla, assignment, half (strength 0.5), ignore (labels ignored), knn, knn-inner, early
            (assigned in the first half of the training), flip (assigned, then negated).
        seeds: Number of trainings per coupling.
    """
    from immiscible_noise.app.report import write_page
    from immiscible_noise.app.training import prepare
    from immiscible_noise.study.compare import compare as compare_couplings

    chosen = [PRESETS[name] for name in dict.fromkeys(couplings)]
    if not chosen:
        raise UserError("--couplings names none; give at least one, such as --couplings vanilla assignment")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; give a number of at least 1")
    if evaluation.guidance != 1 and tuning.model is None:
        raise UserError("--guidance is for fine-tuned models; a new one knows no empty condition, leave it out")
    runtime.apply_threads()
    work = prepare(data, images, training, tuning, captions, runtime, chosen, at_least=2)
    extractor = features.load(runtime)

    def compute(run: Any, _: Any) -> dict[str, Any]:
        trainer, numbers = work.trainer(run), range(runtime.seed, runtime.seed + seeds)
        work.diagnose(run, runtime.seed)
        return compare_couplings(
            work.images,
            work.inputs,
            run,
            chosen,
            numbers,
            work.settings,
            evaluation,
            runtime,
            extractor=extractor,
            trainer=trainer,
        ).summary()

    groups: dict[str, Any] = {"evaluation": evaluation, "features": features, "images": images, "runtime": runtime}
    config = {**settings(data=data, couplings=list(couplings), seeds=seeds, **groups), **work.config}
    folder = output.out or Path("runs") / f"compare-{data.stem}"
    job = Job("immiscible-noise compare", folder, output, config, work.inputs)
    return job(compute, plan=lambda: work.plan(seeds), report=write_page)


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
            for buckets of several shapes with `latents.NAME` and `labels.NAME` each, whose samples are numbered in the
            order of the names; or a folder or zip of images for a training in pixel space.
        epochs: Number of shuffled passes over the samples.
        window: Number of upcoming visits that exchange their noises.
        strength: Share of each window that is assigned; 1 is the paper, 0 ordinary noise.
        use_labels: Exchange noise inside a label only; needed where the network is told the label.
        normalisation: symmetric (pixels in [-1, 1]) or standard (mean 0, variance 1); latents stay as they are.
        seed: Number that fixes order and noise.
    """
    from immiscible_noise.app.planning import build_plan
    from immiscible_noise.app.report import write_page
    from immiscible_noise.app.samples import read_samples

    if epochs < 1:
        raise UserError(f"--epochs is {epochs}; give a number of at least 1")
    if window < 2:
        raise UserError(f"--window is {window}; give a number of at least 2: one visit has nothing to exchange")
    if not 0 <= strength <= 1:
        raise UserError(f"--strength is {strength}; give a share from 0 to 1")
    samples = read_samples(data, images, normalisation)
    if use_labels and samples.labels is None:
        raise UserError(
            f"{data} has no labels for --use-labels: a file of latents needs a tensor `labels`, images a sub-folder "
            "for each class"
        )
    given = {"epochs": epochs, "window": window, "strength": strength, "use_labels": use_labels, "seed": seed}
    config = settings(data=data, **given, normalisation=normalisation, images=images)
    folder = output.out or Path("runs") / f"plan-{data.stem}"
    labels = samples.labels if use_labels else None
    return Job("immiscible-noise plan", folder, output, config, samples.inputs)(
        lambda run, _: build_plan(samples.x0, labels, run, epochs=epochs, window=window, strength=strength, seed=seed),
        plan=lambda: {"samples": len(samples.x0), "shape": samples.shapes, **given},
        report=write_page,
    )


@app.command
def diagnose(
    data: Path,
    *,
    batch_sizes: Numbers = (64, 256, 1024),
    k: int = 4,
    model: str | None = None,
    images: Data = Data(),
    normalisation: Literal["symmetric", "standard"] = "symmetric",
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure, before any training, what assigning noise would do to your images or latents, and get a recommendation.

    Shortest form: immiscible-noise diagnose FOLDER --size 32

    Reports by batch size: how far the distance between image and noise falls, how Gaussian the noise stays, and how
    much of the class it gives away.

    Args:
        data: Folder or zip of images, whose sub-folders are classes; or cached latents, a safetensors file with a
            tensor `latents` (samples, ...) and perhaps integers `labels`.
        batch_sizes: Numbers of images per batch that are tried.
        k: Number of draws per image for nearest-of-k selection.
        model: Model whose codec decodes latents for the report; without it the means of their channels are shown.
        normalisation: symmetric (pixels in [-1, 1]) or standard (mean 0, variance 1); latents stay as they are.
    """
    from immiscible_noise.app.diagnosing import diagnose_data, shown_samples
    from immiscible_noise.app.report import write_page
    from immiscible_noise.app.samples import read_samples

    if k < 1:
        raise UserError(f"--k is {k}; give the number of noise draws per image, at least 1")
    if not batch_sizes or min(batch_sizes) < 2:
        given = " ".join(map(str, batch_sizes)) or "empty"
        raise UserError(f"--batch-sizes is {given}; give numbers of at least 2: one image has nothing to exchange")
    _ = runtime.torch_dtype  # refuses what this machine cannot do before anything is read
    runtime.apply_threads()
    samples = read_samples(data, images, normalisation, at_least=2)
    shown = shown_samples(samples, model, runtime)
    given = {"batch_sizes": list(batch_sizes), "k": k, "model": model, "normalisation": normalisation}
    config = settings(data=data, **given, images=images, runtime=runtime)
    folder = output.out or Path("runs") / f"diagnose-{data.stem}"
    return Job("immiscible-noise diagnose", folder, output, config, samples.inputs)(
        lambda run, _: diagnose_data(samples, run, batch_sizes, k, runtime.seed, shown),
        plan=lambda: {"images": len(samples.x0), "shape": samples.shapes},
        report=write_page,
    )
