"""The command that makes a generator: train."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Job, settings
from diffcore.errors import UserError, printable
from emd_distill.app.options_training import (
    ChainOptions,
    LevelOptions,
    LossName,
    ModelName,
    TrainingOptions,
    Work,
)

if TYPE_CHECKING:
    from diffcore.run import Run
    from emd_distill.app.training import Training

Texts = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


def train(
    model: ModelName,
    *,
    loss: LossName = "emd",
    prompts: Path | None = None,
    validation_prompts: Texts = (),
    chain: ChainOptions = ChainOptions(),
    levels: LevelOptions = LevelOptions(),
    training: TrainingOptions = TrainingOptions(),
    work: Work = Work(),
) -> int:
    """Train a one-step generator from a many-step teacher; no images are needed.

    Shortest form: emd-distill train MODEL --out RUN

    A model of classes learns all of them in turn, a model of prompts those of a file. What tells convergence is the
    drift, which is logged in five bins of noise levels, and not the loss. The same command again goes on where it
    stopped. The averaged generator lies in RUN/generator; sample and evaluate take RUN.

    Args:
        loss: EM Distillation, or a loss that it competes with, from the same draws.
        prompts: File of prompts, one a line, for models that take them; each is encoded once.
        validation_prompts: Prompts of the sample grids; by default the first of the file.
    """
    from emd_distill.app.report import write_page
    from emd_distill.app.training import keep_reference, train_generator

    prepared, digests = prepare(model, prompts, validation_prompts, levels, training, work)
    told = training.settings(chain.loss(loss), chain.preset, work.runtime.seed)
    check(prepared, told)

    def compute(run: "Run", _: Any) -> dict[str, Any]:
        keep_reference(prepared, run)
        facts = settings(loss=loss, chain=chain, levels=levels, training=training)
        result = train_generator(prepared, told, run, facts={"settings": facts})
        warning = warning_of(run)
        rates = {"learning_rate": told.learning_rate, "student_learning_rate": told.student_learning_rate}
        answer = {"answer": _sentence(result, warning), **result, "loss": loss, **rates}
        return answer | ({"warning": warning} if warning else {})

    config = settings(
        model=model, loss=loss, prompts=prompts, validation_prompts=list(validation_prompts),
        chain=chain, levels=levels, training=training, loading=work.loading, runtime=work.runtime,
    )  # fmt: skip
    inputs = {prepared.model.name: prepared.model.fingerprint} | digests
    folder = work.output.out or Path("runs") / f"train-{prepared.model.name}-{loss}"
    job = Job("emd-distill train", folder, work.output, config, inputs, ("checkpoint_every",))
    return job(compute, plan=lambda: prepared.plan(told), report=write_page)


def _sentence(result: dict[str, Any], warning: str | None) -> str:
    """Returns the result of a training in words."""
    told = f"The generator has learned for {result['iterations']:,} iterations and lies in the folder generator"
    if scores := result.get("scores"):
        told += (
            f"; against the teacher's samples its Fréchet distance is {scores['distance']:.3g}, its recall "
            f"{scores['recall']:.2f}"
        )
    return f"{told}.{f' Warning: {warning}.' if warning else ''}"


def prepare(
    model: str,
    prompts: Path | None,
    validation_prompts: tuple[str, ...],
    levels: LevelOptions,
    training: TrainingOptions,
    work: Work,
) -> "tuple[Training, dict[str, str]]":
    """Returns the teacher with all that a training needs besides its loss, and the digests of what was read.

    Args:
        model: Name of the teacher on the command line.
        prompts: File of prompts, one a line.
        validation_prompts: Prompts of the sample grids.
        levels: Options of the noise levels.
        training: Options of the training.
        work: Options that say how the model is read, and where it runs.

    Raises:
        UserError: Model and options do not go together.
    """
    from diffcore.cli import load_model
    from emd_distill.app.prompts import read_prompts
    from emd_distill.app.training import Training
    from emd_distill.conditions import condition_table

    if work.runtime.dtype == "float16":
        raise UserError("float16 lets the difference of two scores overflow or vanish; take --dtype bfloat16")
    read = None if prompts is None else read_prompts(prompts)
    loaded = load_model(model, work.loading, replace(work.runtime, dtype="float32"))  # weights that learn are float32
    texts = () if read is None else read.distinct
    table, shown = condition_table(loaded, texts), {}
    if validation_prompts:
        if loaded.prompts is None:
            raise UserError(f"{printable(loaded.name)} takes no prompts; leave out --validation-prompts")
        shown = condition_table(loaded, validation_prompts)
    count = len(next(iter(table.values()))) if table else 0
    kind = "prompts" if texts else "classes"
    captions = f"{count:,} {kind}" if table else "none"
    level, sampler = levels.level(loaded.denoiser.schedule), levels.sampler(loaded.denoiser.schedule)
    made = Training(
        loaded, model, table, level, sampler, training, work.runtime, shown, captions, work.loading.allow_pickle
    )
    return made, {} if read is None else {printable(read.path.name): read.sha256}


def check(prepared: "Training", told: Any) -> None:
    """Raises an error where settings and model do not go together, before a folder is made.

    Args:
        prepared: Teacher, conditions and options.
        told: Settings of the training.

    Raises:
        UserError: The levels do not suit the loss, the generator cannot be made, there are no such features, or the
            batch cannot be shared.
    """
    from emd_distill.distill import check_levels, guided_student

    _ = prepared.generator()
    guided_student(prepared.model.denoiser, prepared.teacher, told.student_guidance)
    check_levels(prepared.model.denoiser, prepared.time_sampler, told.loss)
    if prepared.options.watch_recall:
        prepared.features()
    processes = prepared.runtime.devices * prepared.runtime.num_nodes
    if told.batch_size % processes:
        raise UserError(f"--batch-size is {told.batch_size}, no multiple of the {processes} processes")


def warning_of(run: "Run", prefix: str = "") -> str | None:
    """Returns the warning that modes were lost while quality rose, where that is so.

    Args:
        run: Run folder of a training.
        prefix: Beginning of the names of parts.
    """
    from emd_distill.app.training import scored
    from emd_distill.quality import losing_modes

    return losing_modes(scored(run, prefix))
