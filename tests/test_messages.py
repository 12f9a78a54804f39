"""Messages of the library name parameters; only the command line names its options."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.name: path for path in sorted(ROOT.glob("*/*/src/*/")) if (path / "__init__.py").exists()}
PACKAGES = ["diffcore", "diffusion_featsel", "emd_distill", "immiscible_noise", "nemo_localize", "w2w_space"]
HARNESS = {"cli", "app"}
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def options_named(text: str) -> list[str]:
    """Returns the string literals of Python source that name an option of a command line."""
    literals = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return [literal for literal in literals if isinstance(literal, str) and FLAG.search(literal)]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_message_outside_the_command_line_names_an_option(package: str):
    source = SOURCES[package]
    modules = [path for path in source.rglob("*.py") if path.relative_to(source).parts[0] not in HARNESS]
    assert modules
    found = {str(path.relative_to(source)): options_named(path.read_text("utf-8")) for path in modules}
    assert {name: literals for name, literals in found.items() if literals} == {}


def test_an_option_in_a_message_is_noticed():
    assert options_named('raise ValueError(f"{n} is too many; give a --size")') == [" is too many; give a --size"]
    assert options_named('x = "-- a dash", "a--b", "`size`"') == []
