"""Every command in-process, on a tiny pipeline on disk: from images to a probe, bad input, and odd files."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.cli import main
from diffcore.models import DiffusionModel, from_pipeline
from diffcore.testing import tiny
from diffcore.testing.distributed import run_forked
from diffcore.testing.waiting import wait_until
from diffcore.zoo import masks
from diffusion_featsel.app.cli import app
from diffusion_featsel.app.inputs import images_at, read_pair_data
from diffusion_featsel.app.options import Extraction
from diffusion_featsel.app.scoring import filtered_by
from diffusion_featsel.correspond import match_pairs
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.files.features import StoredFeatures
from diffusion_featsel.files.images import ImageList
from diffusion_featsel.files.ranking import FILE, read_ranking
from diffusion_featsel.gram import labels_on_grid
from diffusion_featsel.inventory import inventory
from diffusion_featsel.keypoints import keypoint_scores
from diffusion_featsel.match import MatchSettings
from diffusion_featsel.paper_filter import paper_filter
from diffusion_featsel.probe import ProbeSettings, probe
from diffusion_featsel.protocol import Protocol
from diffusion_featsel.published import against_paper

GOOD = "up-level1-repeat0-res-out"
PAIR = ["images/00.png", "images/01.png"]


@dataclass(frozen=True)
class Place:
    """A folder with a model, images, masks, pairs, and the runs of `score`, `select` and `extract`.

    Attributes:
        folder: The folder, which is the current one while tests run.
        capsys: Output of the commands.
    """

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *tokens: str | Path, code: int = 0) -> tuple[str, str]:
        """Runs a command, checks its exit code, and returns what it prints and what it tells."""
        self.capsys.readouterr()
        found = main(app, [str(token) for token in tokens])
        out, err = self.capsys.readouterr()
        assert found == code, err
        return out, err

    def json(self, *tokens: str | Path) -> dict:
        return json.loads(self(*tokens, "--json")[0])


def _data(folder: Path) -> None:
    people, labels = masks(16, seed=5)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number, (image, classes) in enumerate(zip(people.images, labels, strict=True)):
        pixels = (image.movedim(0, 2).numpy() * 255).round().astype("uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
        Image.fromarray((classes.numpy() > 0).astype("uint8")).save(folder / "masks" / f"{number:02}.png")
    side = people.images.shape[-1]
    rows = [
        {
            "source_path": f"images/{number:02}.png",
            "target_path": f"images/{number + 1:02}.png",
            "source_points": [[3, 4], [20, 9]],
            "target_points": [[3, 4], [20, 9]],
            "target_bounding_box": [0, 0, side, side],
            "category": "face" if number % 2 else "head",
        }
        for number in range(4)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    rows[0]["source_points"], rows[1]["target_bounding_box"] = [[500, 500], [20, 9]], [4, 4, 4, 4]
    (folder / "odd-pairs.json").write_text(json.dumps(rows))
    rows[0]["source_path"] = "images/none.png"
    (folder / "missing.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder in which score, select and extract have run."""
    folder = tmp_path_factory.mktemp("place")
    tiny.pipeline("sd15").save_pretrained(folder / "model")
    _data(folder)
    (folder / "few").mkdir()
    for number in range(5):
        shutil.copy(folder / "images" / f"{number:02}.png", folder / "few")
    (folder / "empty").mkdir()
    (folder / "broken.json").write_text("{")
    (folder / "other.json").write_text('{"a": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(app, ["score", "model", "images", "--filter", "none", "--out", "scored"]) == 0
        assert main(app, ["select", "scored", "96ch", "--out", "chosen"]) == 0
        assert main(app, ["extract", "model", "images", "--features", "chosen", GOOD, "--out", "wrong"]) == 2
        assert main(app, ["extract", "model", "images", "--features", "chosen", "--out", "extracted"]) == 0
    return folder


@cache
def model_of() -> DiffusionModel:
    """Returns the model that commands read from disk."""
    return from_pipeline(tiny.pipeline("sd15"))


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Place]:
    monkeypatch.chdir(made)
    yield Place(made, capsys)
    shutil.rmtree(made / "runs", ignore_errors=True)


