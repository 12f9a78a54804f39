"""Statistics as the published code saves them: what they hold is taken over, anything else is refused in words."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError
from nemo_localize.app import cli
from nemo_localize.files.published_statistics import import_statistics
from nemo_localize.files.statistics import load_statistics, save_statistics
from nemo_localize.planted import ordinary_captions
from nemo_localize.sites import value_sites
from nemo_localize.statistics import merged


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


@pytest.fixture
def lists(simple, usual) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The statistics of the simple model, as the published code keeps them: in float32, by layer."""
    widths = value_sites(simple.model.backbone).widths
    return list(usual.mean.float().split(widths)), list(usual.var.sqrt().float().split(widths))


def test_what_was_saved_is_imported(simple, usual, lists, tmp_path):
    for name, value in {"tuple.pt": lists, "list.pt": list(lists)}.items():
        found = import_statistics(simple.model, saved(tmp_path / name, value))
        assert torch.allclose(found.mean, usual.mean, rtol=1e-6)
        assert torch.allclose(found.var, usual.var, rtol=1e-5)
        assert (found.num_prompts, found.sources) == (50_000, ((name, 50_000),))
        found.require(simple.model, value_sites(simple.model.backbone))
        assert found.differences(simple.model.prompts.tokenize(["words that are not known"])) == []
    old = tmp_path / "old.pt"
    torch.save(lists, old, _use_new_zipfile_serialization=False)
    assert import_statistics(simple.model, old).mean.equal(found.mean)


def test_activations_of_every_caption_are_imported_too(simple, lists, tmp_path):
    rows = [torch.rand(7, len(layer)) for layer in lists[0]]
    found = import_statistics(simple.model, saved(tmp_path / "rows.pt", rows), num_prompts=9)
    together = torch.cat(rows, 1).double()
    assert found.num_prompts == 7
    assert torch.allclose(found.mean, together.mean(0))
    assert torch.allclose(found.var, together.var(0))


def test_imported_statistics_merge_with_others(simple, usual, lists, tmp_path):
    found = import_statistics(simple.model, saved(tmp_path / "s.pt", lists), num_prompts=usual.num_prompts)
    both = merged([found, usual])
    assert both.num_prompts == 2 * usual.num_prompts
    assert torch.allclose(both.mean, usual.mean, rtol=1e-6)
    assert not both.vocabulary  # half of the captions are not known
    assert load_statistics(save_statistics(tmp_path / "both.safetensors", both)).sources == both.sources


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (7, CorruptArtifactError, "holds no statistics"),
        ({"mean": torch.zeros(3)}, CorruptArtifactError, "holds no statistics"),
        (([torch.zeros(2)], [torch.zeros(2)]), IncompatibleModelError, r"widths \[2\], where this model has"),
        ([torch.zeros(1, 3)], IncompatibleModelError, r"widths \[3\]"),
        (([1.0], [2.0]), CorruptArtifactError, "holds no statistics"),
    ],
    ids=["a number", "an object", "another model", "another model's rows", "no tensors"],
)
def test_other_contents_are_refused(simple, tmp_path, value, error, message):
    with pytest.raises(error, match=message):
        import_statistics(simple.model, saved(tmp_path / "s.pt", value))


def test_what_cannot_be_a_mean_or_a_deviation_is_refused(simple, lists, tmp_path):
    means, deviations = lists
    for wrong in ((means, [-layer for layer in deviations]), ([layer * torch.nan for layer in means], deviations)):
        with pytest.raises(CorruptArtifactError, match="negative numbers, NaN or infinity"):
            import_statistics(simple.model, saved(tmp_path / "s.pt", wrong))
    with pytest.raises(UserError, match="at least 2"):
        import_statistics(simple.model, saved(tmp_path / "s.pt", lists), num_prompts=1)
    with pytest.raises(UserError, match="does not exist"):
        import_statistics(simple.model, tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(CorruptArtifactError, match="no file of tensors alone"):
        import_statistics(simple.model, tmp_path / "text.pt")


def test_the_command_imports_and_other_commands_say_how(simple, lists, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nemo_localize.app.work.Work.load", lambda *_: simple.model)
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "published.pt", lists)
    Path("ordinary.txt").write_text("\n".join(ordinary_captions(5)))
    assert cli.app(["statistics", "planted", "--import", "published.pt", "--out", "alone"]) == 0
    assert cli.app(["statistics", "planted", "--config", "alone/config.yaml", "--out", "alone"]) == 0  # the same run
    given = ["statistics", "planted", "ordinary.txt", "--import", "published.pt", "--import-count", "20"]
    assert cli.app([*given, "--out", "both"]) == 0
    assert load_statistics(Path("alone/statistics.safetensors")).num_prompts == 50_000
    assert load_statistics(Path("both/statistics.safetensors")).num_prompts == 25
    with pytest.raises(UserError, match="`import` FILE"):
        cli.app(["localize", "planted", "ordinary.txt", "--statistics", "published.pt", "--tau", "0.4"])
    with pytest.raises(UserError, match="no captions"):
        cli.app(["statistics", "planted"])
    assert capsys.readouterr().out
