"""The command that looks before training: doctor."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Loading, Output
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from emd_distill.app.options import Planned
from emd_distill.app.options_training import ChainOptions, LevelOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffcore.run import Run, RunMap
    from emd_distill.app.teachers import Teacher


def doctor(
    teacher: Annotated[str, Parameter(help="Teacher: a model, or digits for the one that ships with this package.")],
    *,
    data: Path | None = None,
    prompts: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    chain: ChainOptions = ChainOptions(),
    levels: LevelOptions = LevelOptions(),
    planned: Planned = Planned(),
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Check a teacher and the settings of a training before it costs anything.

    Shortest form: emd-distill doctor TEACHER

    Looks at samples of iteration 0 over lambda*, the prediction type (with --data), the schedule's ends, the memory,
    and the largest stable step of the latents, all for a training with the same options. Exit code 1 means that
    something is wrong.

    Args:
        data: Folder of images like those that the teacher was trained on; they tell prediction types apart.
        prompts: Prompts that the samples take in turn, for teachers that take prompts.
    """
    from diffcore.cli import Job
    from diffcore.cli.app import settings
    from diffcore.run import input_hash
    from emd_distill.app.checking import compute as check
    from emd_distill.app.report import write_page
    from emd_distill.app.teachers import read_teacher
    from emd_distill.generator import OneStepGenerator

    known = read_teacher(teacher, loading, runtime, prompts)
    images = _data(known, data)
    loss = chain.emd()
    levels.sampler(known.denoiser.schedule)  # refuses what is no range
    try:
        generator = OneStepGenerator(known.denoiser, levels.level(known.denoiser.schedule))
    except ValueError as error:
        raise UserError(str(error).replace("`t`", "`timestep`")) from error

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        return check(run, known, generator, loss, planned, high=levels.high, data=images)

    job = Job(
        "emd-distill doctor",
        output.out or Path("runs") / f"doctor-{known.name}",
        output,
        settings(
            teacher=teacher,
            data=data,
            prompts=prompts,
            chain=chain,
            levels=levels,
            planned=planned,
            loading=loading,
            runtime=runtime,
        ),
        {known.name: known.fingerprint} | ({} if data is None else {"data": input_hash(data)}),
        (),
    )
    plan = {"teacher": known.name, "images": 0 if images is None else len(images)}

    def shown(result: "Mapping[str, Any]") -> dict[str, Any]:
        return {**result, "problems": "; ".join(result["problems"]) or "none"}

    return job(compute, plan=plan, report=write_page, passed=lambda result: not result["problems"], shown=shown)


def _data(teacher: "Teacher", folder: Path | None) -> "Tensor | None":
    """Returns clean samples: the digits' own, or images of a folder as the model encodes them."""
    from emd_distill.app.teachers import DIGITS, clean_samples

    if folder is None and teacher.name != DIGITS:
        return None
    return clean_samples(teacher, folder)