def test_from_a_ranking_to_a_selection_features_and_a_probe(place: Place):
    scored, chosen = (json.loads((place.folder / run / "result.json").read_text()) for run in ("scored", "chosen"))
    assert scored["images"] == 16
    assert set(scored["best"]) >= set(chosen["names"][:1])
    selection = json.loads((place.folder / "chosen" / "selection.json").read_text())
    assert selection["names"] == chosen["names"]
    result = place.json("probe", "extracted", "masks", "--grid", "8", "--num-splits", "2")
    assert result["activations"] == chosen["names"]
    again = place.json("probe", "extracted", ".", "--grid", "8", "--num-splits", "2", "--out", "runs/again")
    assert again["miou"] == result["miou"]
    assert 0.3 < result["miou"]["mean"] <= 1  # two classes: all background gives less
    page = (place.folder / "runs" / "probe-extracted" / "report.html").read_text()
    assert "Intersection over union" in page


def test_the_same_command_reads_and_another_is_refused(place: Place):
    before = (place.folder / "scored" / "ranking.safetensors").stat().st_mtime_ns
    words = ["score", "model", "images", "--filter", "none", "--out", "scored"]
    place(*words)
    _, told = place(*words, "--seed", "3", code=2)
    assert "seed: 0 -> 3" in told
    assert "--restart" in told
    assert (place.folder / "scored" / "ranking.safetensors").stat().st_mtime_ns == before
    place("extract", "model", "images", "--features", "chosen", "--out", "extracted")


def test_two_processes_write_the_files_of_one(place: Place):
    """Both ranks run the command itself, as a launcher starts it."""
    words = ["extract", "model", "images", "--features", "chosen", "--devices", "2", "--out"]

    def on_rank(rank: int) -> int:
        if rank == 0:  # the one that opens the run is late; the other must not write before
            wait_until((place.folder / "runs" / "both" / "features").exists, seconds=0.5)
        return main(app, [*words, "runs/both"])

    assert run_forked(on_rank) == [0, 0]
    files = sorted((place.folder / "extracted" / "features").glob("*.safetensors"))
    assert files
    for path in files:
        assert (place.folder / "runs" / "both" / "features" / path.name).read_bytes() == path.read_bytes()
    assert run_forked(on_rank) == [0, 0]  # it is finished: both only read
    (place.folder / "runs" / "taken").mkdir()
    (place.folder / "runs" / "taken" / "mine.txt").write_text("not of a run")
    assert run_forked(lambda _: main(app, [*words, "runs/taken"])) == [2, 2]


def test_a_ranking_is_compared_with_the_papers_tables(place: Place):
    """The tiny model has activations of the paper's names, so that all but the figures is that of real weights."""
    scored = place.json("score", "model", "images", "--filter", "none", "--against-paper", "sd15")
    words = ["evaluate", "model", ".", "--task", "segmentation", "--features", "all"]
    found = place.json(*words, "--against-paper", "sd15")
    for told in (scored["against_paper"], found["against_paper"]):
        assert told["model"] == "sd15"
        assert told["n"] == 8
        assert -1 <= told["simple"] <= 1
    expected = against_paper(found["activations"], "sd15")
    assert found["against_paper"]["complex"] == expected.complex
    assert "Horse-21" in (place.folder / "runs" / "evaluate-model" / "report.html").read_text()


def test_a_report_is_made_again(place: Place):
    for run in ("scored", "chosen", "extracted"):
        page = place.folder / run / "report.html"
        page.unlink()
        place("report", run)
        assert "<h1" in page.read_text()


def test_an_inventory_as_text_and_as_json(place: Place):
    lines = place("inventory", "model", "up-*res-out")[0].splitlines()
    assert lines[0].split()[0] == "activation"
    assert GOOD in [line.split()[0] for line in lines]
    rows = place.json("inventory", "model/unet/config.json", "--kind", "res-out")["activations"]
    assert {row["kind"] for row in rows} == {"res-out"}
    assert f"{len(lines) - 2} activations" in lines[-1]


def test_points_are_found_and_told_as_json(place: Place):
    found = place.json("correspond", "model", *PAIR, "--features", "chosen", "--points", "3,4", "20,9")
    assert [(row["x"], row["y"]) for row in found["matches"]] == [(3, 4), (20, 9)]
    same = ["images/00.png", "images/00.png", "--features", GOOD, "--points", "9,9", "--out", "runs/same"]
    row = place.json("correspond", "model", *same)["matches"][0]
    assert abs(row["found x"] - 9) <= 2
    assert row["cosine"] > 0.95


