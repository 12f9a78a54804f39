"""Every package tells what changed, under the version that it carries."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = [ROOT / "shared" / "diffcore", *sorted(path for path in (ROOT / "packages").iterdir() if path.is_dir())]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_the_current_version_has_an_entry(member: Path):
    version = tomllib.loads((member / "pyproject.toml").read_text())["project"]["version"]
    text = (member / "CHANGELOG.md").read_text("utf-8")
    _, found, entry = text.partition(f"## [{version}]")
    assert found, f"{member.name} {version} is not in its CHANGELOG.md"
    assert entry.partition("\n## ")[0].count("\n- ") >= 1


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_the_readme_is_one(member: Path):
    text = (member / "README.md").read_text("utf-8")
    assert text.startswith(f"# {member.name}\n")
    for heading in ("## Install", "## Limits"):
        assert heading in text, heading
