"""`diffcore zoo`: the small models shipped with diffcore. Heavy imports stand inside the commands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.cli.app import emit, make_app
from diffcore.cli.options import Flag, Output
from diffcore.errors import UserError, printable
from diffcore.io.shipped import PREFIX, SHIPPED, shipped_folder
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from diffcore.zoo.gate import Gate

zoo_app = make_app(
    "zoo",
    "Small models that come with diffcore: list them, look at what they make, measure them, train them again.\n\n"
    "Start with: diffcore zoo list",
    "diffcore",
)


@zoo_app.command(name="list")
def list_(*, json: Flag = False) -> int:
    """List the shipped models with a description and the size of each.

    Shortest form: diffcore zoo list

    Args:
        json: Print one JSON object.
    """
    rows = {name: {"what": what, "megabytes": _megabytes(name)} for name, what in SHIPPED.items()}
    if json:
        emit(rows, as_json=True)
        return 0
    for name, row in rows.items():
        size = "not here" if row["megabytes"] is None else f"{row['megabytes']:.1f} MB"
        print(f"{name:<24} {size:>8}  {row['what']}")
    return 0


@zoo_app.command
def samples(name: str, *, out: Path = Path("samples.png"), dry_run: Flag = False, runtime: Runtime = Runtime()) -> int:
    """Write a sheet of images that a model generates, always from the same noise; for a classifier, of its data.

    Shortest form: diffcore zoo samples portraits-sd

    Args:
        name: A model that `diffcore zoo list` shows.
        out: PNG file to write the sheet to.
        dry_run: Print what would be generated and written, and do nothing.
    """
    from diffcore.io.files import explained
    from diffcore.report import image_grid
    from diffcore.zoo.show import samples as draw_sheet

    known = _known(name)
    if dry_run:
        print(f"draws a sheet of {known} and writes {out}")
        return 0
    images, columns, what = draw_sheet(known, shipped_folder(known), runtime)
    with explained(out):
        image_grid(images, columns=columns).savefig(out)
    print(f"{out}: {what}")
    return 0


@zoo_app.command
def check(
    name: str,
    *,
    model: Path | None = None,
    dry_run: Flag = False,
    json: Flag = False,
    runtime: Runtime = Runtime(),
) -> int:
    """Measure a model and compare the values with their documented bounds. Exit code 1 if one is missed.

    Shortest form: diffcore zoo check portraits-sd

    Args:
        name: A model that `diffcore zoo list` shows.
        model: Folder of another training of this model.
        dry_run: Print the plan of the measurement, and do nothing.
        json: Print one JSON object.
    """
    from diffcore.zoo.check import check as measure

    known = _known(name)
    if dry_run:
        print(f"measures {known} from the weights in {model or shipped_folder(known).name}, and writes nothing")
        return 0
    return _tell(measure(known, model or shipped_folder(known), runtime), json)


@zoo_app.command
def train(
    name: str,
    *,
    steps: int | None = None,
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Train a model anew, on a CPU or an accelerator; may be stopped at any moment and goes on when called again.

    Shortest form: diffcore zoo train digits8-edm

    The U-Nets of the portraits are trained in bfloat16, which belongs to their recipe; --dtype is that of all else.

    Args:
        name: A model that `diffcore zoo list` shows.
        steps: Optimizer steps of its longest stage; by default those of the shipped model.
    """
    from diffcore.zoo.train import train_model

    out = output.out or Path("runs") / f"zoo-{_known(name)}"
    if steps is not None and steps < 1:
        raise UserError(f"`steps` is {steps}; give a number of at least 1")
    if output.dry_run:
        print(f"trains {name} and writes {out / 'model'} with a card and samples")
        return 0
    model, gates = train_model(_known(name), out, runtime, steps=steps, restart=output.restart)
    print(f"model: {model}", file=sys.stderr)
    return _tell(gates, output.json)


def _tell(gates: "list[Gate]", as_json: bool) -> int:
    missed = [gate.name for gate in gates if not gate.kept]
    if as_json:
        emit({"figures": {gate.name: gate.value for gate in gates}, "missed": missed}, as_json=True)
    else:
        for gate in gates:
            verdict = "" if gate.bound is None else f"{gate.promise}: {'kept' if gate.kept else 'MISSED'}"
            print(f"{gate.value:10.3f}  {gate.name}  {verdict}".rstrip())
    return 1 if missed else 0


def _known(name: str) -> str:
    plain = name.removeprefix(PREFIX)
    if plain not in SHIPPED:
        raise UserError(f"the zoo has no {printable(name)}; it has: {', '.join(SHIPPED)}")
    return plain


def _megabytes(name: str) -> float | None:
    from diffcore.errors import ModelNotFoundError

    try:
        folder = shipped_folder(name)
    except ModelNotFoundError:
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
