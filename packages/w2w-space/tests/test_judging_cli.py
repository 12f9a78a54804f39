"""Commands that draw and judge: pictures of samples and edits, labels by probing, and `evaluate`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.adapters import write_adapter
from diffcore.cli import main
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from w2w_space.app.cli import app
from w2w_space.app.drawing import mask_at, texts_of
from w2w_space.files.directions import load_directions
from w2w_space.files.space import load_space
from w2w_space.recipe import layout_for

MEMBERS = 24
DRAWN = ["--prompt", "ab", "--num-seeds", "2", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("judging")
    pipeline = tiny.pipeline("sd15")
    pipeline.save_pretrained(folder / "model")
    layout = layout_for(from_pipeline(pipeline), ("to_q", "to_v"), rank=1)
    matrix = 0.3 * torch.randn(MEMBERS, layout.size, generator=torch.Generator().manual_seed(0))
    (folder / "loras").mkdir()
    for number, vector in enumerate(matrix):
        write_adapter(layout.adapter(vector), folder / "loras" / f"m{number:02d}.safetensors", dtype=torch.float32)
    rows = [f"m{number:02d},{float(vector[0])},{number % 2}" for number, vector in enumerate(matrix)]
    (folder / "labels.csv").write_text("\n".join(["adapter,first,odd", *rows]))
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    words = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {**text, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**text, **words}, vision_config=vision, projection_dim=16)
    tiny.seeded(lambda: transformers.CLIPModel(config), 0).save_pretrained(folder / "clip")
    tiny.tokenizer().save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder / "clip")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["build", "loras", "--model", "model", "--out", "space", "--num-components", "6"]
        assert main(app, words) == 0
        assert main(app, ["directions", "space", "labels.csv", "--out", "labelled"]) == 0
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str, codes: tuple[int, ...] = (0,)) -> dict:
    capsys.readouterr()
    assert main(app, [*words, "--json"]) in codes, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(app, list(words)) == 2
    return capsys.readouterr().err


def test_samples_are_drawn_beside_their_nearest_members(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(made)
    words = ["sample", "space", "new", "--num", "3", "--render", "model", *DRAWN]
    found = told(capsys, *words, codes=(0, 1))  # of so few members, a sample may be a near copy
    assert found["pictures"] == str(Path("new/samples.png"))
    with Image.open("new/samples.png") as sheet:
        assert sheet.height > 6 * 80  # each sample above its nearest member
        assert sheet.width > 2 * 80
    message = refused(capsys, "sample", "space", "other", "--render", "model")
    assert "takes prompts; give --prompt" in message
    assert not Path("other").exists()  # nothing is written before the model is known to draw


def test_an_edit_is_drawn_before_and_after(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(made)
    words = ["edit", "space", "m03", "first=+2", "--directions", "labelled", "--out", "edited.safetensors"]
    found = told(capsys, *words, "--render", "model", *DRAWN)
    assert found["pictures"] == "edited.png"
    with Image.open("edited.png") as sheet:
        shown = np.asarray(sheet.convert("L"), dtype=float)
    top, bottom = shown[: shown.shape[0] // 2, -190:], shown[shown.shape[0] // 2 :, -190:]
    rows = min(len(top), len(bottom))
    assert np.abs(top[:rows] - bottom[:rows]).mean() > 0.5  # the edit shows


def test_labels_come_from_what_members_draw(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(made)
    asked = ["--attribute", "hat", "--attribute", "blond hair"]
    words = ["directions", "space", "--probe", "model", "--scorer", "zoo:portraits-oracle", *asked, *DRAWN]
    found = told(capsys, *words, "--out", "probed")
    assert set(found["merit"]) == {"hat", "blond hair"}
    labels = Path("probed/tables/labels.csv").read_text().splitlines()
    assert labels[0] == "adapter,hat,blond hair"
    assert len(labels) == MEMBERS + 1
    again = told(capsys, "directions", "space", "probed/tables/labels.csv", "--out", "again")
    assert again["merit"] == pytest.approx(found["merit"], abs=1e-4)
    assert [row.name for row in load_directions("probed", load_space("space")).rows] == ["hat", "blond hair"]
    words = ["directions", "space", "--probe", "model", "--scorer", "clip", "--attribute", "hat=hat|bald", *DRAWN]
    assert set(told(capsys, *words, "--out", "by-clip")["merit"]) == {"hat"}


def test_evaluate_judges_edits_samples_projections_and_sizes(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(made)
    words = ["directions", "space", "--probe", "model", "--scorer", "zoo:portraits-oracle", "--attribute", "hat"]
    told(capsys, *words, *DRAWN, "--out", "hats")
    judged = ["--directions", "hats", "--scorer", "zoo:portraits-oracle", "--features", "zoo:portraits-oracle"]
    sizes = ["--labels", "labels.csv", "--scaling", "8,all", "--parts", "2", "--inversions", "1"]
    more = ["--mask", "mask.png", "--subjects", "2", "--num", "3"]
    monkeypatch.setattr("w2w_space.app.commands.judge._INVERSION_STEPS", 2)
    found = told(capsys, "evaluate", "space", "model", *judged, *sizes, *more, *DRAWN, "--out", "judged")
    assert set(found["edits"]) == {"hat"}
    assert set(found["r2"]) == {"8", "20"}
    assert set(found["identity_by_members"]) == {"8", "19"}
    assert found["identity_of_one"] != found["identity_of_two"]
    page = Path("judged/report.html").read_text()
    for heading in (
        "What edits do",
        "What more members bring",
        "How much of a new subject",
        "Samples among the members",
    ):
        assert heading in page
    assert found["answer"].startswith("The edit of hat changes its own score by")
    plain = told(capsys, "evaluate", "space", "--out", "plain")
    assert plain["sample_to_member"] > 0
    assert "edits" not in plain
    assert "r2" not in plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["directions", "space"], "give --labels, or --probe with a --scorer"),
        (["directions", "space", "labels.csv", "--probe", "model"], "and not both"),
        (["directions", "space", "--probe", "model"], "--probe and --scorer belong together"),
        (["directions", "space", "--probe", "model", "--scorer", "clip", "--prompt", "a"], "is asked in words"),
        (
            ["directions", "space", "--probe", "model", "--scorer", "clip", "--attribute", "hat=one", "--prompt", "a"],
            "'hat=one' asks for nothing",
        ),
        (
            ["directions", "space", "--probe", "model", "--scorer", "zoo:portraits-oracle", "--attribute", "wings"],
            "knows no 'wings'",
        ),
        (["evaluate", "space", "--scaling", "8"], "give --labels"),
        (["evaluate", "space", "--labels", "labels.csv", "--scaling", "many"], "no number of members"),
        (["evaluate", "space", "--directions", "labelled"], "give a model that draws"),
        (["evaluate", "space", "model", "--directions", "labelled", "--prompt", "a"], "give a --scorer"),
        (["evaluate", "space", "model", "--mask", "labels.csv", "--prompt", "a"], "is no picture"),
        (["evaluate", "space", "model"], "takes prompts; give --prompt"),
        (["evaluate", "space", "--num", "1"], "--num at least 2"),
    ],
)
def test_what_does_not_belong_together_is_told(
    words: list[str], message: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(made)
    assert message in refused(capsys, *words)


def test_words_and_masks_are_read(made: Path):
    assert texts_of(["hat=with a hat | bareheaded", "old=old|young"]) == {
        "hat": ("with a hat", "bareheaded"),
        "old": ("old", "young"),
    }
    mask = mask_at(made / "mask.png")
    assert mask.shape == (16, 16)
    assert float(mask[:4].mean()) == 1.0
    assert not mask[4:].any()
