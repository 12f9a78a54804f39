"""The console script nemo-localize: its commands, by what they are for. Heavy imports stand inside the commands."""

import sys
from pathlib import Path

from diffcore.cli import Flag, emit, main, make_app
from diffcore.cli.package_commands import add_package_commands
from nemo_localize.app.commands import edit, images, search, verify

app = make_app(
    "nemo-localize",
    "Find memorised captions of a text-to-image model, switch off the neurons that recognise them, and prove it.\n\n"
    "Start with: nemo-localize demo",
    "nemo-localize",
)
add_package_commands(app, timed="localisation on this machine against the plain sequential algorithm")
for command in (
    *(search.statistics, search.calibrate, search.detect, search.localize),
    *(edit.apply, edit.revert),
    *(images.generate, images.evaluate),
    *(verify.prove, verify.audit),
):
    app.command(command)


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-nemo-localize"), full: Flag = False, json: Flag = False) -> int:
    """See memorised portraits found, switched off and drawn again; about a minute on two cores.

    Shortest form: nemo-localize demo

    Exit code 1 means that the leak was not closed: a caption was not localised, or a picture still copies.

    Args:
        out: Run folder.
        full: All 24 memorised captions instead of six; about five minutes.
        json: Print the result as one JSON object.
    """
    from nemo_localize.app.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["closed"] else 1
