"""Methods are apart from their harness, and no modules import one another in a circle."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.name: path for path in sorted(ROOT.glob("*/*/src/*/")) if (path / "__init__.py").exists()}
TECHNIQUES = ["diffusion_featsel", "emd_distill", "immiscible_noise", "nemo_localize", "w2w_space"]
# What belongs to the harness: modules that hold commands, files, runs and studies may import it, methods may not.
HARNESS = ["diffcore.run", "diffcore.cli", "diffcore.report", "lightning.fabric", "cyclopts", "argparse"]
ROOMS = ["app", "files", "study"]
# Modules of diffcore that compute, and know no run folder.
COMPUTING = [
    "denoiser",
    "hooks",
    "models.generation",
    "train.module",
    "metrics.frechet",
    "metrics.kid",
    "metrics.keypoints",
    "metrics.pairwise_ssim",
    "metrics.precision_recall",
    "metrics.replication",
    "metrics.segmentation",
]


def modules_of(package: str) -> dict[str, Path]:
    """Returns the file of every module of a package, by its dotted name."""
    source = SOURCES[package]
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(nodes: Iterator[ast.AST], package: str = "") -> set[str]:
    """Returns what import statements name: modules, and what is taken from them as if it were a module."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the statements that run when a module is imported: none in functions or for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from at_once(node)


def wrong_imports(text: str, forbidden: list[str], package: str = "") -> list[str]:
    """Returns what a source imports of the forbidden modules and of those in them, lazily or for types too."""
    names = imported(ast.walk(ast.parse(text)), package)
    return sorted(n for n in names if any(n == one or n.startswith(f"{one}.") for one in forbidden))


def circle_in(sources: Mapping[str, str]) -> list[str]:
    """Returns the modules of a circle of imports, the first one again at the end; nothing where there is none."""
    graph = {}
    for module, text in sources.items():
        named = imported(at_once(ast.parse(text)), package=module.rpartition(".")[0])
        # A name taken from a package stands for the module of that name, where there is one, and not for the package.
        inner = {n for n in named if n in sources}
        graph[module] = {n for n in inner if not any(other.startswith(f"{n}.") for other in inner)} - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("package", TECHNIQUES)
def test_a_method_imports_no_harness(package: str):
    forbidden = [*HARNESS, "pathlib", *(f"{package}.{room}" for room in ROOMS)]
    rooms = tuple(f"{package}.{room}" for room in (*ROOMS, "__main__"))
    methods = {name: path for name, path in modules_of(package).items() if not name.startswith(rooms)}
    found = {name: wrong_imports(path.read_text("utf-8"), forbidden, package) for name, path in methods.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_what_computes_in_diffcore_knows_no_run():
    known = modules_of("diffcore")
    chosen = [n for n in known for one in COMPUTING if f"{n}.".startswith(f"diffcore.{one}.")]
    assert len(chosen) > len(COMPUTING)
    found = {name: wrong_imports(known[name].read_text("utf-8"), HARNESS) for name in chosen}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_an_import_of_the_harness_is_noticed():
    lazily = "def save(model):\n    from diffcore.run import Run\n    import argparse\n"
    assert wrong_imports(lazily, HARNESS) == ["argparse", "diffcore.run", "diffcore.run.Run"]
    assert wrong_imports("from diffcore import cli\nfrom diffcore.running import x\n", HARNESS) == ["diffcore.cli"]


def test_no_circle_of_imports():
    sources = {n: path.read_text("utf-8") for package in SOURCES for n, path in modules_of(package).items()}
    assert len(SOURCES) == 6
    assert circle_in(sources) == []


def test_a_circle_is_noticed():
    sources = {"p": "", "p.a": "from p.b import x", "p.b": "import p.c", "p.c": "class C:\n    from . import a"}
    assert set(circle_in(sources)) == {"p.a", "p.b", "p.c"}
    lazily = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.a\ndef f():\n    import p.a\n"
    assert circle_in({**sources, "p.c": lazily}) == []
