"""The console script nemo-localize: its commands, by what they are for. Heavy imports stand inside the commands."""

import sys
from pathlib import Path

from diffcore.cli import Flag, emit, main, make_app
from diffcore.cli.package_commands import add_package_commands
from nemo_localize.app.commands import edit, images, search, verify

app = make_app(
    "nemo-localize",
    "Find memorised captions of a text-to-image model, ablate the neurons that recognise them, and verify it.\n\n"
    "Start with: nemo-localize demo",
    "nemo-localize",
)
add_package_commands(app, timed="localization on this machine against the plain sequential algorithm")
for command in (
    *(search.statistics, search.calibrate, search.detect, search.localize),
    *(edit.export, edit.restore),
    *(images.generate, images.evaluate),
    *(verify.verify, verify.audit),
):
    app.command(command)


def run() -> int:
    """Runs the command line and returns its exit code."""
    return main(app)


@app.command
def demo(*, out: Path = Path("runs/demo-nemo-localize"), full: Flag = False, json: Flag = False) -> int:
    """See memorised portraits found, ablated and generated again; about a minute on two cores.

    Shortest form: nemo-localize demo

    Exit code 1 means that the leak was not closed: a caption was not localized, or an image is still a copy.

    Args:
        out: Run folder of the demo.
        full: Look at all 24 memorised captions instead of six; about five minutes.
        json: Print the result as one JSON object.
    """
    from nemo_localize.app.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["closed"] else 1
