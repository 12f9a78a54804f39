"""What is built is what is installed: metadata, contents, and a console script in an empty environment."""

import os
import shutil
import subprocess
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = {path.name: path for path in [ROOT / "shared" / "diffcore", *sorted((ROOT / "packages").iterdir())]}
TECHNIQUES = [name for name in MEMBERS if name != "diffcore"]
UV = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")

pytestmark = pytest.mark.skipif(not Path(UV).exists(), reason="needs uv, which make sync brings")


def uv(*arguments: str | Path, cwd: Path = ROOT) -> str:
    result = subprocess.run([UV, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    uv("build", "--quiet", "--all-packages", "--wheel", "--offline", "--out-dir", folder)
    return {name: next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in MEMBERS}


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_pins_the_minor_version_of_diffcore(name: str, wheels: dict[str, Path]):
    required = [line for line in metadata(wheels[name]).get_all("Requires-Dist") or [] if line.startswith("diffcore")]
    assert required
    for line in required:
        specifier = line.split(";")[0].split("]")[-1].removeprefix("diffcore").strip()
        assert sorted(specifier.split(",")) == ["<0.2", ">=0.1"], line


@pytest.mark.parametrize("name", MEMBERS)
def test_a_wheel_carries_types_licence_and_data_and_no_tests(name: str, wheels: dict[str, Path]):
    package = name.replace("-", "_")
    with zipfile.ZipFile(wheels[name]) as archive:
        names = archive.namelist()
    assert f"{package}/py.typed" in names
    assert f"{package}/__init__.pyi" in names
    assert any(file.endswith("licenses/LICENSE") for file in names)
    assert not [file for file in names if "test_" in file or file.endswith((".ipynb", ".pt", ".ckpt"))]
    source = MEMBERS[name] / "src" / package
    data = {path for path in source.rglob("*") if path.is_file() and path.suffix in (".j2", ".json", ".safetensors")}
    assert {f"{package}/{path.relative_to(source).as_posix()}" for path in data} <= set(names)


def test_bumping_one_version_touches_only_that_package(tmp_path: Path):
    copy = tmp_path / "workspace"
    skipped = shutil.ignore_patterns(".venv", ".uv", ".git", "runs", "dist", "uv.lock", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=skipped)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    uv("version", "--package", TECHNIQUES[0], "--bump", "minor", "--frozen", cwd=copy)
    changed = [path for path in copy.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()]
    assert [path.relative_to(copy).as_posix() for path in changed] == [f"packages/{TECHNIQUES[0]}/pyproject.toml"]


def install(folder: Path, wheels: dict[str, Path], name: str, *extras: str) -> Path:
    """Installs a package and what it needs into an empty environment, then its wheel and diffcore's over it.

    Versions come from the lock file and files from uv's cache, which the workspace's own environment has filled: no
    network. Returns the folder of its scripts.
    """
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(folder)}
    chosen = [word for extra in extras for word in ("--extra", extra)]
    command = [UV, "sync", "--quiet", "--frozen", "--offline", "--no-editable", "--no-dev", "--package", name, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    ours = [wheels[name], *([wheels["diffcore"]] if extras or name == "diffcore" else [])]
    uv("pip", "install", "--quiet", "--offline", "--no-deps", "--reinstall", "--python", folder, *ours)
    return folder / "bin"


@pytest.mark.slow
def test_the_assignment_alone_installs_and_its_script_says_what_is_missing(tmp_path: Path, wheels: dict[str, Path]):
    scripts = install(tmp_path / "alone", wheels, "immiscible-noise")
    code = (
        "import torch, immiscible_noise as i; x = torch.randn(16, 3, 4, 4); n = torch.randn_like(x); "
        "a = i.assign_noise(x, n); assert (x * a).sum() > (x * n).sum(); print(a.shape)"
    )
    done = subprocess.run([scripts / "python", "-c", code], capture_output=True, text=True)
    assert done.stdout == "torch.Size([16, 3, 4, 4])\n", done.stderr
    told = subprocess.run([scripts / "immiscible-noise", "demo"], capture_output=True, text=True)
    assert told.returncode == 2
    assert "pip install 'immiscible-noise[train]'" in told.stderr
    assert told.stderr.count("\n") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_installs_with_diffcore_alone_and_runs(name: str, tmp_path: Path, wheels: dict[str, Path]):
    extras = tomllib.loads((MEMBERS[name] / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    scripts = install(tmp_path / "whole", wheels, name, *(["train"] if "train" in extras else []))
    shown = subprocess.run([scripts / name, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "demo" in shown.stdout
    smoke = subprocess.run([scripts / name, "bench", "--smoke"], capture_output=True, text=True)
    assert smoke.returncode == 0, smoke.stdout + smoke.stderr
