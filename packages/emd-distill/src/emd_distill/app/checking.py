"""What the command doctor computes, its verdict, and its page."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from diffcore.errors import printable
from diffcore.noise import philox_normal
from diffcore.report import Report
from diffcore.run import Run
from emd_distill.app.options import Planned
from emd_distill.app.teachers import Teacher
from emd_distill.doctor import (
    LAMBDAS,
    check_prediction_type,
    largest_steps,
    memory_estimate,
    schedule_problems,
    starts,
)
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD

_RATIOS = (0.03, 0.1, 0.5, 2.0, 10.0)
_ROWS, _LATENTS = 8, 2


def compute(
    run: Run,
    teacher: Teacher,
    generator: OneStepGenerator,
    loss: EMD,
    planned: Planned,
    *,
    high: float | None,
    data: Tensor | None,
) -> dict[str, Any]:
    """Runs all checks, keeps what the page shows, and returns the verdict.

    Args:
        run: Run that the pictures and tables are kept in.
        teacher: Teacher that training would start from.
        generator: The teacher, called once at the level of that training.
        loss: Loss of that training, with its chain.
        planned: Batch size, rank and memory of that training.
        high: Largest sigma / alpha that the training draws; None for the teacher's.
        data: Clean samples that tell prediction types apart, with the conditions of rows in turn; None leaves that out.
    """
    denoiser, given = teacher.denoiser, teacher.given(_ROWS)
    t = generator.t
    problems = list(
        schedule_problems(denoiser.schedule, denoiser.prediction_type, t=t, high=high, weighting=loss.weighting)
    )
    found = starts(denoiser, teacher.shape, given, lambdas=LAMBDAS, count=_ROWS)
    problems += [f"samples at lambda* = {one.log_snr:.1f} are not finite" for one in found if not _finite(one.samples)]
    if not any("not finite" in line for line in problems):
        with torch.no_grad():
            shown = torch.stack([teacher.to_pictures(one.samples.float()).cpu() for one in found])
        labels = [f"lambda* {one.log_snr:.1f}" for one in found]
        run.save("starts", {"pictures": shown}, labels=labels)
    kind = None
    if data is not None:
        kind = check_prediction_type(denoiser, data, teacher.given(len(data)))
        if not kind.matches:
            problems.append(
                f"the teacher is stated to predict {kind.stated}, and denoises data best as {kind.best}; load it with "
                f"prediction type {kind.best}"
            )
        rows = [{"taken for": name, "error": value} for name, value in kind.errors.items()]
        run.keep_table(
            "prediction", rows, "Mean squared error of denoised data in units of their variance: the true type has the "
            "smallest.",
        )  # fmt: skip
    memory = memory_estimate(
        denoiser, teacher.shape, given, num_steps=loss.most_steps, batch_size=planned.batch_size,
        gamma_z=loss.gamma_z > 0, lora_rank=planned.lora_rank,
    )  # fmt: skip
    if planned.memory is not None and memory.gibibytes > planned.memory:
        problems.append(
            f"training takes about {memory.gibibytes:.1f} GiB, more than the {planned.memory:g} GiB there are; take a "
            f"smaller batch or fewer steps{'' if planned.lora_rank else ', or a LoRA, such as lora_rank 64'}"
        )
    z = philox_normal(_ROWS, torch.arange(_LATENTS), teacher.shape).to(next(denoiser.parameters()).device)
    limits = largest_steps(
        generator, denoiser.schedule, z, teacher.given(_LATENTS), ratios=_RATIOS, kappa=loss.kappa, iterations=10
    )
    for limit in limits:
        if loss.gamma_z > limit.levelled:
            problems.append(
                f"gamma_z = {loss.gamma_z:g} is above the largest stable step {limit.levelled:.2g} at "
                f"sigma / alpha = {limit.ratio:g}; take a smaller one"
            )
            break
    _keep_tables(run, memory, limits)
    smallest = min(limit.levelled for limit in limits)
    answer = (
        "Nothing stands against training." if not problems else f"{len(problems)} in need of repair: {problems[0]}."
    )
    return {
        "answer": answer,
        "problems": problems,
        "t_of_the_call": t,
        "prediction_type": None if kind is None else kind.best,
        "gibibytes": round(memory.gibibytes, 3),
        "largest_gamma_z": smallest,
        "jacobian": limits[0].jacobian,
        "spread": {f"{one.log_snr:.1f}": one.spread for one in found},
    }


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _keep_tables(run: Run, memory: Any, limits: Any) -> None:
    rows = [
        {"part": name.replace("_", " "), "MiB": round(value / 2**20, 2)} for name, value in asdict(memory).items()
    ]  # fmt: skip
    run.keep_table("memory", rows, "Parameters are counted, activations measured on one row; what the allocator wastes "
                   "comes on top.")  # fmt: skip
    rows = [
        {
            "sigma / alpha": limit.ratio,
            "largest gamma_z, kappa = 0": float(f"{limit.constant:.3g}"),
            "with the step that depends on the level": float(f"{limit.levelled:.3g}"),
        }
        for limit in limits
    ]
    caption = (
        f"Largest stable step of the latents, from the largest singular value {limits[0].jacobian:.3g} of the "
        "generator's Jacobian at the start; it changes in training."
    )
    run.keep_table("steps", rows, caption)


def add_sections(report: Report, run: Run) -> None:
    """Adds what a run of doctor shows.

    Args:
        report: Page that is written.
        run: Run that the page is about.
    """
    if not run.has("table-memory"):
        return
    if run.finished and run.result["problems"]:
        report.section("In need of repair").points(*(printable(line, 400) for line in run.result["problems"]))
    if run.has("starts"):
        part = run.load("starts")
        pictures = part.tensors["pictures"]
        report.section("Samples before any training").images(
            pictures.flatten(0, 1),
            "What the teacher draws in one call, with the same latents in each row. Choose a level at which they are "
            "structured: too high, they keep the latents' noise; too low, all are the mean of the data.",
            columns=pictures.shape[1],
            row_labels=part.fields["labels"],
        )
    report.kept_table("prediction", "What the network predicts")
    report.kept_table("steps", "How large a step of the latents may be")
    report.kept_table("memory", "Memory of a training")
