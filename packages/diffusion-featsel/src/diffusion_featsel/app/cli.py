"""The console script diffusion-featsel: its commands, by what they are for. Heavy imports stand inside the commands."""

import sys
from pathlib import Path

from diffcore.cli import Flag, emit, main, make_app
from diffcore.cli.package_commands import add_package_commands
from diffusion_featsel.app.commands import judge, look, use

app = make_app(
    "diffusion-featsel",
    "List, filter, rank, choose and extract the inner activations of a diffusion model as dense features.\n\n"
    "Start with: diffusion-featsel demo",
    "diffusion-featsel",
)
add_package_commands(app, timed="ranking, matching and choosing against one run for each activation")
for command in (look.inventory, look.score, look.select, use.extract, use.correspond, judge.evaluate, judge.probe):
    app.command(command)


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-diffusion-featsel"), full: Flag = False, json: Flag = False) -> int:
    """See all activations of a small model ranked without labels, and the ranking held against exact labels.

    Shortest form: diffusion-featsel demo

    Args:
        out: Run folder of the demo.
        full: Take more images, pairs and random sets; about five minutes.
        json: Print the result as one JSON object.
    """
    from diffusion_featsel.app.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0
