"""Help teaches: every command says what it does, shows its shortest form, and documents every option."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted((ROOT / "packages").glob("*/pyproject.toml"))
SCRIPTS = [name for path in PROJECTS for name in tomllib.loads(path.read_text())["project"].get("scripts", {})]
BUILT_IN = {"--help", "-h", "--version"}


def commands(script: str) -> dict[str, str]:
    """Returns the docstring of every command."""
    app = importlib.import_module(f"{script.replace('-', '_')}.app.cli").app
    return {name: app[name].default_command.__doc__ for name in app if name not in BUILT_IN}


def help_of(script: str, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    importlib.import_module(f"{script.replace('-', '_')}.app.cli").app([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_three_common_commands_are_there(script: str):
    assert {"demo", "bench", "report"} <= set(commands(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_shows_its_shortest_form(script: str):
    for name, text in commands(script).items():
        assert re.search(rf"Shortest form: {script} {name}\b", text or ""), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_explained(script: str, capsys: pytest.CaptureFixture[str]):
    for command in commands(script):
        shown = help_of(script, command, capsys)
        # A row starts with the option's names; what follows, up to the next such row, is its help.
        text = re.sub(r"[│╭╮╰╯─*]", " ", shown.partition("╭")[2])
        rows = re.split(r"\n\s+(?=(?:[A-Z-]+ )?--[a-z])", text)[1:]
        assert rows, command
        for row in rows:
            words = re.sub(r"--[a-z-]+|\b[A-Z]{2,}\b|\[.*?\]", " ", row).split()
            assert len(words) >= 2, f"{script} {command} {row.split()[:2]} has no help"
