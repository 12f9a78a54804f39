"""What the published scripts can be asked, asked of the commands: own neurons, thresholds, factors, their drawing."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.errors import UserError
from diffcore.io import artifact
from diffcore.noise import row_noise
from diffcore.testing import tiny
from nemo_localize.app import cli
from nemo_localize.app.work import Work
from nemo_localize.files.published_table import read_authors_table
from nemo_localize.files.results import read_results
from nemo_localize.files.statistics import save_statistics
from nemo_localize.first_step import initial_noise
from nemo_localize.images import as_saved
from nemo_localize.neurons import NO_NEURONS
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.results import CaptionResult
from nemo_localize.sites import value_sites
from nemo_localize.statistics import Statistics

FIRST, SECOND = "portrait of 1917 no 1", "some other thing 42"
DRAW = ["--num-images", "2", "--image-steps", "2", "--image-guidance", "0"]


@pytest.fixture
def command(leaky: Planted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs a command on a model with two memories, with a list of both and one neuron for each on disk."""
    monkeypatch.setattr(Work, "load", lambda *_: leaky.model)
    monkeypatch.chdir(tmp_path)
    Path("captions.csv").write_text(f"Caption;URL;Type\n{FIRST};u;VM\n{SECOND};v;TM\n{FIRST};w;VM\n")
    own = {FIRST: leaky.carriers(FIRST), SECOND: leaky.carriers(SECOND)}
    together = own[FIRST].union(own[SECOND])
    Path("all.json").write_text(json.dumps({"neurons": together.to_json(), "captions": {FIRST: own[FIRST].to_json()}}))
    return lambda *tokens: cli.app([str(token) for token in tokens])


def by_mitigation(found: dict[str, Any], caption: str) -> dict[str, float]:
    return {row["mitigation"]: row["SSIM_gen"] for row in found["captions"] if row["prompt"] == caption}


def test_evaluate_has_own_neurons_and_the_union_beside_them(
    command: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    mitigations = ["--mitigations", "neurons", "--json"]
    assert command("evaluate", "m", "captions.csv", "--neurons", "all.json", *DRAW, *mitigations) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = by_mitigation(found, FIRST), by_mitigation(found, SECOND)
    assert list(first) == ["none", "neurons", "union"]
    assert first["neurons"] < 0.99
    assert second["neurons"] == pytest.approx(1, abs=1e-5)  # it has none of its own
    assert second["union"] < 0.99
    assert "1 captions have no neurons of their own: under 'neurons' nothing is ablated" in found["notes"]
    assert {row["prompt"]: row["kind"] for row in found["captions"]} == {FIRST: "verbatim", SECOND: "template"}

    most = ["--most-frequent", "1", "--out", "most"]
    assert command("evaluate", "m", "captions.csv", "--neurons", "all.json", *DRAW, *mitigations, *most) == 0
    assert list(by_mitigation(json.loads(capsys.readouterr().out), FIRST)) == ["none", "neurons", "1 most frequent"]


@pytest.mark.parametrize("factor", ["1", "nan", "inf"])
def test_factors_that_change_nothing_are_refused(command: Callable[..., Any], factor: str):
    with pytest.raises(UserError, match="`scaling_factor` is"):
        command("generate", "m", "captions.csv", "--neurons", "all.json", "--scaling-factor", factor)
    with pytest.raises(UserError, match="`scaling_factor` is"):
        command("localize", "m", "captions.csv", "--statistics", "s", "--tau", "0.4", "--scaling-factor", factor)


def test_images_are_drawn_as_the_published_code_draws_them(command: Callable[..., Any], leaky: Planted):
    def drawn(name: str, *options: str) -> dict[str, torch.Tensor]:
        assert command("generate", "m", "captions.csv", "--neurons", "all.json", *DRAW, "--out", name, *options) == 0
        return artifact.load(Path(name, "parts", "gallery.safetensors"), schema="diffcore/part@1").tensors

    ours, theirs = drawn("ours"), drawn("theirs", "--compat", "published")
    assert not torch.allclose(ours["none"], theirs["none"], atol=0.1)  # of other noise
    assert not theirs["neurons"][0].equal(theirs["none"][0])
    assert theirs["neurons"][1].equal(theirs["none"][1])  # each caption's own: the second has none
    assert not ours["neurons"][1].equal(ours["none"][1])
    half = drawn("half", "--scaling-factor", "0.5")
    assert half["none"].equal(ours["none"])
    assert not half["neurons"].equal(ours["neurons"])
    with pytest.raises(UserError, match="two choices"):
        drawn("both", "--per-caption", "--most-frequent", "1")
    Path("all.json").write_text(json.dumps(leaky.carriers(FIRST).to_json()))
    with pytest.raises(UserError, match="told by caption"):
        drawn("untold", "--per-caption")


def test_published_noise_is_one_draw_of_the_first_seed(leaky: Planted):
    drawn = initial_noise(range(2, 5), leaky.model, published=True)
    assert drawn.equal(torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)))
    assert initial_noise(range(2, 5), leaky.model).equal(row_noise(0, range(2, 5), (4, 8, 8)))


