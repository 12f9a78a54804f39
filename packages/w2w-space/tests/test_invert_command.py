"""Adapters from pictures through the command line: subjects, masks, comparisons, what is written, and bad input."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffcore.adapters import read_adapter
from diffcore.cli import main
from diffcore.models import load
from diffcore.models.bases import base_on_disk
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.distributed import run_forked
from diffcore.testing.waiting import wait_until
from w2w_space.app import inverting
from w2w_space.app.cli import app
from w2w_space.directions import find_directions
from w2w_space.files.directions import save_directions
from w2w_space.files.points import load_point
from w2w_space.files.space import load_space, save_space
from w2w_space.files.subjects import open_mask
from w2w_space.instance import Instance
from w2w_space.invert import InversionSettings
from w2w_space.invert import invert as search
from w2w_space.labels import Labels
from w2w_space.pictures import condition_of, framed, mask_cells
from w2w_space.population import Population, Stacked
from w2w_space.recipe import layout_for
from w2w_space.space import WeightSpace

from .conftest import Place

searching: Any = importlib.import_module("w2w_space.invert")  # the package's attribute is the function
PROMPT = "a photo of a sks toy"
SETTINGS = InversionSettings(num_components=3, steps=4, batch_size=2, check_every=2, num_pairs=2, learning_rate=0.2)
QUICK = ("--num-components", "3", "--steps", "4", "--batch-size", "2", "--check-every", "2", "--num-pairs", "2")
QUICK += ("--learning-rate", "0.2")
BLIND = (*QUICK, "--num-images", "0")


@dataclass(frozen=True)
class Inverting(Place):
    """Commands on one folder, in the words of this file."""

    def invert(self, *tokens: str | Path, code: int = 0) -> dict[str, Any]:
        words = ("invert", "space.safetensors", "model", *tokens, "--prompt", PROMPT, "--json")
        return json.loads(self(*words, code=code)[0])

    def refused(self, *tokens: str | Path) -> str:
        words = ("invert", "space.safetensors", "model", *tokens, *BLIND, "--prompt", PROMPT, "--out", "refused")
        return self(*words, code=2)[1]


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(*size[::-1], 3, generator=g) * 255).byte().numpy())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invert")
    tiny.pipeline("sd15").save_pretrained(folder / "model")
    model = load(folder / "model", Runtime(device="cpu"))
    layout = layout_for(model, ("to_q", "to_v"), 1)
    g = torch.Generator().manual_seed(0)
    names = tuple(f"member {number}" for number in range(12))
    matrix = torch.randn(12, layout.size, generator=g)
    space = WeightSpace.build(Population(layout, names, Stacked(matrix)), num_components=6)
    save_space(
        space,
        folder / "space.safetensors",
        base=model.adapter_base,
        dtype="float32",
        model_fingerprint=model.fingerprint,
    )
    values = torch.randn(12, 2, generator=g)
    found = find_directions(space, Labels.of(names, {"age": values[:, 0].tolist(), "hat": values[:, 1].tolist()}))
    save_directions(found, folder / "directions.safetensors")
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    (folder / "words.txt").write_text("not a picture")
    return folder


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inverting:
    monkeypatch.chdir(made)
    return Inverting(made, capsys)


def test_pictures_of_one_subject_share_a_point(place: Inverting):
    """What the command writes is what the function finds from pictures in memory."""
    told = place.invert("0.png", "1.png", "words.txt", *BLIND, "--out", "one", "--name", "toy")
    assert list(told["subjects"]) == ["toy"]
    assert told["left_out"][0][0] == "words.txt"
    space, model = load_space("space.safetensors"), load("model", Runtime(device="cpu"))
    toy = Instance.from_pictures(model, [Image.open("0.png"), Image.open("1.png")], name="toy", prompt=PROMPT)
    found = search(space, model, [toy], SETTINGS)
    point = load_point("one/points/toy.safetensors", space)
    assert point.z.any()
    assert torch.equal(point.z, found.points[0].z)
    assert told["subjects"]["toy"]["loss"] == pytest.approx(float(found.losses[0]))
    written = read_adapter("one/adapters/toy.safetensors", base_on_disk(Path("model"))).modules
    for module, change in point.adapter().modules.items():
        assert change.relative_error(written[module]) < 5e-3
    words = ("edit", "space.safetensors", "one/points/toy.safetensors", "age=1")
    place(*words, "--directions", "directions.safetensors", "--out", "older.safetensors")
    older = read_adapter("older.safetensors", base_on_disk(Path("model"))).modules
    assert all(change.relative_error(older[module]) > 1e-2 for module, change in written.items())


def test_every_picture_is_a_subject_and_all_are_compared(place: Inverting):
    words = ("0.png", "1.png", "2.png", "--each", *QUICK, "--num-images", "1", "--image-steps", "2")
    words += ("--directions", "directions.safetensors", "--baseline", "--refine", "0.05", "--out", "each")
    told = place.invert(*words)
    assert list(told["subjects"]) == ["0", "1", "2"]
    names = {path.name for path in Path("each/adapters").glob("*.safetensors")}
    assert names == {f"{name}{kind}.safetensors" for name in "012" for kind in ("", "-free", "-refined")}
    alone = place.invert("1.png", *BLIND, "--out", "alone")["subjects"]["1"]
    row = told["subjects"]["1"]
    assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert row["loss_of_refined"] <= row["loss"]
    assert 0 < row["departure"] <= 0.05 + 1e-6
    assert row["outside"] > 0
    assert row["loss_of_free_adapter"] != row["loss_of_base"]
    assert len(row["nearest_members"]) == 3
    page = Path("each/report.html").read_text()
    for word in ("What the found adapters draw", "How much is explained", "Where the subjects lie", "Attributes"):
        assert word in page
    table = Path("each/tables/attributes.csv").read_text().splitlines()
    assert table[0] == "subject,age,hat"
    assert "percentile" in table[1]
    assert place.invert(*words) == told


def test_a_mask_is_cropped_with_its_picture(place: Inverting):
    """The left half of the central square, in masks of three kinds and two resolutions."""
    for name, size in (("grey", (24, 16)), ("small", (12, 8)), ("clear", (24, 16))):
        half = Image.new("L", size)
        half.paste(255, (0, 0, size[0] // 2, size[1]))
        if name == "clear":
            drawn = Image.new("RGBA", size, (255, 255, 255, 0))
            drawn.putalpha(half)
            half = drawn
        half.save(f"{name}.png")
    grey, small, clear = (
        mask_cells(open_mask(Path(f"{name}.png")), (24, 16), 8) for name in ("grey", "small", "clear")
    )
    assert torch.equal(grey, clear)
    assert torch.equal(grey, small)
    assert float(grey[0, :, :4].min()) == 1.0
    assert float(grey.sum()) == 32
    masked = place.invert("0.png", "--mask", "clear.png", *BLIND, "--out", "masked")["subjects"]["0"]
    bare = place.invert("0.png", *BLIND, "--out", "bare")["subjects"]["0"]
    assert masked["loss"] != bare["loss"]
    space, model = load_space("space.safetensors"), load("model", Runtime(device="cpu"))
    shown = framed(model, [Image.open("0.png")], [open_mask(Path("grey.png"))])
    toy = Instance.encoded(model, shown, "0", condition_of(model, prompt=PROMPT))
    assert masked["loss"] == pytest.approx(float(search(space, model, [toy], SETTINGS).losses[0]), rel=1e-5)
    # Masks that are stored on their side, as some cameras do with pictures.
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.new("L", (24, 16))
    upright.paste(255, (0, 0, 12, 8))
    clear = Image.new("RGBA", (24, 16), "white")
    clear.putalpha(upright)
    cells = [mask_cells(upright, (24, 16), 8)]
    for drawn in (upright, clear):
        drawn.rotate(90, expand=True).save("turned.png", exif=exif)
        cells.append(mask_cells(open_mask(Path("turned.png")), (24, 16), 8))
        assert torch.equal(cells[0], cells[-1])
    assert float(cells[0][0, :4, :4].min()) == 1.0
    assert float(cells[0].sum()) == 16


def test_masks_that_do_not_fit_are_refused(place: Inverting):
    Image.new("L", (24, 16)).save("empty.png")
    edge = Image.new("L", (24, 16))
    edge.paste(255, (0, 0, 3, 16))
    edge.save("edge.png")
    Image.new("L", (16, 16), 255).save("square.png")
    Image.new("L", (24, 16), 255).save("full.png")
    assert "marks nothing" in place.refused("0.png", "--mask", "empty.png")
    assert "marks nothing" in place.refused("0.png", "--mask", "edge.png")  # it lies outside the central square
    assert "16 x 16 pixels and its picture 24 x 16" in place.refused("0.png", "--mask", "square.png")
    assert "2 usable pictures; give one --mask for each" in place.refused("0.png", "1.png", "--mask", "full.png")
    assert "words.txt is no picture" in place.refused("0.png", "--mask", "words.txt")
    assert not Path("refused").exists()


def test_bad_input_is_told_before_anything_is_computed(place: Inverting):
    Path("more").mkdir(exist_ok=True)
    picture(5).save("more/0.png")
    assert "two subjects of one name, '0'" in place.refused("0.png", "more/0.png", "--each")
    # File systems that fold case would write both into one file.
    picture(6).save("more/subject.png")
    picture(7).save("more/Subject.png")
    assert "two subjects of one name" in place.refused("more/subject.png", "more/Subject.png", "--each")
    assert "no usable picture" in place.refused("words.txt")
    assert "nothing.png" in place.refused("nothing.png")
    seven = ("invert", "space.safetensors", "model", "0.png", "--prompt", PROMPT, "--num-components", "7")
    assert "--num-components is 7; the space has 6" in place(*seven, "--out", "refused", code=2)[1]
    assert "takes no classes" in place.refused("0.png", "--class-label", "1")
    assert "--refine is -1" in place.refused("0.png", "--refine", "-1")
    assert "leave it out with --each" in place.refused("0.png", "--each", "--name", "a")
    assert "cannot be the name of a file" in place.refused("0.png", "--name", "a/b")
    words = ("invert", "space.safetensors", "model", "0.png")
    assert "takes a --prompt" in place(*words, *BLIND, code=2)[1]
    assert "--prior is -1" in place(*words, "--prior", "-1", code=2)[1]
    assert "holds no space" in place("invert", "words.txt", "model", "0.png", code=2)[1]
    assert not Path("refused").exists()


def test_a_space_of_another_model_is_refused_or_told(place: Inverting):
    tiny.pipeline("sd15", width=64).save_pretrained("wide")
    tiny.pipeline("sd15", seed=1).save_pretrained("twin")
    words = ("0.png", "--prompt", PROMPT, *BLIND)
    _, err = place("invert", "space.safetensors", "wide", *words, "--out", "wide-run", code=2)
    assert "take the base model that they were made for" in err
    assert not Path("wide-run").exists()  # told before a picture is encoded
    out, err = place("invert", "space.safetensors", "twin", *words, "--out", "twin-run", "--json")
    assert "trained on other weights than those of twin" in err
    assert "trained on other weights" in json.loads(out)["notes"][0]


def test_an_interrupted_search_and_two_processes_end_alike(place: Inverting, monkeypatch: pytest.MonkeyPatch):
    words = ("0.png", "1.png", "2.png", "--each", "--group-size", "2", *BLIND)
    whole = place.invert(*words, "--out", "whole")["subjects"]
    done, real = [], searching._search

    def stopping(*args: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "_search", stopping)
        place("invert", "space.safetensors", "model", *words, "--prompt", PROMPT, "--out", "stopped", code=130)
    # A command that was killed while it wrote the adapters leaves pieces of them.
    Path("stopped/adapters").mkdir()
    Path("stopped/adapters/0.safetensors").write_bytes(b"half")
    assert place.invert(*words, "--out", "stopped")["subjects"] == whole
    assert Path("stopped/adapters/0.safetensors").read_bytes() == Path("whole/adapters/0.safetensors").read_bytes()

    def on_rank(rank: int) -> int:
        if rank == 0:
            wait_until((place.folder / "both" / "parts").exists, seconds=0.5)
        tokens = ["invert", "space.safetensors", "model", *words, "--prompt", PROMPT, "--devices", "2", "--out", "both"]
        return main(app, [str(token) for token in tokens])

    assert run_forked(on_rank) == [0, 0]
    for name in whole:
        for folder in ("stopped", "both"):
            path = Path(folder, "points", f"{name}.safetensors")
            assert path.read_bytes() == Path("whole", "points", f"{name}.safetensors").read_bytes()


def test_a_run_is_of_its_pictures_and_masks(place: Inverting):
    picture(7).save("changing.png")
    Image.new("L", (24, 16), 255).save("changing-mask.png")
    words = ("changing.png", "--mask", "changing-mask.png", *BLIND, "--out", "changing")
    told = place.invert(*words)
    assert place.invert(*words, "--group-size", "3")["subjects"] == told["subjects"]  # no result depends on it
    Image.new("L", (24, 16), 200).save("changing-mask.png")
    refused = ("invert", "space.safetensors", "model", *words, "--prompt", PROMPT)
    assert "masks" in place(*refused, code=2)[1]
    Image.new("L", (24, 16), 255).save("changing-mask.png")
    picture(8).save("changing.png")
    assert "pictures" in place(*refused, code=2)[1]


def test_a_subject_outside_the_space_is_told(place: Inverting, monkeypatch: pytest.MonkeyPatch):
    """A bound so narrow that the search lies on it, and a base model that explains the pictures better."""
    told = place.invert("0.png", *BLIND, "--max-std", "0.01", "--out", "narrow")
    assert told["subjects"]["0"]["at_bound"]
    assert "lies at the bound of the search" in told["notes"][0]
    inside = place.invert("0.png", *BLIND, "--out", "inside")
    assert not inside["subjects"]["0"]["at_bound"]
    assert inside["notes"] == []
    monkeypatch.setattr(inverting, "fixed_losses", lambda *_, **__: torch.tensor([0.5]))
    assert "0 lies outside the space" in place.invert("0.png", *BLIND, "--out", "far")["notes"][0]
    assert "lies outside the space" in Path("far/report.html").read_text()


def test_a_dry_run_counts_and_writes_nothing(place: Inverting):
    words = ("0.png", "1.png", "2.png", "--each", *BLIND, "--baseline", "--restarts", "2", "--dry-run", "--out", "dry")
    plan = place.invert(*words)
    assert (plan["subjects"], plan["pictures"], plan["components"]) == (3, 3, 3)
    assert plan["rows_with_gradient"] == 4 * 2 * (3 * 2 + 3)
    assert not Path("dry").exists()


def test_presets_set_their_numbers(place: Inverting):
    from w2w_space.app.options_training import SearchOptions

    photo, art = SearchOptions().settings(0), SearchOptions(style="art").settings(0)
    assert (photo.prior, photo.component_share, photo.steps) == (1e-3, 0.15, 400)
    assert (art.prior, art.component_share) == (1e-2, 0.015)
    assert SearchOptions(style="art", prior=0.5).settings(0).prior == 0.5
    free = SearchOptions(max_std=0.0, max_length=0.0).settings(3)
    assert (free.max_std, free.max_length, free.seed) == (None, None, 3)
