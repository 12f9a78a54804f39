"""The commands that use a trained generator: sample and evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Job, LoadingAny, Output, settings
from diffcore.errors import ModelNotFoundError, UserError, printable
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor

    from diffcore.denoiser import Condition
    from diffcore.models import DiffusionModel
    from diffcore.run import Run
    from emd_distill.generator import OneStepGenerator

Texts = Annotated[tuple[str, ...], Parameter(negative="")]
Teacher = Annotated[
    str | None, Parameter(name="--model", help="Teacher, where it was moved since the training.", group="Model")
]

_SHOWN = 20  # largest number of rows and of columns of a grid


def sample(
    generator: Path,
    prompts: Texts = (),
    *,
    count: int = 1,
    batch_size: int = 64,
    model: Teacher = None,
    loading: LoadingAny = LoadingAny(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Draw images with a trained generator, in one step each, as PNG files, and the first of them in a grid.

    Shortest form: emd-distill sample RUN

    Image i depends on the seed, i and its prompt or class alone.

    Args:
        generator: Run folder of train, or the folder generator in it.
        prompts: One or more prompts; a model of classes draws each class.
        count: Number of images of each prompt or class; of all where the model takes neither.
        batch_size: Number of images in one call of the network.
    """
    from diffcore.report import image_grid
    from emd_distill.app.evaluating import Picture
    from emd_distill.conditions import num_classes
    from emd_distill.quality import drawn_images

    for name, number in (("count", count), ("batch_size", batch_size)):
        if number < 1:
            raise UserError(f"`{name}` is {number}; give at least 1")
    network, teacher, _, inputs = _loaded(generator, model, loading, runtime)
    table = _table(teacher, prompts)
    kinds = len(next(iter(table.values()))) if table else 1
    total = kinds * count

    def compute(run: "Run", _: Any) -> dict[str, Any]:
        if not run.has("images"):
            condition = _rows(table, total, each=count)
            drawn = drawn_images(teacher, network, condition, total, seed=runtime.seed, batch_size=batch_size)
            run.save("images", {"images": drawn})
        images = run.load("images").tensors["images"]
        for place, image in enumerate(images):
            run.figure(f"image-{place:05d}", Picture(image))
        shown, columns = first_of(images, kinds)
        run.figure("grid", image_grid(shown, columns=columns))
        return {"images": total, "pixels": "x".join(map(str, images.shape[1:])), "grid": "figures/grid.png"}

    config = settings(
        generator=generator, prompts=list(prompts), count=count, batch_size=batch_size, model=model, loading=loading,
        runtime=runtime,
    )  # fmt: skip
    folder = output.out or Path("runs") / f"sample-{generator.name}"
    job = Job("emd-distill sample", folder, output, config, inputs, ("batch_size",))
    plan: dict[str, Any] = {"images": total, "network_calls_for_each": 1, "level": network.t}
    if "class_labels" in table:
        plan["classes"] = num_classes(teacher)
    return job(compute, plan=plan)