def test_key_points_outside_and_empty_boxes_are_left_out_and_counted(place: Place):
    found = place.json("evaluate", "model", "odd-pairs.json", "--features", "chosen")
    assert found["left_out"]["points_outside"] == 1
    assert found["left_out"]["pairs_without_box"] == 1


def test_a_figure_below_the_limit_is_a_failed_check(place: Place):
    words = ["evaluate", "model", "pairs.json", "--features", GOOD]
    place(*words, "--fail-below", "1", "--out", "runs/strict", code=1)
    place(*words, "--fail-below", "0", "--out", "runs/lax")


def test_labels_choose_and_every_activation_is_measured_alone(place: Place):
    found = place.json("evaluate", "model", "pairs.json", "--features", "all")
    assert found["figure"] == max(found["activations"].values())
    assert found["activations"][GOOD] <= found["figure"]
    words = ["--labels", ".", "--candidates", "2", "--max-size", "1"]
    assert place.json("select", "scored", "96ch", *words, "--out", "runs/pixels")["method"] == "pixels"
    words = ["--labels", "pairs.json", "--task", "correspondence", "--candidates", "2", "--max-size", "1"]
    assert place.json("select", "scored", "96ch", *words, "--out", "runs/points")["method"] == "pairs"


def test_a_probe_is_that_of_the_stored_maps_and_of_the_masks_by_name(place: Place):
    """Some images have no mask, and one mask has no image."""
    some = place.folder / "runs" / "some"
    some.mkdir(parents=True)
    for number in range(4, 16):
        shutil.copy(place.folder / "masks" / f"{number:02}.png", some)
    Image.new("L", (8, 8), 1).save(some / "00x.png")
    stored = StoredFeatures.open(place.folder / "extracted")
    name = stored.names[-1]
    words = ["probe", "extracted", some, "--kind", "logistic", "--features", name, "--grid", "8"]
    found = place.json(*words, "--num-splits", "2", "--num-train", "5", "--seed", "3", "--num-classes", "3")
    images = [f"{number:02}.png" for number in range(4, 16)]
    masks = torch.stack([torch.from_numpy(np.asarray(Image.open(some / image))) for image in images]).long()
    settings = ProbeSettings(grid=(8, 8), num_splits=2, num_train=5, seed=3)
    features = {name: stored.maps(name, images).float()}
    expected = probe(features, labels_on_grid(masks, (8, 8)), "logistic", num_classes=3, settings=settings)
    assert (found["kind"], found["activations"], found["num_splits"]) == ("logistic", [name], 2)
    assert found["miou"] == pytest.approx(expected.to_json()["miou"])
    assert found["figure"] == found["miou"]["mean"]
    kept = json.loads((place.folder / "runs" / "probe-extracted" / "result.json").read_text())
    assert len(kept["per_class"]) == 3


def test_images_of_their_own_proportions_are_extracted_at_the_asked_size(place: Place):
    odd = place.folder / "runs" / "odd"
    odd.mkdir(parents=True)
    for name, size in (("wide", (40, 20)), ("tall", (20, 40))):
        Image.effect_noise(size, 50).convert("RGB").save(odd / f"{name}.png")
        Image.new("L", size).save(odd / f"{name}_mask.png")
    (odd / "images").mkdir()
    for name in ("wide", "tall"):
        shutil.move(odd / f"{name}.png", odd / "images")
    words = ["--features", GOOD, "--mode", "native", "--size", "32", "--out", "runs/native"]
    place("extract", "model", "runs/odd/images", *words)
    stored = StoredFeatures.open(place.folder / "runs" / "native")
    shapes = [tuple(stored.read(GOOD, f"{name}.png").shape[1:]) for name in ("wide", "tall")]
    assert shapes == [(8, 16), (16, 8)]
    assert stored.description["protocol"]["size"] == 32
    for name in ("wide", "tall"):
        Image.new("L", (8, 8)).save(odd / f"{name}.png")
        (odd / f"{name}_mask.png").unlink()
    shutil.rmtree(odd / "images")
    _, told = place("probe", "runs/native", "runs/odd", code=2)
    assert "several sizes" in told
    place("extract", "model", "few", "--features", GOOD, "--size", "32", "--out", "runs/squash")
    assert StoredFeatures.open(place.folder / "runs" / "squash").read(GOOD, 0).shape[1:] == (16, 16)


