"""`--help` answers before torch is imported."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = [ROOT / "shared" / "diffcore", *sorted(path for path in (ROOT / "packages").iterdir() if path.is_dir())]
SCRIPTS = {
    name: target
    for member in MEMBERS
    for name, target in tomllib.loads((member / "pyproject.toml").read_text())["project"].get("scripts", {}).items()
}
HEAVY = ("torch", "lightning", "diffusers", "transformers", "matplotlib", "scipy", "sklearn")


def heavy_after(code: str) -> str:
    """Returns the heavy packages that are imported once the code has run, in a fresh interpreter."""
    tail = f"; import sys; print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("member", [path.name for path in MEMBERS])
def test_importing_a_package_imports_nothing_heavy(member: str):
    assert heavy_after(f"import {member.replace('-', '_')}") == "[]"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script: str):
    module, function = SCRIPTS[script].split(":")
    code = f"import sys; sys.argv = ['{script}', '--help']; from {module} import {function}; {function}()"
    assert heavy_after(code) == "[]"


def test_the_budget_notices_a_heavy_import():
    assert heavy_after("import numpy, scipy") == "['scipy']"
