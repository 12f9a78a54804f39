"""The console script emd-distill: its commands, by what they are for. Heavy imports stand inside the commands."""

import sys
from pathlib import Path

from diffcore.cli import Flag, emit, main, make_app
from diffcore.cli.package_commands import add_package_commands
from emd_distill.app.commands import check, finish
from emd_distill.app.commands.compare import compare
from emd_distill.app.commands.train import train
from emd_distill.app.commands.use import evaluate, sample

app = make_app(
    "emd-distill",
    "Turn a many-step diffusion teacher into a generator that draws in one step, and keep its modes.\n\n"
    "Start with: emd-distill demo",
    "emd-distill",
)
add_package_commands(app, timed="chains and iterations against a straightforward form in PyTorch")
for command in (check.doctor, train, compare, sample, evaluate, finish.correct, finish.export):
    app.command(command)


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-emd-distill"), full: Flag = False, json: Flag = False) -> int:
    """See a teacher of handwritten digits become a generator of one step, with and without a chain.

    Shortest form: emd-distill demo

    Exit code 1 means that the better generator is farther from the digits than when this was written.

    Args:
        out: Run folder of the demo.
        full: Train about a minute each, and with a chain of sixteen steps too.
        json: Print the result as one JSON object.
    """
    from emd_distill.app.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["held"] else 1