@pytest.mark.parametrize("protocol", ["ours", "paper"])
def test_key_points_are_matched_as_the_protocol_says(place: Place, protocol: Literal["ours", "paper"]):
    names = json.loads((place.folder / "chosen" / "selection.json").read_text())["names"]
    words = ["evaluate", "model", "pairs.json", "--features", *names, "--protocol", protocol]
    found = place.json(*words, "--seed", "3", "--out", f"runs/{protocol}")
    extractor = FeatureExtractor(model_of(), names, protocol=protocol, seed=3)
    data = read_pair_data("pairs.json")
    weights = None
    if protocol == "ours":
        extractor.calibrate([data.picture(f"images/{number:02}.png") for number in range(5)])
        weights = {name: 1 / extractor.statistics[name].rms for name in names}
    points = match_pairs(
        data.pairs,
        data.reader(extractor),
        extractor.usual_size,
        settings=MatchSettings(protocol="exact" if protocol == "ours" else "paper"),
        weights=weights,
        center="pair" if protocol == "ours" else None,
    )
    scores = keypoint_scores(data.pairs, points)
    rows = json.loads((place.folder / "runs" / protocol / "result.json").read_text())["pck"]
    assert len(rows) == 4
    for row, form in zip(rows, scores.forms, strict=True):
        assert [row[f"PCK@{alpha:g}"] for alpha in scores.thresholds] == [one.value for one in form.overall]
    assert found["figure"] == scores.share("image", "points").value


