"""Runs the benchmarks of all packages, or of those named: speed and memory as ratios against plain references.

Each package ships its own cases (`bench.py`), so that users can run them in their CI; those of diffcore are the scripts
`diffcore_*.py` beside this one. Results go to benchmarks/results.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from diffcore.bench import Case

ROOT = Path(__file__).resolve().parents[1]
app = App(help=__doc__, result_action="return_value")


@app.default
def run(*packages: str, smoke: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Runs the cases and returns 1 if any failed.

    Args:
        packages: Names under packages/, or diffcore; all of them by default.
        smoke: Tiny sizes, agreement of results only; writes nothing.
    """
    from diffcore.bench import run_cases

    results = ROOT / "benchmarks" / "results"
    failed = []
    for package in packages or ["diffcore", *sorted(p.name for p in (ROOT / "packages").iterdir() if p.is_dir())]:
        cases = cases_of(package, smoke=smoke)
        print(f"{package}: {len(cases)} cases", flush=True)
        path = None if smoke else results / f"{package}.json"
        if run_cases(cases, smoke=smoke, json_path=path):
            failed.append(package)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def cases_of(package: str, *, smoke: bool) -> "list[Case]":
    """Returns the cases of a package."""
    if package != "diffcore":
        return importlib.import_module(f"{package.replace('-', '_')}.app.bench").cases(smoke=smoke)
    scripts = sorted(path.stem for path in Path(__file__).parent.glob("diffcore_*.py"))
    return [case for script in scripts for case in importlib.import_module(script).cases(small=smoke)]


if __name__ == "__main__":
    sys.exit(app())
