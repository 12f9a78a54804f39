"""What the READMEs tell a newcomer to type exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted(ROOT.glob("shared/*/README.md")),
]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def shell_lines(path: Path) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_and_commands_exist(readme: Path):
    for words in shell_lines(readme):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
        elif (ROOT / "packages" / words[0]).is_dir():
            app = importlib.import_module(f"{words[0].replace('-', '_')}.app.cli").app
            app.parse_args(words[1:])  # raises on an unknown command, option or choice


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(readme: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", readme.read_text("utf-8")):
        assert (readme.parent / target).exists(), target


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_examples_run(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # some write files
    for block in re.findall(r"```python\n(.*?)```", readme.read_text("utf-8"), flags=re.DOTALL):
        exec(compile(block, str(readme), "exec"), {})