def test_the_papers_filter_keeps_what_is_asked_for(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffusion_featsel.app.scoring.family_of", lambda names: "sd15")
    ranking = read_ranking(place.folder / "scored" / FILE)[0]
    names = [row.name for row in ranking.rows]
    rule = paper_filter(names, "sd15")
    listed = inventory(tiny.backbone("sd15"))
    assert filtered_by("paper", ranking, listed, 16, ()).kept == rule.kept
    assert rule.dropped[names[0]]
    found = filtered_by("paper", ranking, listed, 16, (names[0],))
    assert set(found.kept) == {names[0], *rule.kept}
    assert found.dropped == {name: reason for name, reason in rule.dropped.items() if name != names[0]}
    assert filtered_by("none", ranking, listed, 16, ()).kept == tuple(names)


def test_images_of_a_ranking_are_spread_over_the_folder(place: Place):
    listed = ImageList.of(place.folder / "images")
    extraction = Extraction(size=32, mode="squash")
    images, _, found = images_at(model_of(), place.folder / "images", extraction, 5)
    expected = listed.read([listed.images[number] for number in (0, 3, 6, 9, 12)])
    prepared = Protocol(size=32).prepare(model_of(), [torch.from_numpy(pixels).movedim(2, 0) for pixels in expected])
    assert torch.equal(images, prepared.images)
    assert next(row.grid for row in found.rows if row.name == GOOD) == (16, 16)


def test_the_reader_of_pairs_gives_each_image_its_own_features(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffusion_featsel.app.inputs._REMEMBERED", 2)
    extractor = FeatureExtractor(model_of(), [GOOD])
    data = read_pair_data("pairs.json")
    names = [f"images/{number:02}.png" for number in (3, 1, 3, 0)]
    expected = extractor([data.picture(name) for name in names])[GOOD]
    reader = data.reader(extractor)
    for order in ([0, 1, 2, 3], [3, 2], [1, 0]):
        found = reader([names[place] for place in order])[GOOD]
        torch.testing.assert_close(found, expected[order], atol=1e-4, rtol=1e-3)


def test_files_of_all_kinds_are_read_or_listed(place: Place):
    odd = place.folder / "runs" / "odd"
    odd.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(odd / "plain.png")
    Image.fromarray(pixels).save(odd / "the same.bmp")
    Image.fromarray(pixels[..., 0]).save(odd / "grey.png")
    Image.fromarray(pixels).convert("CMYK").save(odd / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(odd / "deep.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(odd / "alpha.png")
    Image.fromarray(pixels).save(odd / "animated.gif", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    whole = (odd / "plain.png").read_bytes()
    (odd / "cut.png").write_bytes(whole[: len(whole) // 2])
    (odd / "nothing.png").write_bytes(b"")
    words = ["extract", "model", odd, "--features", GOOD, "--out", "runs/of-odd"]
    plan = place.json(*words, "--dry-run")
    assert (plan["images"], plan["distinct"], plan["skipped"]) == (7, 5, 2)
    result = place.json(*words)
    assert result["images"] == 7
    assert {name for name, _ in result["skipped"]} == {"cut.png", "nothing.png"}


BAD = {
    "score model few": ["has 5 distinct images", "at least 16"],
    "score model images --num-images 8": ["--num-images is 8"],
    "score model nowhere": ["nowhere"],
    "score model empty": ["empty"],
    "score model images --t 5000": ["5000", "0 to 999"],
    "score model images --t soon": ["--t", "soon"],
    "score model images --filter paper": ["--filter", "measured"],
    "score model images --draws 0": ["--draws is 0"],
    "select scored 2B": ["--budget", "cheapest candidate"],
    "select scored plenty": ["--budget", "3520ch"],
    "select empty 8MiB": ["ranking.safetensors", "score"],
    "select scored 96ch --labels few": ["few has no image with a mask"],
    "select scored 96ch --labels missing.json --task correspondence": ["images/none.png"],
    "extract model images --features up-level7-repeat0-res-out": ["up-level7-repeat0-res-out", "nearest: up-level"],
    "extract model images --features up-level1-repeat0-vit-block0-self-map": ["self-map", "queries"],
    "extract model images --features up-level1-repeat0-vit-block0-cross-k": ["cross-k", "text"],
    "extract model images --features sd15/practcal": ["--features", "sd15/practical"],
    "extract model images --features sdxl/practical": ["no activation"],
    "extract model images --features none.json": ["--features", "no such file"],
    "extract model images --features broken.json": ["broken.json"],
    "extract model images --features other.json": ["other.json is no selection"],
    "extract model images --features empty": ["--features", "selection.json"],
    f"extract model images --features {GOOD} --project pca:9999": ["9999 components are wanted"],
    f"extract model images --features {GOOD} --project most": ["--project"],
    f"extract model images --features {GOOD} --prompts pairs.json": ["pairs.json"],
    f"extract model images --features {GOOD} --shard-mb 0": ["--shard-mb"],
    f"extract model images --features {GOOD} --t 5000": ["5000", "0 to 999"],
    f"extract model images --features {GOOD} --t -3": ["-3", "0 to 999"],
    "correspond model images/00.png none.png": ["none.png is no file"],
    "correspond model images/00.png images/01.png --points here": ["--points", "x,y"],
    "correspond model images/00.png images/01.png --points 500,3": ["--points has 500,3", "outside of 00.png"],
    "evaluate model pairs.json": ["--features"],
    f"evaluate model missing.json --features {GOOD}": ["images/none.png"],
    f"evaluate model broken.json --features {GOOD}": ["broken.json"],
    f"evaluate model empty --features {GOOD}": ["empty"],
    f"evaluate model . --task segmentation --num-classes 1 --features {GOOD}": ["has the class 1"],
    f"evaluate model . --task segmentation --num-train 99 --features {GOOD}": ["--num-train"],
    f"evaluate model pairs.json --features {GOOD} --fail-below 3": ["--fail-below is 3"],
    "probe images .": ["has no features", "extract"],
    "probe extracted empty": ["no image with a mask"],
    "probe extracted masks --num-classes 1": ["has the class 1"],
    "probe extracted masks --num-train 99": ["--num-train"],
    "probe extracted masks --features up-level7-repeat0-res-out": ["was not extracted; there are"],
    "report empty": ["holds no run"],
    "inventory model --kind nothing": ["--kind 'nothing'", "res-out"],
    "inventory nowhere": ["nowhere does not exist"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_told_and_leaves_nothing(words: str, place: Place):
    out, told = place(*words.split(), code=2)
    assert not out
    assert "`" not in told
    for text in BAD[words]:
        assert text in told
    assert not (place.folder / "runs").exists()


def test_a_selection_of_another_model_is_taken_with_a_warning(place: Place):
    selection = json.loads((place.folder / "chosen" / "selection.json").read_text())
    runs = place.folder / "runs"
    runs.mkdir()
    (runs / "foreign.json").write_text(json.dumps(selection | {"model": "0" * 64}))
    with pytest.warns(UserWarning, match="chosen on another model"):
        place("extract", "model", "few", "--features", "runs/foreign.json", "--dry-run")
