"""The console script w2w-space: its commands, by what they are for. Heavy imports stand inside the commands."""

import sys
from pathlib import Path

from diffcore.cli import Flag, emit, main, make_app
from diffcore.cli.package_commands import add_package_commands
from w2w_space.app.commands import collect, combine, explore, fit, invert, judge, page, train, use

app = make_app(
    "w2w-space",
    "Make a linear space of many LoRAs of one kind, in which every point is again an ordinary LoRA.\n\n"
    "Start with: w2w-space demo",
    "w2w-space",
)
add_package_commands(app, timed="spaces and projections against whole matrices and single adapters")
app.command(collect.import_, name="import")
for command in (
    collect.convert,
    collect.remove,
    collect.info,
    fit.build,
    explore.directions,
    explore.sample,
    explore.edit,
):
    app.command(command)
for command in (train.train, invert.invert, use.project, use.export, judge.evaluate):
    app.command(command)
for command in (combine.compose, combine.slider, page.app):
    app.command(command)


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-w2w-space"), full: Flag = False, json: Flag = False) -> int:
    """See adapters of known styles become a space that is sampled and edited, with and without the gauge.

    Shortest form: w2w-space demo

    Exit code 1 means that the space does not tell the styles as it did when this was written.

    Args:
        out: Run folder of the demo.
        full: Invert more styles, and edit, sample and invert persons that a text-to-image model draws: minutes.
        json: Print the result as one JSON object.
    """
    from w2w_space.app.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["held"] else 1
