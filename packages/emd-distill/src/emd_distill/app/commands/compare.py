"""The command that compares losses: compare."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Job, settings
from diffcore.errors import UserError, printable
from emd_distill.app.commands.train import prepare
from emd_distill.app.options_training import (
    LOSS_NAMES,
    ChainOptions,
    LevelOptions,
    LossName,
    ModelName,
    TrainingOptions,
    Work,
)

if TYPE_CHECKING:
    from emd_distill.losses import Loss

Losses = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]
_SAMPLES = 500  # of the teacher, where the number is not given


def compare(
    model: ModelName,
    *,
    losses: Losses = ("emd8", "diff-instruct", "dmd", "sid"),
    prompts: Path | None = None,
    chain: ChainOptions = ChainOptions(),
    levels: LevelOptions = LevelOptions(),
    training: TrainingOptions = TrainingOptions(),
    work: Work = Work(),
) -> int:
    """Train the same generator by several losses, from the same draws, and measure all against the teacher's samples.

    Shortest form: emd-distill compare MODEL --losses emd8 diff-instruct dmd sid

    All are told apart at equal iterations, and at equal seconds of training on this machine: those of the fastest.
    Exit code 1 means that a loss diverged; the others are measured all the same.

    Args:
        losses: Losses by name; emd8 is EM Distillation with eight Langevin steps, emd with those of the options.
        prompts: File of prompts, one a line, for models that take them.
    """
    from emd_distill.app.commands.train import check
    from emd_distill.app.comparing import compare_losses
    from emd_distill.app.report import write_page

    training = replace(training, watch_recall=training.watch_recall or _SAMPLES)
    prepared, digests = prepare(model, prompts, (), levels, training, work)
    arms = {name: training.settings(loss, chain.preset, work.runtime.seed) for name, loss in arms_of(losses, chain)}
    for told in arms.values():
        check(prepared, told)

    def plan() -> dict[str, Any]:
        return {name: prepared.plan(told)["of_these"] for name, told in arms.items()} | {
            "iterations_each": training.steps,
            "samples_of_the_teacher": training.watch_recall,
        }

    config = settings(
        model=model, losses=list(losses), prompts=prompts, chain=chain, levels=levels, training=training,
        loading=work.loading, runtime=work.runtime,
    )  # fmt: skip
    inputs = {prepared.model.name: prepared.model.fingerprint} | digests
    folder = work.output.out or Path("runs") / f"compare-{prepared.model.name}"
    job = Job("emd-distill compare", folder, work.output, config, inputs, ("checkpoint_every",))
    return job(
        lambda run, _: compare_losses(prepared, arms, run),
        plan=plan,
        report=write_page,
        passed=lambda result: not result["failed"],
    )


def arms_of(losses: tuple[str, ...], chain: ChainOptions) -> "list[tuple[str, Loss]]":
    """Returns the losses of a comparison by their names on the command line.

    Args:
        losses: Names; a number after emd is that of its Langevin steps.
        chain: Options of the chains.

    Raises:
        UserError: A name is unknown, or given twice.
    """
    if len(set(losses)) < len(losses) or not losses:
        raise UserError("`losses` must name at least one loss, and none twice")
    found: list[tuple[str, Loss]] = []
    for name in losses:
        steps = re.fullmatch(r"emd(\d{1,4})", name)
        if steps:
            found.append((name, replace(chain, num_langevin_steps=steps[1]).loss("emd")))
            continue
        kind: LossName | None = next((one for one in LOSS_NAMES if one == name), None)
        if kind is None:
            raise UserError(f"{printable(name)!r} is no loss; use emd, emd8 and the like, {', '.join(LOSS_NAMES[1:])}")
        own = chain if kind == "emd" else replace(chain, num_langevin_steps=None)
        found.append((name, own.loss(kind)))
    return found