def test_published_images_are_measured_as_jpeg():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    saved = as_saved(images)
    assert 0.01 < float((saved - images).abs().mean()) < 0.2
    assert torch.allclose(saved * 255, (saved * 255).round(), atol=1e-4)
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert torch.allclose(as_saved(flat), flat, atol=1.5 / 255)


def test_localize_takes_thresholds_and_factors(
    simple: Planted, usual: Statistics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(Work, "load", lambda *_: simple.model)
    monkeypatch.chdir(tmp_path)
    ordinary = ordinary_captions(1, seed=9)[0]
    Path("captions.csv").write_text(f"Caption;URL;type\n{FIRST};u;VM\n{ordinary};v;TM\n{FIRST};w;VM\n")
    save_statistics(Path("s.safetensors"), usual)

    def found(name: str, *options: str) -> CaptionResult:
        given = ["captions.csv", "--statistics", "s.safetensors", "--num-seeds", "2", "--authors-table", "--out", name]
        assert cli.app(["localize", "m", *given, *options]) == 0
        return read_results(Path(name, "results.jsonl"))[0]

    plain = found("plain", "--tau", "0.45", "--k", "1")
    replayed = ["captions.csv", "--config", "plain/config.yaml", "--out", "plain"]
    assert cli.app(["localize", "m", *replayed]) == 0  # the same run, its threshold included
    assert (plain.tau, plain.tau_ref, plain.refined) == (0.45, 0.45, simple.carriers(FIRST))
    assert len(plain.initial) > 1
    told = json.loads(Path("plain/result.json").read_text())
    assert (told["verbatim"]["counts"]["localized"], told["template"]["counts"]["not_memorised"]) == (1, 1)
    assert (told["verbatim"]["refined_neurons"]["median"], told["template"]["refined_neurons"]) == (1, None)
    low = found("low", "--tau", "0.45", "--k", "1", "--tau-refinement", "1e-6")
    assert (low.tau_ref, low.refined) == (1e-6, low.initial)  # nothing goes: no score is as low
    relative = found("relative", "--tau", "0.45", "--k", "1", "--relative-refinement", "0.2")
    assert abs(relative.score_refined / relative.score_initial - 1) < 0.2
    assert relative.refined.minus(simple.carriers(FIRST)) != relative.refined  # what carries the memory stays
    weak = found("weak", "--tau", "0.45", "--scaling-factor", "0.95")
    assert weak.status == "not_localized"  # as good as on
    with pytest.raises(UserError, match=r"`tau` is 1.5"):
        found("no", "--tau", "1.5")
    for option, value in (("--tau-refinement", "0"), ("--relative-refinement", "-1")):
        with pytest.raises(UserError, match=f"`{option[2:].replace('-', '_')}` is {value}"):
            found("no", "--tau", "0.45", option, value)

    # One row for each line of the list, the caption given twice too, and no empty cell.
    path = Path("weak", "tables", "published-form.csv")
    rows = list(csv.DictReader(path.open(newline=""), delimiter=";"))
    assert [row["URL"] for row in rows] == ["u", "v", "w"]
    assert all(cell for row in rows for cell in row.values())
    back = read_authors_table(path, value_sites(simple.model.backbone))
    assert [row.initial for row in back] == [weak.initial, NO_NEURONS, weak.initial]


def test_a_table_is_exported_for_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny pipeline has two value layers, where the published tables have seven."""
    monkeypatch.chdir(tmp_path)
    pipeline = tiny.pipeline("sd15")
    pipeline.save_pretrained("model")
    layers = value_sites(pipeline.unet).sites
    cell = json.dumps([[1], *[[] for _ in layers[1:-1]], [0]])
    header = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
    Path("table.csv").write_text(f"{header}\na;;{cell};0.4;{cell};0.4\n")
    assert cli.app(["export", "model", "table.csv", "--no-lora", "--out", "edit"]) == 0
    told = json.loads(Path("edit/manifest.json").read_text())
    assert told["neurons"] == {layers[0].module: [1], layers[-1].module: [0]}
    assert cli.app(["export", "model", "table.csv", "--most-frequent", "1", "--no-lora", "--out", "one"]) == 0
    told = json.loads(Path("one/manifest.json").read_text())
    assert told["neurons"] == told["captions"]["a"] == {layers[0].module: [1]}


def test_a_published_table_is_exported_for_what_cannot_be_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An edit needs the value layers alone; a table without a model's word is of SD 1.x and 2.x."""
    monkeypatch.chdir(tmp_path)
    first = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2"
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
        f"{first}.to_k.weight": torch.ones(320, 768),
        f"{first}.to_v.weight": torch.ones(320, 768),
    }
    save_file(tensors, "sd15.safetensors")
    cell = json.dumps([[25], *[[] for _ in range(6)]])
    header = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
    Path("table.csv").write_text(f"{header}\na;;{cell};0.4;{cell};0.4\n")
    assert cli.app(["export", "sd15.safetensors", "table.csv", "--no-lora", "--out", "edit"]) == 0
    rows = load_file("edit/model.safetensors")[f"{first}.to_v.weight"].any(1)
    assert rows.nonzero().flatten().tolist() == [row for row in range(320) if row != 25]
