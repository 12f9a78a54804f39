"""Techniques import diffcore and never one another; diffcore imports no technique; its rooms stand in order."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TECHNIQUES = sorted(path.name.replace("-", "_") for path in (ROOT / "packages").iterdir() if path.is_dir())


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--config", config, "--no-cache"], capture_output=True, text=True, cwd=ROOT)


def test_the_contracts_hold():
    result = lint_imports(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_is_under_the_contracts():
    linter = SETTINGS["tool"]["importlinter"]
    assert sorted(linter["root_packages"]) == sorted(["diffcore", *TECHNIQUES])
    forbidden = next(c for c in linter["contracts"] if c["source_modules"] == ["diffcore"])
    assert sorted(forbidden["forbidden_modules"]) == TECHNIQUES
    checked = SETTINGS["tool"]["pytest"]["addopts"][-1]
    assert all(f"{name}," in checked for name in ("diffcore", *TECHNIQUES)), "shapes are checked in every package"


def test_a_forbidden_import_is_noticed(tmp_path: Path):
    """The layers would be an empty promise if a wrong order passed."""
    wrong = tmp_path / "contracts.ini"
    wrong.write_text(
        "[importlinter]\nroot_package = diffcore\n\n"
        "[importlinter:contract:1]\nname = upside down\ntype = layers\nlayers =\n  diffcore.errors\n  diffcore.run\n"
    )
    result = lint_imports(wrong)
    assert result.returncode != 0
    assert "diffcore.run" in result.stdout


@pytest.mark.parametrize("folder", ["shared", "packages"])
def test_no_shared_names_for_leftovers(folder: str):
    leftovers = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert [str(path) for path in (ROOT / folder).rglob("*.py") if path.name in leftovers] == []