def evaluate(
    generator: Path,
    images: Path | None = None,
    *,
    prompts: Path | None = None,
    count: int = 1000,
    teacher_steps: int | None = None,
    guidance_scale: float | None = None,
    features: str | None = None,
    batch_size: int = 64,
    model: Teacher = None,
    loading: LoadingAny = LoadingAny(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Measure a trained generator against its teacher's samples, or against a folder of images.

    Shortest form: emd-distill evaluate RUN

    Fréchet distance, precision, recall and coverage with five neighbours, for the generator, for the teacher in one
    step, and for a second set of the teacher's samples, which is as near as can be.

    Args:
        generator: Run folder of train, or the folder generator in it.
        images: Folder or zip of images to measure against; by default the teacher's samples.
        prompts: File of prompts, one a line, for models that take them, which need it.
        count: Number of images of each side.
        teacher_steps: Number of solver steps of the teacher; by default 18 for EDM networks and 50 for others.
        guidance_scale: Strength of the teacher's guidance; by default that of the training.
        features: Features of the measures: pixels, or an extractor such as random:0 or dino:FOLDER; by default
            pixels for images up to 32 x 32 and random:0 for larger ones.
        batch_size: Number of images in one call of a network.
    """
    from emd_distill.app.evaluating import Evaluation, reference_of
    from emd_distill.app.prompts import read_prompts
    from emd_distill.app.report import write_page
    from emd_distill.quality import LEAST

    if count < LEAST:
        raise UserError(f"`count` is {count}; five neighbours need at least {LEAST} images")
    if batch_size < 1:
        raise UserError(f"`batch_size` is {batch_size}; give at least 1")
    network, teacher, facts, inputs = _loaded(generator, model, loading, runtime)
    read = None if prompts is None else read_prompts(prompts)
    table = _table(teacher, () if read is None else read.distinct)
    trained = facts.get("settings", {})
    scale = float(trained.get("guidance_scale") or 1.0) if guidance_scale is None else guidance_scale
    told, more = reference_of(images, teacher)
    evaluation = Evaluation(
        teacher,
        network,
        _rows(table, 2 * count),
        count,
        runtime,
        told,
        scale,
        teacher_steps,
        features,
        batch_size,
        loading.allow_pickle,
    )
    evaluation.check()
    config = settings(
        generator=generator, images=images, prompts=prompts, count=count, teacher_steps=teacher_steps,
        guidance_scale=scale, features=features, batch_size=batch_size, model=model, loading=loading, runtime=runtime,
    )  # fmt: skip
    digests = inputs | more | ({} if read is None else {printable(read.path.name): read.sha256})
    folder = output.out or Path("runs") / f"evaluate-{generator.name}"
    job = Job("emd-distill evaluate", folder, output, config, digests, ("batch_size",))
    return job(lambda run, _: evaluation(run), plan=evaluation.plan, report=write_page)


def _loaded(
    folder: Path, model: str | None, loading: LoadingAny, runtime: Runtime
) -> "tuple[OneStepGenerator, DiffusionModel, Mapping[str, Any], dict[str, str]]":
    """Returns a trained generator, its teacher, what its file says of it, and the digests of both."""
    from dataclasses import asdict

    from diffcore.run import input_hash
    from emd_distill.files.generators import load_generator, weights_of

    runtime.apply_threads()
    weights = weights_of(folder)
    if weights is None:
        raise UserError(f"{printable(folder, 300)} holds no generator; give the run folder of a finished training")
    try:
        loaded = load_generator(folder, model, runtime=runtime, **asdict(loading))
    except ModelNotFoundError as error:
        if model is not None:
            raise
        raise ModelNotFoundError(
            f"the teacher of {printable(folder, 300)} was not found: {error}. If it was moved, or the training was "
            "started in another folder, point to it with `model`"
        ) from error
    assert loaded.model is not None
    inputs = {loaded.model.name: loaded.model.fingerprint, "generator": input_hash(weights)}
    return loaded.generator, loaded.model, loaded.facts, inputs


def _table(model: "DiffusionModel", prompts: tuple[str, ...]) -> "Condition":
    from emd_distill.conditions import condition_table

    return condition_table(model, prompts)


def first_of(images: "Tensor", kinds: int) -> "tuple[Tensor, int | None]":
    """Returns the images of a grid that can be looked at, and its columns: a row for each prompt or class.

    Args:
        images: All images, those of each prompt or class in turn.
        kinds: Number of prompts or classes.
    """
    each = len(images) // kinds
    if kinds == 1 or each == 1:
        return images[: _SHOWN * _SHOWN], None
    return images.unflatten(0, (kinds, each))[:_SHOWN, :_SHOWN].flatten(0, 1), min(each, _SHOWN)


def _rows(table: "Condition", total: int, *, each: int = 1) -> "Condition":
    """Returns so many rows of a table, each condition so many times before the next, in turn."""
    import torch

    place = torch.arange(total) // each
    return {name: value[(place % len(value)).to(value.device)] for name, value in table.items()}
