"""The console script nemo-localize: its commands, by what they are for. Heavy imports stand inside the commands."""

import sys
from dataclasses import asdict
from pathlib import Path

from diffcore.cli import Flag, Timing, emit, main, make_app
from nemo_localize.commands import drawing, editing, proving, searching

app = make_app(
    "nemo-localize",
    "Find memorised captions of a text-to-image model, switch off the neurons that recognise them, and prove it.\n\n"
    "Start with: nemo-localize demo",
    "nemo-localize",
)
for command in (
    *(searching.statistics, searching.calibrate, searching.detect, searching.localize),
    *(editing.apply, editing.revert),
    *(drawing.generate, drawing.evaluate),
    *(proving.prove, proving.audit),
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
    from nemo_localize.demo import run_demo

    result = run_demo(out, full=full)
    emit(result, json)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0 if result["closed"] else 1


@app.command
def bench(*, timing: Timing = Timing()) -> int:
    """Time localisation on this machine against the plain sequential algorithm, as ratios in one run.

    Shortest form: nemo-localize bench

    Exit code 1 means that results disagree, a goal was missed, or a ratio fell below the baseline's.
    """
    from diffcore.bench import run_cases
    from nemo_localize.bench import cases

    return run_cases(cases(smoke=timing.smoke), **asdict(timing))


@app.command
def report(run: Path, *, json: Flag = False) -> int:
    """Make the report of a run again from what its folder holds.

    Shortest form: nemo-localize report RUN

    Args:
        run: Run folder of any command.
        json: Print the result as one JSON object.
    """
    from diffcore.run import Run
    from nemo_localize.page import write_page

    with Run.reopen(run) as opened:
        emit({"report": write_page(opened)}, json)
    return 0
