"""Runs the benchmarks of all packages, or of those named: speed and memory as ratios against plain references.

Each package ships its own cases (`bench.py`), so that users can run them in their CI. Results go to benchmarks/results.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

from cyclopts import App, Parameter

ROOT = Path(__file__).resolve().parents[1]
app = App(help=__doc__, result_action="return_value")


@app.default
def run(*packages: str, smoke: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Runs the cases and returns 1 if any failed.

    Args:
        packages: Names under packages/; all of them by default.
        smoke: Tiny sizes, agreement of results only; writes nothing.
    """
    from diffcore.bench import run_cases

    results = ROOT / "benchmarks" / "results"
    failed = []
    for package in packages or sorted(path.name for path in (ROOT / "packages").iterdir() if path.is_dir()):
        cases = importlib.import_module(f"{package.replace('-', '_')}.bench").cases(smoke=smoke)
        print(f"{package}: {len(cases)} cases", flush=True)
        path = None if smoke else results / f"{package}.json"
        if run_cases(cases, smoke=smoke, json_path=path):
            failed.append(package)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(app())
