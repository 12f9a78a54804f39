"""The commands `bench` and `report` of every technique. Its modules `app.bench` and `app.report` do the work."""

from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from cyclopts import App

from diffcore.cli import Flag, Timing, emit


def add_package_commands(app: App, *, timed: str) -> None:
    """Adds `bench` and `report` to the app of a technique.

    `bench` runs what `<package>.app.bench.cases(smoke=...)` returns; `report` calls
    `<package>.app.report.write_page(run)`.

    Args:
        app: The technique's app, named like its distribution.
        timed: The comparison in words for the help, completing "Time ...".
    """
    script = app.name[0]
    package = script.replace("-", "_")

    def bench(*, timing: Timing = Timing()) -> int:
        from diffcore.bench import run_cases

        return run_cases(lambda: import_module(f"{package}.app.bench").cases(smoke=timing.smoke), **asdict(timing))

    def report(run: Path, *, json: Flag = False) -> int:
        from diffcore.run import Run

        with Run.reopen(run) as opened:
            emit({"report": import_module(f"{package}.app.report").write_page(opened)}, json)
        return 0

    bench.__doc__ = f"""Time {timed}, as ratios in one run.

    Shortest form: {script} bench

    Exit code 1 means that results disagree, a goal was missed, or a ratio fell below the baseline's.
    """
    report.__doc__ = f"""Make the report of a run again from what its folder holds.

    Shortest form: {script} report RUN

    Args:
        run: Run folder of any command.
        json: Print the result as one JSON object.
    """
    app.command(bench)
    app.command(report)
