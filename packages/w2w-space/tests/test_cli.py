"""Every command in-process: from LoRA files to a space, its points, and files of other tools; bad input is told."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffcore.adapters import Adapter, LowRank, read_adapter, write_adapter
from diffcore.cli import main
from diffcore.models import load
from diffcore.models.bases import base_on_disk
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from w2w_space.app.bench import cases, sd15_layout
from w2w_space.app.cli import app
from w2w_space.diagnose import cross_fitted
from w2w_space.files.directions import load_directions
from w2w_space.files.points import load_point
from w2w_space.files.space import base_of_space, load_space, save_space
from w2w_space.space import Point, WeightSpace
from w2w_space.styles import load_styles

from .conftest import Place

TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")
MEMBERS = 6


def drawn(shapes: dict[str, tuple[int, ...]], seed: int, rank: int = 1) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    factors = {
        name: LowRank(torch.randn(rank, i, generator=g) * 0.3, torch.randn(o, rank, generator=g) * 0.3, float(rank))
        for name, (o, i) in shapes.items()
    }
    return Adapter(factors, name=f"a{seed}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w2w")
    pipe = tiny.pipeline("sd15")
    pipe.save_pretrained(folder / "model")
    shapes = {n: tuple(m.weight.shape) for n, m in pipe.unet.named_modules() if n.endswith(TARGETS)}
    (folder / "loras").mkdir()
    for seed in range(MEMBERS):
        layout = ("diffusers", "kohya", "peft")[seed % 3]
        name = f"m{seed}" if layout == "peft" else f"m{seed}.safetensors"
        write_adapter(drawn(shapes, seed), folder / "loras" / name, format=layout)
    (folder / "loras" / "noise.safetensors").write_bytes(b"noise")
    write_adapter(drawn(shapes, 100, rank=3), folder / "new.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(app, ["import", "loras", "--model", "model", "--out", "pop"]) == 0
        assert main(app, ["build", "pop", "--out", "space", "--precision", "float32"]) == 0
    return folder


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.chdir(made)
    return Place(made, capsys)


def test_an_import_names_what_it_leaves_out(place: Place):
    told = place.json("import", "loras", "--model", "model", "--out", "pop")
    assert (told["members"], told["left_out"], told["rank"], told["modules"]) == (MEMBERS, 1, 1, 16)
    assert "noise.safetensors" in told["skipped"][0]["file"]
    _, err = place("import", "loras", "--model", "model", "--out", "strict", "--strict", code=2)
    assert "noise.safetensors is not a safetensors file" in err
    plan = place.json("import", "loras", "--model", "model", "--out", "planned", "--dry-run")
    assert (plan["fitting"], plan["left_out"], plan["numbers"]) == (MEMBERS, 1, told["numbers"])
    assert not Path("planned").exists()
    _, err = place("import", "loras/m0.safetensors", "--out", "other", code=2)
    assert "name its base model with --model" in err


def test_members_are_replaced_and_removed(place: Place):
    adapter = read_adapter("loras/m0.safetensors", base_on_disk(Path("model")))
    Path("few").mkdir()
    for number in range(4):
        write_adapter(scaled(adapter) if number == 1 else drawn_like(adapter, number), f"few/{number}.safetensors")
    place("import", "few", "--model", "model", "--out", "small")
    write_adapter(drawn_like(adapter, 50), "few/2.safetensors", overwrite=True)
    told = place.json("import", "few", "--model", "model", "--out", "small")
    assert (told["members"], told["replaced"]) == (4, ["2"])
    assert place.json("import", "few", "--model", "model", "--out", "small")["replaced"] == []
    told = place.json("remove", "small", "1", "3")
    assert (told["removed"], told["members"]) == (["1", "3"], 2)
    assert place.json("info", "small")["problems"] == []
    assert "no member '1'" in place("remove", "small", "1", code=2)[1]


def drawn_like(adapter: Adapter, seed: int) -> Adapter:
    return drawn({name: change.shape for name, change in adapter.modules.items()}, seed)


def test_a_space_of_a_population_or_of_its_files_is_the_same(place: Place):
    place("build", "loras", "--model", "model", "--out", "direct", "--precision", "float32")
    one, other = load_space(Path("space")), load_space(Path("direct"))
    assert one.names == other.names
    assert torch.equal(one.components, other.components)
    page = Path("space/report.html").read_text()
    assert "How the factors were aligned" in page
    assert "5 components" in page
    assert Path("space/tables/spectrum.csv").read_text().count("\n") == MEMBERS
    assert "noise.safetensors" in Path("direct/report.html").read_text()
    told = place.json("build", "pop", "--out", "space", "--precision", "float32")
    assert told["members"] == MEMBERS
    _, err = place("build", "pop", "--out", "space", "--scaling", "none", code=2)
    assert "scaling" in err
    place("report", "space")


def test_a_space_without_members_leaves_nothing_of_them(place: Place):
    place("build", "loras", "--model", "model", "--out", "private", "--no-members", "--num-components", "3")
    files = [path for path in Path("private").rglob("*") if path.is_file()]
    assert not any(b"m1" in path.read_bytes() and path.suffix == ".csv" for path in files)
    assert not Path("private/population").exists()
    assert load_space(Path("private")).names == ()
    assert load_space(Path("private")).num_components == 3
    assert "written without" in place("export", "private", "m1", "x.safetensors", code=2)[1]


def test_a_space_of_products_is_used_by_the_same_commands(place: Place):
    told = place.json("build", "pop", "--geometry", "product", "--out", "products")
    assert (told["gauge"], told["components"]) == ("product", MEMBERS - 1)
    assert "5 components" in Path("products/report.html").read_text()
    told = place.json("project", "products", "loras/m1.safetensors")
    assert told["residual"] < 1e-3
    assert told["nearest_members"][0].startswith("m1 (0.0")
    told = place.json("export", "products", "m1", "m1-again.safetensors", "--dtype", "float32")
    base = base_on_disk(Path("model"))
    one, other = (read_adapter(path, base) for path in ("loras/m1.safetensors", told["written"]))
    for name, change in one.modules.items():
        torch.testing.assert_close(other.modules[name].delta(), change.delta(), atol=1e-4, rtol=1e-3)
    assert place.json("info", "products")["gauge"] == "product"
    for words, message in (
        (("--gauge", "raw"), "--geometry product knows no gauge"),
        (("--no-members",), "consists of its members"),
    ):
        assert message in place("build", "pop", "--geometry", "product", "--out", "x", *words, code=2)[1]


def test_a_member_projects_to_itself(place: Place):
    told = place.json("project", "space", "loras/m1.safetensors", "--out", "m1-point.safetensors")
    assert told["residual"] < 1e-3
    assert told["nearest_members"][0].startswith("m1 (0.0")
    space = load_space(Path("space"))
    assert torch.allclose(torch.tensor(told["coordinates"]), space.member("m1").z, atol=1e-3)
    assert torch.equal(load_point("m1-point.safetensors", space).z, torch.tensor(told["coordinates"]))
    lost = place.json("project", "space", "new.safetensors")
    assert lost["residual"] > 0.5
    assert lost["worst_residual"] > 0.5
    assert place.json("info", "m1-point.safetensors")["kind"] == "point"


@pytest.mark.parametrize(
    ("subject", "name", "format"),
    [
        ("m2", "a.safetensors", "diffusers"),
        ("m1-point.safetensors", "b.safetensors", "kohya"),
        ("loras/m3.safetensors", "c", "peft"),
        ("mean", "d.safetensors", "diffusers"),
    ],
)
def test_a_point_is_exported_in_any_layout(place: Place, subject: str, name: str, format: str):
    if subject.startswith("m1"):
        place("project", "space", "loras/m1.safetensors", "--out", subject)
    told = place.json("export", "space", subject, name, "--format", format)
    assert told["precision"] == "float16"
    assert told["largest_rounding_error"] < 2e-3
    assert Path(told["card"]).exists()
    read = read_adapter(name, base_on_disk(Path("model")))
    if subject != "mean":
        member = Path("loras") / {"m2": "m2", "b.safetensors": "m1.safetensors", "c": "m3.safetensors"}.get(
            subject if subject == "m2" else name, ""
        )
        for module, change in read_adapter(member, base_on_disk(Path("model"))).modules.items():
            assert change.relative_error(read.modules[module]) < 5e-3
    _, err = place("export", "space", subject, name, "--format", format, code=2)
    assert "there already" in err
    assert "--overwrite" in err


def test_a_point_is_merged_into_its_model(place: Place):
    place("export", "space", "m0", "merged", "--merge", "model", "--weight", "0.5")
    merged = load("merged", Runtime(device="cpu")).backbone.state_dict()
    plain = load("model", Runtime(device="cpu")).backbone.state_dict()
    change = read_adapter("loras/m0.safetensors", base_on_disk(Path("model"))).modules
    name = next(iter(change))
    difference = merged[f"{name}.weight"] - plain[f"{name}.weight"]
    assert torch.allclose(difference, 0.5 * change[name].delta(), atol=1e-4)
    assert not torch.allclose(difference, torch.zeros(()), atol=1e-4)


def test_diffusers_shows_what_was_exported(place: Place, monkeypatch: pytest.MonkeyPatch):
    told = place.json("export", "space", "m0", "shown.safetensors", "--verify", "model")
    assert told["effect"] > 1e-4
    assert told["error_in_diffusers"] < 5e-3
    again = place.json("export", "space", "m0", "shown.safetensors", "--verify", "model", "--overwrite")
    assert again["error_in_diffusers"] == told["error_in_diffusers"]
    _, err = place("export", "space", "m0", "p", "--format", "peft", "--verify", "model", code=2)
    assert "--verify loads files in the layout of diffusers" in err
    # The authors' strength, stated in the header, is read by diffusers.
    kept = place.json("export", "space", "m0", "kept.safetensors", "--verify", "model", "--keep-scale", "27")
    assert kept["error_in_diffusers"] < 5e-3
    assert place.json("info", "kept.safetensors", "--model", "model")["alphas"] == {"27": 16}
    for wrong in ("0", "-3", "inf"):
        assert "--keep-scale is" in place("export", "space", "m0", "x.safetensors", "--keep-scale", wrong, code=2)[1]
    # A file of another strength than the point's is noticed.
    real = Point.adapter
    monkeypatch.setattr(Point, "adapter", lambda self, name="point": scaled(real(self, name)))
    told = place.json("export", "space", "m0", "weak.safetensors", "--verify", "model", code=1)
    assert told["error_in_diffusers"] > 0.5


def scaled(adapter: Adapter) -> Adapter:
    return Adapter({n: LowRank(c.down, c.up * 3, c.alpha) for n, c in adapter.modules.items()}, name=adapter.name)


def test_convert_tells_what_a_smaller_rank_loses(place: Place):
    told = place.json("convert", "new.safetensors", "two.safetensors", "--rank", "2", "--model", "model")
    base = base_on_disk(Path("model"))
    before, after = read_adapter("new.safetensors", base).modules, read_adapter("two.safetensors", base).modules
    lost = sum(float((c.delta() - after[n].delta()).square().sum()) for n, c in before.items())
    total = sum(float(c.delta().square().sum()) for c in before.values())
    assert told["loss"] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    worst = told["worst_module"]
    assert before[worst].relative_error(after[worst]) == pytest.approx(told["losses"][worst], rel=1e-3)
    assert {change.rank for change in after.values()} == {2}
    whole = place.json("convert", "new.safetensors", "folder", "--format", "peft", "--model", "model")
    assert whole["largest_rounding_error"] < 1e-12
    assert "loss" not in whole
    _, err = place("convert", "new.safetensors", "x.safetensors", "--rank", "0", "--model", "model", code=2)
    assert "--rank is 0" in err


def test_info_knows_what_it_looks_at(place: Place):
    space = place.json("info", "space")
    assert (space["kind"], space["components"], space["members"], space["base"]) == ("space", 5, MEMBERS, "model")
    assert place.json("info", "space/space.safetensors") == space
    population = place.json("info", "pop")
    assert (population["kind"], population["problems"]) == ("population", [])
    adapter = place.json("info", "new.safetensors", "--model", "model")
    assert (adapter["kind"], adapter["layout"], adapter["ranks"]) == ("adapter", "diffusers", {"3": 16})
    assert place("info", "loras/m1.safetensors")[0].count("kohya") == 1
    assert "does not exist" in place("info", "nothing.safetensors", code=2)[1]
    tagged = load_file("loras/m1.safetensors")
    tags = json.dumps({"10_sks": {"sks person": 10, "hat": 3}, "reg": {"hat": 9}})
    save_file(tagged, "tagged.safetensors", metadata={"ss_tag_frequency": tags})
    assert place.json("info", "tagged.safetensors")["trigger_words"] == ["hat", "sks person"]


def test_a_population_tells_on_what_its_members_were_trained(place: Place):
    tensors = load_file("loras/m1.safetensors")
    for name, version in (("x", "sd_v1"), ("y", "sd_v2")):
        changed = {key: value * (2.0 if name == "y" else 1.0) for key, value in tensors.items() if "alpha" not in key}
        save_file(changed, f"{name}.safetensors", metadata={"ss_base_model_version": version})
    told = place.json(
        "import", "x.safetensors", "y.safetensors", "loras/m0.safetensors", "--model", "model", "--out", "3"
    )
    assert told["trained_on"] == {"sd_v1": 1, "sd_v2": 1, "not stated": 1}
    assert told["without_stated_alpha"] == 2


def test_a_damaged_population_is_told(place: Place):
    place("import", "loras", "--model", "model", "--out", "damaged")
    shard = next(Path("damaged/shards").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    told = place.json("info", "damaged", code=1)
    assert "does not match the sum" in told["problems"][0]


def test_the_authors_files_become_a_space(place: Place):
    folder = Path("authors")
    folder.mkdir(exist_ok=True)
    x = torch.randn(6, 7)
    z = (x - x.mean(0)) / x.std(0)
    v = torch.linalg.svd(z, full_matrices=False).Vh.T[:, :4].contiguous()
    stem = "base_model.model.mid.attn1.to_q.lora_"
    table = {f"{stem}A.identity1.weight": [(4,), (1, 4)], f"{stem}B.identity1.weight": [(3,), (3, 1)]}
    tensors = {"mean": x.mean(0), "std": x.std(0), "V": v, "proj_1000pc": z @ v, "weight_dimensions": table}
    for name, value in tensors.items():
        torch.save(value, folder / f"{name}.pt")
    assert "--allow-pickle" in place("import", "authors", "--authors", "--out", "published", code=2)[1]
    words = ("import", "authors", "--authors", "--allow-pickle", "--out", "published")
    assert place.json(*words, "--dry-run")["writes"] == "published/space.safetensors"
    assert place.json(*words)["components"] == 4
    assert place.json("info", "published")["solver"] == "published"


def test_the_demo_holds_what_the_readme_says(place: Place):
    """The gates that were set beforehand, on adapters that come with the package."""
    told = place.json("demo", "--out", "demo")
    assert told["held"]
    assert min(told["r2"]["shared A, canonical"]) >= 0.7
    assert max(told["r2"]["own A, raw"]) <= 0.1
    assert min(told["r2"]["own A, canonical"]) >= 0.5
    effects = {name: row["effect"] for name, row in told["effects"].items()}
    assert effects["ink"] >= 1.3
    assert effects["background"] >= 1.3
    assert effects["thickness"] >= 0.6
    assert told["inversion"]["rmse"] <= 0.4
    page = Path("demo/report.html").read_text()
    for word in ("Sliders", "One picture becomes an adapter", "New adapters", "What the gauge is for"):
        assert word in page
    assert place.json("demo", "--out", "demo") == told


def test_from_labels_to_a_direction_an_edit_and_samples(place: Place, tmp_path: Path):
    """On adapters of digit styles, whose labels are exact."""
    population, styles = load_styles()
    space, _ = cross_fitted(WeightSpace.build(population), num_components=20)
    save_space(space, "styles.safetensors", dtype="float32")
    rows = [
        f"{name},{ink:.3f},{back:.3f}" for name, (ink, back) in zip(space.names, styles[:, :2].tolist(), strict=True)
    ]
    rows[0] = f"{space.names[0]},,0.5"
    Path("labels.csv").write_text("\n".join(["adapter,ink,background", *rows]))
    found = place.json("directions", "styles.safetensors", "labels.csv", "--out", "directions")
    assert min(found["merit"].values()) > 0.8
    assert "What else moves" in Path("directions/report.html").read_text()
    words = ["edit", "styles.safetensors", "style-003", "ink=+1.5", "--directions", "directions"]
    told = place.json(*words, "--keep", "background", "--out", "edited.safetensors", "--max-std", "9")
    before, after = (float(part.split(" sd")[0]) for part in told["places"]["ink"].split(" -> "))
    assert after - before == pytest.approx(1.5, abs=0.02)
    loaded, base = load_space("styles.safetensors"), base_of_space("styles.safetensors")
    axis = load_directions("directions", loaded)["ink"]

    def place_of(file: str) -> float:
        return float(axis.place(loaded.project(read_adapter(file, base)).z))

    # A moved vector is not quite balanced, so that its own coordinates come out a little different.
    assert place_of("edited.safetensors") == pytest.approx(after, abs=0.15)
    place(*words, "--out", "far.safetensors", "--max-std", "0.1", code=1)
    drawn = place.json(
        "sample", "styles.safetensors", "new", "--num", "3", "--condition", "ink=2", "--directions", "directions"
    )
    assert len(list(Path("new").glob("*.safetensors"))) == 3
    points = [
        loaded.project(read_adapter(f"new/{row['adapter']}", base_of_space("styles.safetensors")))
        for row in drawn["samples"]
    ]
    assert [float(axis.place(point.z)) for point in points] == pytest.approx([2.0] * 3, abs=0.2)
    place("sample", "styles.safetensors", "none", "--num", "2", "--truncation", "0.0")
    for bad, message in (
        (
            ["edit", "styles.safetensors", "style-003", "ink", "--directions", "directions", "--out", "x.safetensors"],
            "age=+1.5",
        ),
        (
            ["edit", "styles.safetensors", "nobody", "ink=1", "--directions", "directions", "--out", "x.safetensors"],
            "neither a file",
        ),
        (
            ["edit", "styles.safetensors", "mean", "Ink=1", "--directions", "directions", "--out", "x.safetensors"],
            "there are ink",
        ),
        (["sample", "styles.safetensors", "bad", "--condition", "ink=1"], "needs --directions"),
        (["directions", "styles.safetensors", "loras/m0.safetensors"], "no column adapter"),
    ):
        assert message in place(*bad, code=2)[1]
    Path("long.csv").write_text("adapter,attribute,value\nstyle-001,age,old\n")
    assert "line 2: 'old' is no number" in place("directions", "styles.safetensors", "long.csv", code=2)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "space", "--out", "odd"], "space holds no adapter"),
        (["import", "labels.txt", "--model", "model", "--out", "odd"], "error: labels.txt is not a safetensors file"),
        (["build", "loras/m0.safetensors", "--model", "model", "--out", "odd"], "there is 1 adapter; a space needs"),
        (["remove", "pop", "nobody"], "no member 'nobody'; its 6 members are m0, m1, m2 and others"),
        (["sample", "space", "odd", "--num", "0"], "--num is 0"),
        (["sample", "space", "taken"], "taken/sample-002.safetensors is there already"),
        (
            ["edit", "space", "m2", "a=1", "--directions", "x", "--out", "odd.safetensors"],
            "run folder in which they were",
        ),
        (["export", "space", "m22", "odd.safetensors"], "neither a file nor one of the 6 members; nearest: 'm2'"),
        (["compose", "nothing", "m2", "--out", "odd.safetensors"], "nothing is neither a space nor a base model"),
        (["directions", "private", "labels.txt", "--out", "odd"], "written without its members, whom labels are about"),
        (["invert", "space", "zoo:portraits-sd", "a.png", "--prompt", "x", "--out", "odd"], "take the base model"),
    ],
)
def test_a_stranger_is_told_what_to_do(place: Place, words: list[str], message: str):
    Path("labels.txt").write_text("words")
    Image.new("RGB", (16, 16)).save("a.png")
    Path("taken").mkdir(exist_ok=True)
    Path("taken/sample-002.safetensors").write_bytes(b"mine")
    if "private" in words:
        place("build", "loras", "--model", "model", "--out", "private", "--no-members", "--num-components", "3")
    assert message in place(*words, code=2)[1]
    assert not Path("odd").exists()
    assert not Path("odd.safetensors").exists()
    assert [path.name for path in Path("taken").iterdir()] == ["sample-002.safetensors"]


def test_samples_of_a_space_without_members_are_told_by_their_distance_from_the_mean(place: Place):
    place("build", "loras", "--model", "model", "--out", "private", "--no-members", "--num-components", "3")
    out, _ = place("sample", "private", "drawn", "--num", "1")
    assert "nan" not in out
    assert "sd from the mean" in out
    assert "not told" in out
    told = place.json("sample", "private", "drawn", "--num", "1", "--overwrite")
    assert told["near_copies"] is None
    assert [told["samples"][0][name] for name in ("nearest", "near_copy", "distance")] == [None, None, None]


def test_the_benchmark_compares_equals():
    """The cases at full size are for `bench`; here both sides must agree on small ones."""
    found = cases(smoke=True)
    assert found[0].goal == 6.0
    for case in found:
        ours, reference = case.ours(), case.reference()
        assert case.agree(ours, reference), case.name
    assert sd15_layout().size == 99_648
    assert len(sd15_layout().modules) == 64


def test_an_adapter_of_a_family_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shapes = {f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}": (1280, 1280) for x in "qv"}
    shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"] = (1280, 768)
    for seed in range(3):
        write_adapter(drawn(shapes, seed), tmp_path / f"{seed}.safetensors")
    here = Place(tmp_path, capsys)
    assert here.json("import", tmp_path, "--out", tmp_path / "pop")["base"] == "sd15"
    here("build", tmp_path / "pop", "--out", tmp_path / "run")
    more = shapes | {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1280, 768)}
    write_adapter(drawn(more, 9), tmp_path / "more.safetensors")
    assert here.json("project", tmp_path / "run", tmp_path / "more.safetensors")["modules_outside"] == 1
