"""Argument descriptions are sentences that a reader understands without the code: no fragments, no riddles."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "diffcore": ROOT / "shared/diffcore/src",
    **{path.name: path / "src" for path in sorted((ROOT / "packages").iterdir()) if path.is_dir()},
}
SECTIONS = ("Args:", "Attributes:")
FEWEST_WORDS = 4


def described(docstring: str) -> Iterator[tuple[str, str]]:
    """Yields each argument or attribute of a docstring with its description."""
    section, indent, name, text = False, 0, "", ""
    for line in [*docstring.split("\n"), "End:"]:
        stripped = line.strip()
        if stripped in SECTIONS or (section and stripped and len(line) - len(line.lstrip()) <= indent):
            if name:
                yield name, text.strip()
            section, indent, name, text = stripped in SECTIONS, len(line) - len(line.lstrip()), "", ""
            continue
        if not section or not stripped:
            continue
        start = re.match(r"(\*{0,2}\w+(?:, \w+)*): (.*)", stripped)
        if start and len(line) - len(line.lstrip()) == indent + 4:
            if name:
                yield name, text.strip()
            name, text = start[1], start[2]
        else:
            text += " " + stripped


def fragments(source: Path) -> list[str]:
    """Returns the arguments whose description is too short, or begins in the middle of a thought."""
    found = []
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
                docstring := ast.get_docstring(node)
            ):
                for name, text in described(docstring):
                    if len(text.split()) < FEWEST_WORDS or text.split()[0] in ("Of", "What"):
                        found.append(f"{path.relative_to(source)}:{node.lineno} {node.name}({name}): {text}")
    return found


@pytest.mark.parametrize("package", SOURCES)
def test_argument_descriptions_are_sentences(package: str) -> None:
    assert fragments(SOURCES[package]) == []


def test_fragments_are_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '"""M."""\n\ndef f(a, b, c):\n    """Does.\n\n    Args:\n        a: Of the model.\n        b: The step.\n'
        '        c: Number of solver steps, at least 1.\n    """\n',
        encoding="utf-8",
    )
    assert [line.partition(" ")[2] for line in fragments(tmp_path)] == ["f(a): Of the model.", "f(b): The step."]
