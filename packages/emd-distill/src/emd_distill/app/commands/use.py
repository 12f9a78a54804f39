"""The commands that use a trained generator: export, correct."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, Loading, emit, load_model
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    pass

TeacherName = Annotated[str, Parameter(help="Teacher: pipeline or backbone folder, safetensors file, or zoo:NAME.")]
GeneratorPath = Annotated[Path, Parameter(help="Generator: its safetensors file, or a folder that export wrote.")]


def export(
    model: TeacherName,
    generator: GeneratorPath,
    *,
    out: Path,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    licence: str | None = None,
    verify: bool = True,
    dry_run: Flag = False,
    json: Flag = False,
    loading: Loading = Loading(),
) -> int:
    """Write a generator as an ordinary folder of diffusers that draws in one step, and check that it does.

    Shortest form: emd-distill export TEACHER GENERATOR --out FOLDER

    Args:
        out: New folder of the model; nothing may be there.
        dtype: Precision of the written weights.
        licence: Licence of the teacher's weights, such as openrail++, for the card; it binds the generator too.
        verify: Read the folder back and compare what it draws with the generator.
        dry_run: Print what would be written, and do nothing.
        json: Print the result as one JSON object.
    """
    from emd_distill.files.export import export as write
    from emd_distill.files.export import refuse_taken
    from emd_distill.files.generators import load_generator

    refuse_taken(out)
    teacher = load_model(model, loading, Runtime(device="cpu"))
    stored = load_generator(generator, teacher.denoiser)
    if dry_run:
        emit({"teacher": teacher.name, "t": stored.generator.t, "dtype": dtype, "writes": out}, json)
        return 0
    done = write(
        teacher, stored.generator, out, dtype=dtype, licence=licence, training=stored.training, verify=verify
    )  # fmt: skip
    emit({"folder": done.folder, "scheduler": done.scheduler, "t": done.t, "error": done.error}, json)
    return 0
