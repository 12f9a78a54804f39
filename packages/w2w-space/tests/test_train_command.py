"""Populations from folders of pictures: what is read, trained, resumed, shared among processes, and left out."""

import importlib
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
from w2w_space.app.cli import app
from w2w_space.files.population import PopulationFolder
from w2w_space.files.space import details_of_space, load_space

from .conftest import Place

training: Any = importlib.import_module("w2w_space.train_population")  # the package's attribute is the function
PROMPT = "a photo of a sks toy"
QUICK = ("--steps", "3", "--batch-size", "2", "--num-pairs", "2", "--learning-rate", "1e-2", "--alpha", "1")
SHORT = (*QUICK, "--group-size", "2", "--num-images", "0")


@dataclass(frozen=True)
class Training(Place):
    """Commands on one folder, in the words of this file."""

    def train(self, *tokens: str | Path, code: int = 0) -> dict[str, Any]:
        return self.json("train", "model", "instances", "--prompt", PROMPT, *SHORT, *tokens, code=code)


def picture(seed: int, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    g = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(3, 4, 3, generator=g) * 255).byte().numpy()
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def write_subjects(folder: Path) -> None:
    for number, name in enumerate(("alice", "bob", "carol")):
        (folder / name).mkdir(parents=True)
        picture(number).save(folder / name / "1.png")
        picture(number, (16, 30), "L" if number == 0 else "RGBA").save(folder / name / "2.png")
    (folder / "alice" / "notes.txt").write_text("not a picture")
    (folder / "bob" / "broken.png").write_bytes((folder / "bob" / "1.png").read_bytes()[:60])
    (folder / "nobody").mkdir()
    (folder / "nobody" / "readme.txt").write_text("no pictures here")
    (folder / "unreadable").mkdir()
    (folder / "unreadable" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "labels.csv").write_text("adapter,age\nalice,3\nbob,4\ncarol,\nnobody,5\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny.pipeline("sd15").save_pretrained(folder / "model")
    write_subjects(folder / "instances")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["train", "model", "instances", "--prompt", PROMPT, *SHORT, "--out", "whole"]
        assert main(app, words) == 0
    return folder


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Training:
    monkeypatch.chdir(made)
    return Training(made, capsys)


def vectors(folder: str) -> torch.Tensor:
    found = PopulationFolder.open(folder)
    return found.rows(range(len(found)))


def test_a_folder_becomes_a_population_that_build_takes(place: Training):
    told = place.train("--out", "whole")
    assert (told["members"], told["failed"]) == (3, [])
    left_out = dict(told["left_out"])
    assert left_out["alice/notes.txt"] == "is no picture"
    assert left_out["nobody"] == "holds no pictures"
    assert "damaged" in left_out["bob/broken.png"]
    assert left_out["unreadable"] == "has no picture that can be read"
    assert any("enlarged" not in note and "transparency" in note for note in told["notes"])
    population = PopulationFolder.open("whole")
    assert population.names == ("alice", "bob", "carol")
    assert population.verify() == []
    assert population.base.name == "model"
    assert {skipped.source for skipped in population.skipped} == set(left_out)
    assert Path("whole/labels.csv").read_text() == "adapter,age\nalice,3\nbob,4\ncarol,\n"
    place("build", "whole", "--out", "space")
    assert load_space("space").names == population.names
    model = load("model", Runtime(device="cpu"))
    assert details_of_space("space")["model_fingerprint"] == model.fingerprint
    assert details_of_space("space")["recipe"]["steps"] == 3
    page = Path("whole/report.html").read_text()
    for word in ("How well the members learned", "Every member", "carol", "alice/notes.txt", "share removed"):
        assert word in page


def test_a_population_is_what_the_function_trains(place: Training):
    """Pictures in memory, in one call of the library, give the members that the command writes."""
    from w2w_space import Instance, Recipe, train_population

    model = load("model", Runtime(device="cpu"))
    people = [
        Instance.from_pictures(
            model,
            [Image.open(f"instances/{name}/{number}.png") for number in (1, 2)],
            name=name,
            prompt=PROMPT,
        )
        for name in ("alice", "bob", "carol")
    ]
    assert people[0].std is not None
    assert bool((people[0].std > 0).all())
    recipe = Recipe(steps=3, batch_size=2, learning_rate=1e-2, alpha=1.0)
    members = train_population(model, people, recipe, num_pairs=2, group_size=2)
    assert (torch.stack([member.vector for member in members]) - vectors("whole")).abs().max() < 1e-6


def test_an_interrupted_training_ends_as_if_it_had_not_been(place: Training, monkeypatch: pytest.MonkeyPatch):
    done, real = [], training._train

    def stopping(*args: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_train", stopping)
        place("train", "model", "instances", "--prompt", PROMPT, *SHORT, "--out", "stopped", code=130)
    kept = sorted(Path("stopped/parts").glob("train-*.safetensors"))
    assert len(kept) == 1
    times = [path.stat().st_mtime_ns for path in kept]
    # A command that was killed while it wrote the population leaves pieces of it.
    Path("stopped/shards").mkdir()
    Path("stopped/shards/00000.safetensors").write_bytes(b"half")
    Path("stopped/population.json").write_text("{}")
    place.train("--out", "stopped")
    assert torch.equal(vectors("stopped"), vectors("whole"))
    assert [path.stat().st_mtime_ns for path in kept] == times
    _, err = place("train", "model", "instances", "--prompt", "another", *SHORT, "--out", "stopped", code=2)
    assert "prompt" in err


def test_finished_members_are_kept_by_groups_of_any_size(place: Training, monkeypatch: pytest.MonkeyPatch):
    """Interrupted with one size of the groups, and continued with others, no member is trained twice."""
    trained, real = list[list[str]](), training._train

    def spied(*args: Any) -> Any:
        if trained and trained[-1] == ["stop"]:
            raise KeyboardInterrupt
        trained.append([each.name for each in args[3]])
        found = real(*args)
        if stopped:
            trained.append(["stop"])
        return found

    monkeypatch.setattr(training, "_train", spied)
    words = ("train", "model", "instances", "--prompt", PROMPT, *QUICK, "--num-images", "0", "--out", "sizes")
    stopped = True
    place(*words, "--group-size", "1", code=130)
    assert trained == [["alice"], ["stop"]]
    trained.clear()
    place(*words, "--group-size", "1", code=130)
    assert trained == [["bob"], ["stop"]]
    trained.clear()
    # The part of one group was damaged meanwhile.
    alice = min(Path("sizes/parts").glob("train-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    alice.write_bytes(b"damaged")
    stopped = False
    place(*words, "--group-size", "2")
    assert trained == [["alice", "carol"]]
    torch.testing.assert_close(vectors("sizes"), vectors("whole"), atol=1e-5, rtol=1e-4)
    assert PopulationFolder.open("sizes").names == ("alice", "bob", "carol")


def test_two_processes_train_the_population_of_one(place: Training):
    words = ["train", "model", "instances", "--prompt", PROMPT, *SHORT, "--devices", "2", "--out", "both"]
    words += ["--export", "both-files"]

    def on_rank(rank: int) -> int:
        if rank == 0:  # the one that opens the run is late; the other must not write before
            wait_until((place.folder / "both" / "parts").exists, seconds=0.5)
        return main(app, words)

    assert run_forked(on_rank) == [0, 0]
    assert torch.equal(vectors("both"), vectors("whole"))
    assert len(list(Path("both-files").glob("*.safetensors"))) == 3


def test_members_are_exported_as_files_that_draw_the_same(place: Training):
    for format in ("diffusers", "peft"):
        place.train("--out", "whole", "--export", f"files-{format}", "--format", format)
    again = ("train", "model", "instances", "--prompt", PROMPT, *SHORT, "--out", "whole", "--export", "files-peft")
    assert "--overwrite" in place(*again, "--format", "peft", code=2)[1]
    place(*again, "--format", "peft", "--overwrite")
    base, population = base_on_disk(Path("model")), PopulationFolder.open("whole")
    for place_of, name in enumerate(population.names):
        member = population.layout.adapter(population.rows([place_of])[0]).modules
        for path in (f"files-diffusers/{name}.safetensors", f"files-peft/{name}"):
            read = read_adapter(path, base).modules
            assert set(read) == set(member)
            assert max(change.relative_error(read[module]) for module, change in member.items()) < 5e-3


def test_a_dry_run_counts_and_writes_nothing(place: Training):
    (place.folder / "class").mkdir(exist_ok=True)
    picture(9).save("class/1.png")
    plan = place.train("--out", "planned", "--class-images", "class", "--class-prompt", "a toy", "--dry-run")
    assert (plan["members"], plan["pictures"], plan["groups"]) == (4, 8, 2)
    assert (plan["rows_per_forward_pass"], plan["rows_with_gradient"]) == (8, 4 * 3 * 4)
    assert not Path("planned").exists()


def test_pictures_of_the_class_are_seen_beside_the_subjects(place: Training):
    (place.folder / "class").mkdir(exist_ok=True)
    picture(9).save("class/1.png")
    place.train("--out", "kept", "--class-images", "class", "--class-prompt", "a toy", "--num-members", "2")
    changed = (vectors("kept") - vectors("whole")[:2]).abs().max()
    assert changed > 1e-3
    place.train(
        "--out",
        "nothing",
        "--class-images",
        "class",
        "--class-prompt",
        "a toy",
        "--prior-weight",
        "0",
        "--num-members",
        "2",
    )
    assert (vectors("nothing") - vectors("whole")[:2]).abs().max() < 1e-3 * changed  # sums are rounded otherwise
    for words, message in (
        (["--class-images", "class"], "need a --class-prompt"),
        (["--class-prompt", "a toy"], "give them with --class-images"),
        (["--class-images", "nowhere", "--class-prompt", "a toy"], "does not exist"),
    ):
        _, err = place("train", "model", "instances", "--prompt", PROMPT, *SHORT, *words, "--out", "x", code=2)
        assert message in err


def test_failed_members_are_recorded_and_the_others_kept(place: Training, monkeypatch: pytest.MonkeyPatch):
    real = training._train

    def failing(model: Any, layout: Any, recipe: Any, instances: list[Any], *more: Any) -> Any:
        rows = real(model, layout, recipe, instances, *more)
        for row, instance in zip(rows, instances, strict=True):
            told = row[layout.size : layout.size + 3]  # loss, loss of the base, and their noise
            if instance.name == "alice":
                told[:] = torch.tensor([0.8, 1.0, 0.05])
            if instance.name == "bob":
                row[:] = float("nan")
            if instance.name == "carol":
                told[:] = torch.tensor([0.8, 1.0, 0.15])  # better than the base by less than twice the noise
        return rows

    monkeypatch.setattr(training, "_train", failing)
    told = place.train("--out", "failing", code=1)
    assert (told["members"], told["failed"], told["no_better_than_base"]) == (2, ["bob"], ["carol"])
    population = PopulationFolder.open("failing")
    assert population.names == ("alice", "carol")
    assert any("failed twice: its loss is not finite" in skipped.reason for skipped in population.skipped)
    assert Path("failing/labels.csv").read_text() == "adapter,age\nalice,3\ncarol,\n"
    page = Path("failing/report.html").read_text()
    assert "Failed, and left out of the population: bob" in page
    assert "No better than the base model: carol" in page


def test_pictures_are_turned_cropped_and_composited(place: Training):
    """A half red, half blue picture, stored on its side with a note that it is to be turned."""
    from w2w_space.pictures import framed

    model = load("model", Runtime(device="cpu"))
    upright = Image.new("RGB", (16, 32), "red")
    upright.paste("blue", (0, 16, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save("turned.jpg", exif=exif, quality=95)
    clear = Image.new("RGBA", (20, 16), (0, 0, 0, 0))
    grey = Image.new("L", (50, 70), 128)
    pixels = framed(model, [Image.open("turned.jpg"), clear, grey]).pixels
    assert pixels.shape == (3, 3, 16, 16)
    assert pixels[0, 0, 2].float().mean() > 200 > 60 > pixels[0, 0, 13].float().mean()
    assert bool((pixels[1] == 255).all())
    assert bool((pixels[2] == 128).all())


def test_models_of_classes_take_them_from_folders(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    place = Training(tmp_path, capsys)
    tiny.pipeline("dit").save_pretrained("model")
    for name, label in (("a", 3), ("a", 5), ("b", 7)):
        folder = Path("instances", name, str(label))
        folder.mkdir(parents=True)
        picture(label).save(folder / "1.png")
    told = place.json(
        "train",
        "model",
        "instances",
        *QUICK,
        "--targets",
        "to_q",
        "--num-images",
        "1",
        "--image-steps",
        "2",
        "--out",
        "pop",
    )
    assert told["members"] == 2
    assert "What members draw" in Path("pop/report.html").read_text()
    assert "Classes 3, 5" in Path("pop/report.html").read_text()
    flat = Path("flat/a")
    flat.mkdir(parents=True)
    picture(1).save(flat / "1.png")
    assert "give one --class-label" in place("train", "model", "flat", *SHORT, "--out", "x", code=2)[1]
    assert (
        "has the classes 0 to"
        in place("train", "model", "flat", "--class-label", "5000", *SHORT, "--out", "x", code=2)[1]
    )
    assert "takes no prompts" in place("train", "model", "instances", "--prompt", "a", *SHORT, "--out", "x", code=2)[1]
    place("train", "model", "flat", "--class-label", "3", *SHORT, "--targets", "to_q", "--out", "labelled")


def test_bad_sources_are_refused_with_a_clear_line(place: Training):
    Path("loose").mkdir(exist_ok=True)
    picture(1).save("loose/1.png")
    Path("twice/caf\u00e9").mkdir(parents=True, exist_ok=True)
    Path("twice/cafe\u0301").mkdir(exist_ok=True)
    for folder in Path("twice").iterdir():
        picture(1).save(folder / "1.png")
    Path("labelled/a").mkdir(parents=True, exist_ok=True)
    picture(1).save("labelled/a/1.png")
    Path("labelled/labels.csv").write_text("name,age\na,3\n")
    Path("damaged/a").mkdir(parents=True, exist_ok=True)
    Path("damaged/a/1.png").write_bytes(b"\x89PNG nothing")
    for source, more, message in (
        ("loose", [], "no sub-folders"),
        ("twice", [], "which differ in the spelling"),
        ("labelled", [], "no column adapter"),
        ("nowhere", [], "does not exist"),
        ("damaged", [], "no subject with a usable picture"),
        ("instances", ["--targets", "to_x"], "'to_x'"),
        ("instances", ["--rank", "0"], "--rank is 0"),
        ("instances", ["--num-members", "0"], "--num-members is 0"),
        ("instances", ["--size", "17"], "--size is 17"),
        ("zoo:faces", [], "give a folder, or zoo:digits-styles"),
    ):
        _, err = place("train", "model", source, "--prompt", PROMPT, *SHORT, *more, "--out", "bad", code=2)
        assert message in err, err
    assert "takes a --prompt" in place("train", "model", "instances", *SHORT, "--out", "bad", code=2)[1]
    long = "very " * 100
    assert "too long" in place("train", "model", "instances", "--prompt", long, *SHORT, "--out", "bad", code=2)[1]


def test_styles_of_the_zoo_are_trained_with_their_labels(place: Training):
    words = ("train", "zoo:digits-styles", "zoo:digits-styles", "--num-members", "3", *SHORT, "--out", "styles")
    assert place.json(*words)["members"] == 3
    rows = Path("styles/labels.csv").read_text().splitlines()
    assert rows[0] == "adapter,ink,background,slant,thickness,shift"
    assert [row.split(",")[0] for row in rows[1:]] == ["style-000", "style-001", "style-002"]
