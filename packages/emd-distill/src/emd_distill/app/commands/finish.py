"""The commands that use a trained generator: export, correct."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, Loading, Output, emit, load_model
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from emd_distill.app.options import CorrectionOptions

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap

TeacherName = Annotated[str, Parameter(help="Teacher: pipeline or backbone folder, safetensors file, or zoo:NAME.")]
GeneratorPath = Annotated[
    Path, Parameter(help="Generator: run folder of train, its safetensors file, or a folder that export wrote.")
]


def export(
    model: TeacherName,
    generator: GeneratorPath,
    *,
    out: Path,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    lora: Flag = False,
    licence: str | None = None,
    verify: bool = True,
    dry_run: Flag = False,
    json: Flag = False,
    loading: Loading = Loading(),
) -> int:
    """Write a generator as an ordinary folder of diffusers that draws in one step, and check that it does.

    Shortest form: emd-distill export MODEL RUN --out FOLDER

    Args:
        out: New folder of the model; nothing may be there.
        dtype: Precision of the written weights.
        lora: Write a generator that was trained with --lora-rank as a small LoRA file for load_lora_weights, with its
            scheduler; without this flag it is merged into the whole model.
        licence: Licence of the teacher's weights, such as openrail++, for the card; it binds the generator too.
        verify: Read the folder back and compare what it draws with the generator.
        dry_run: Print what would be written, and do nothing.
        json: Print the result as one JSON object.
    """
    from emd_distill.files.export import export as whole
    from emd_distill.files.export import export_lora, refuse_taken
    from emd_distill.files.generators import load_generator

    refuse_taken(out)
    teacher = load_model(model, loading, Runtime(device="cpu"))
    stored = load_generator(generator, teacher)
    if dry_run:
        emit({"teacher": teacher.name, "t": stored.generator.t, "dtype": dtype, "lora": lora, "writes": out}, json)
        return 0
    write = export_lora if lora else whole
    done = write(
        teacher, stored.generator, out, dtype=dtype, licence=licence, training=stored.training, verify=verify
    )  # fmt: skip
    emit({"folder": done.folder, "scheduler": done.scheduler, "t": done.t, "error": done.error}, json)
    return 0


def correct(
    teacher: Annotated[str, Parameter(help="Teacher: a model, or digits for the one that ships with this package.")],
    generator: Annotated[
        Path | None, Parameter(help="Generator file or folder; by default the teacher in one step.")
    ] = None,
    *,
    count: int = 200,
    prompts: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    call_level: float | None = None,
    chain: CorrectionOptions = CorrectionOptions(),
    loading: Loading = Loading(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Repair a generator's samples by some hundred steps of the chain, and see them before and after.

    Shortest form: emd-distill correct digits

    The weights stay as they are. It is the paper's figure 1, and tells what a chain can do on your teacher before you
    train with one.

    Args:
        count: Number of samples to draw.
        prompts: Prompts that the samples take in turn, for teachers that take prompts.
        call_level: Ratio sigma / alpha at which the teacher is called once, where no generator is given.
    """
    from diffcore.cli import Job
    from diffcore.cli.app import settings
    from emd_distill.app.correcting import compute as run_chains
    from emd_distill.app.report import write_page
    from emd_distill.app.teachers import read_teacher

    if count < 2:
        raise UserError(f"`count` is {count}; give at least 2")
    if generator is not None and call_level is not None:
        raise UserError("`call_level` is for the teacher alone; the generator says its own level")
    if call_level is not None and not call_level > 0:
        raise UserError(f"`call_level` is {call_level}; give a positive sigma / alpha")
    known = read_teacher(teacher, loading, runtime, prompts)
    network = known.generator(generator, call_level)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        return run_chains(run, known, network, chain, count, runtime.seed)

    options = {"teacher": teacher, "generator": generator, "count": count, "prompts": prompts, "call_level": call_level}
    job = Job(
        "emd-distill correct",
        output.out or Path("runs") / f"correct-{known.name}",
        output,
        settings(**options, chain=chain, loading=loading, runtime=runtime),
        {known.name: known.fingerprint} | ({} if generator is None else {"generator": _digest(generator)}),
        (),
    )
    plan = {"teacher": known.name, "t of the call": network.t, "samples": count, "Langevin steps": chain.steps}
    return job(compute, plan=plan, report=write_page)


def _digest(path: Path) -> str:
    from diffcore.run import input_hash
    from emd_distill.files.generators import weights_of

    return input_hash(weights_of(path) or path)
