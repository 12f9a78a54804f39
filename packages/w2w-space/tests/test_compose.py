"""Sums of adapters, and directions as adapters, against matrices that are formed and pipelines of plain diffusers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffcore.adapters import Adapter, LowRank, read_adapter, write_adapter
from diffcore.cli import main
from diffcore.errors import IncompatibleModelError, UserError
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from w2w_space.app.cli import app
from w2w_space.compose import combined, compose, share_inside
from w2w_space.directions import find_directions
from w2w_space.edit import edit
from w2w_space.files.base import base_of_layout
from w2w_space.files.directions import save_directions
from w2w_space.files.sliders import slider_of
from w2w_space.files.space import save_space
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.slider import slider, useful_places
from w2w_space.space import WeightSpace

LAYOUT = Layout.of({"blocks.0.to_q": (30, 40), "blocks.1.to_q": (20, 25)}, rank=1)


def drawn(seed: int, rank: int, alpha: float, shapes: dict[str, tuple[int, ...]] | None = None) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    shapes = shapes or dict(zip(LAYOUT.modules, LAYOUT.shapes, strict=True))
    changes = {
        name: LowRank(torch.randn(rank, *shape[1:], generator=g), torch.randn(shape[0], rank, generator=g), alpha)
        for name, shape in shapes.items()
    }
    return Adapter(changes, name=f"a{seed}")


def planted(rank: int = 1, members: int = 60, layout: Layout = LAYOUT) -> tuple[WeightSpace, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    layout = Layout(layout.modules, layout.shapes, rank)
    places = torch.randn(members, 3, generator=g)
    matrix = torch.randn(layout.size, generator=g) + 0.4 * places @ torch.randn(3, layout.size, generator=g)
    matrix += 0.02 * torch.randn(members, layout.size, generator=g)
    population = Population(layout, tuple(f"m{i}" for i in range(members)), Stacked(0.1 * matrix))
    return WeightSpace.build(population, num_components=3), places


def test_a_sum_is_the_sum_of_the_changes():
    one, two, three = drawn(0, 1, 27.0), drawn(1, 4, 2.0), drawn(2, 3, 3.0)
    text = Adapter(three.modules, {"text_encoder": {"q": one.modules["blocks.1.to_q"]}}, name="text")
    part = Adapter({"blocks.0.to_q": two.modules["blocks.0.to_q"]}, name="part")
    done = compose([one, part, text], [0.7, -1.5, 2.0]).adapter
    wanted = {
        "blocks.0.to_q": 0.7 * one.modules["blocks.0.to_q"].delta()
        - 1.5 * two.modules["blocks.0.to_q"].delta()
        + 2 * three.modules["blocks.0.to_q"].delta(),
        "blocks.1.to_q": 0.7 * one.modules["blocks.1.to_q"].delta() + 2 * three.modules["blocks.1.to_q"].delta(),
    }
    assert set(done.modules) == set(wanted)
    for module, matrix in wanted.items():
        assert torch.allclose(done.modules[module].delta(), matrix, rtol=1e-5, atol=1e-4)
    assert {name: change.rank for name, change in done.modules.items()} == {"blocks.0.to_q": 8, "blocks.1.to_q": 4}
    delta = done.text_encoders["text_encoder"]["q"].delta()
    assert torch.allclose(delta, 2 * one.modules["blocks.1.to_q"].delta(), rtol=1e-5)


def test_a_smaller_rank_tells_what_it_loses():
    one, two = drawn(0, 2, 2.0), drawn(1, 3, 3.0)
    whole, cut = compose([one, two], [1.0, 1.0]), compose([one, two], [1.0, 1.0], rank=2)
    assert not whole.losses
    for module, loss in cut.losses.items():
        matrix = whole.adapter.modules[module].delta()
        error = float((cut.adapter.modules[module].delta() - matrix).norm() / matrix.norm())
        values = torch.linalg.svdvals(matrix)
        assert error == pytest.approx(loss.relative, rel=1e-4)
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("adapters", "weights", "error", "message"),
    [
        ([], [], UserError, "give as many"),
        ([drawn(0, 1, 1.0)], [float("nan")], UserError, "give finite ones"),
        ([drawn(0, 1, 1.0)], [0.0], UserError, "not all zero"),
        (
            [drawn(0, 1, 1.0), drawn(1, 1, 1.0, {"blocks.0.to_q": (30, 41)})],
            [1.0, 1.0],
            IncompatibleModelError,
            "'blocks.0.to_q' of shape",
        ),
        (
            [drawn(0, 1, 1.0), Adapter(drawn(0, 1, 1.0).modules, backbone="transformer", name="t")],
            [1.0, 1.0],
            IncompatibleModelError,
            "t changes a transformer",
        ),
    ],
)
def test_sums_that_mean_nothing_are_refused(adapters: list, weights: list, error: type, message: str):
    with pytest.raises(error, match=message):
        compose(adapters, weights)


def test_a_weight_of_zero_leaves_an_adapter_out():
    other = drawn(1, 1, 1.0, {"blocks.7.to_q": (3, 3)})
    assert set(compose([drawn(0, 1, 1.0), other], [1.0, 0.0]).adapter.modules) == set(LAYOUT.modules)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_share_inside_is_that_of_the_formed_products(rank: int):
    """Against least squares on flattened matrices, for an adapter of another rank that changes more modules."""
    space, _ = planted(rank)
    more = {**dict(zip(LAYOUT.modules, LAYOUT.shapes, strict=True)), "blocks.9.to_q": (5, 6)}
    foreign, point = drawn(5, 3, 6.0, more), space.member("m4").adapter()
    mixed = compose([foreign, point], [0.05, 1.0]).adapter
    steps = torch.eye(3)
    rows = [*space.vectors(torch.cat([torch.zeros(1, 3), steps, -steps, space.members]))]

    def flat(adapter: Adapter) -> torch.Tensor:
        return torch.cat([adapter.modules[name].delta(torch.float64).flatten() for name in space.layout.modules])

    basis = torch.stack([flat(space.layout.adapter(row)) for row in rows], 1)
    for adapter in (foreign, mixed, point):
        found = share_inside(space, adapter)
        left, values, _ = torch.linalg.svd(basis, full_matrices=False)
        left = left[:, values > 1e-5 * values[0]]
        total = sum(float(change.delta(torch.float64).square().sum()) for change in adapter.modules.values())
        assert found == pytest.approx(float((left.T @ flat(adapter)).square().sum()) / total, rel=2e-3)
    assert share_inside(space, point) == pytest.approx(1.0, abs=1e-6)
    assert share_inside(space, foreign) < 0.1
    # A change of the space is recognised where the space has forgotten its members.
    assert share_inside(space.without_members(), space.point(torch.tensor([0.5, 0.0, 0.0])).adapter()) > 0.99


def test_points_are_added_as_deviations_from_the_mean():
    space, _ = planted()
    one, two = space.member("m1"), space.member("m2")
    assert torch.allclose(combined([one, two], [0.5, -2.0]).z, 0.5 * one.z - 2 * two.z)
    with pytest.raises(UserError, match="different spaces"):
        combined([one, planted(members=40)[0].point()], [1.0, 1.0])


@pytest.mark.parametrize("at", [0.0, 1.0, -2.0])
def test_a_slider_is_the_edit_at_its_strength_and_differs_by_the_quadratic_part(at: float):
    space, places = planted()
    found = find_directions(space, Labels.of(space.names, {"tall": places[:, 0].tolist()}), estimator="mean")
    subject = space.member("m5")
    made = slider(subject, "tall", found, at=at)

    def moved(strength: float, module: str) -> torch.Tensor:
        change = edit(subject, {"tall": strength}, found).point.adapter().modules[module].delta(torch.float64)
        return change - subject.adapter().modules[module].delta(torch.float64)

    for module in LAYOUT.modules:
        slope = made.adapter.modules[module].delta(torch.float64)
        assert made.adapter.modules[module].rank == 2
        curve = (moved(1.0, module) + moved(-1.0, module)) / 2  # dB dA
        assert float(curve.norm()) > 0.01 * float(slope.norm())
        for strength in (-2.0, 1.0, 1.5):
            error = moved(strength, module) - strength * slope
            assert torch.allclose(error, strength * (strength - at) * curve, atol=1e-5 * float(slope.norm()))


def test_a_slider_of_small_rank_tells_its_loss_and_kept_attributes_stay():
    space, places = planted()
    values = {"tall": places[:, 0].tolist(), "wide": (places[:, 0] + places[:, 1]).tolist()}
    found = find_directions(space, Labels.of(space.names, values), estimator="mean")
    whole, cut = slider(space.point(), "tall", found), slider(space.point(), "tall", found, rank=1)
    for module, loss in cut.losses.items():
        error = whole.adapter.modules[module].relative_error(cut.adapter.modules[module])
        assert 0.01 < loss.relative == pytest.approx(error, rel=1e-3)
    kept = slider(space.point(), "tall", found, keep=["wide"], at=0.0).adapter
    by_edit = edit(space.point(), {"tall": 1e-2}, found, keep=["wide"]).point.adapter()
    module = LAYOUT.modules[0]
    difference = by_edit.modules[module].delta() - space.point().adapter().modules[module].delta()
    assert torch.allclose(kept.modules[module].delta(), 100 * difference, atol=2e-3 * float(difference.norm()) * 100)


def test_the_useful_range_is_that_of_held_out_members_beside_the_subject():
    space, places = planted()
    found = find_directions(space, Labels.of(space.names, {"tall": places[:, 0].tolist()}), estimator="mean")
    low, high = useful_places(found["tall"], space)
    members = found["tall"].place(space.members)
    assert float(((members >= low) & (members <= high)).double().mean()) == pytest.approx(0.98, abs=0.03)
    subject = space.member("m5")
    made = slider(subject, "tall", found)
    assert made.useful == pytest.approx([end - float(found["tall"].place(subject.z)) for end in (low, high)])
    assert useful_places(found["tall"], space.without_members()) == (-2.0, 2.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A space of a tiny pipeline with directions, and adapters of its model."""
    folder = tmp_path_factory.mktemp("compose")
    pipe = tiny.pipeline("sd15")
    pipe.save_pretrained(folder / "model")
    shapes = {n: tuple(m.weight.shape) for n, m in pipe.unet.named_modules() if n.endswith(("to_q", "to_v"))}
    space, places = planted(layout=Layout.of(shapes, rank=1))
    save_space(space, folder / "space.safetensors", base=from_pipeline(pipe).adapter_base, dtype="float32")
    found = find_directions(space, Labels.of(space.names, {"tall": places[:, 0].tolist()}), estimator="mean")
    save_directions(found, folder / "directions.safetensors")
    style = drawn(3, 2, 4.0, {name: shape for name, shape in shapes.items() if "attn2" in name})
    write_adapter(style, folder / "style.safetensors")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> tuple[dict, str]:
    capsys.readouterr()
    assert main(app, [*map(str, words), "--json"]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else {}, err


def output(pipe: object) -> torch.Tensor:
    x, t, cond = tiny.inputs("sd15")
    with torch.no_grad():
        return pipe.unet(x, t, **cond).sample  # type: ignore[attr-defined]


def test_compose_tells_shares_and_writes_the_sum(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(made)
    told, err = run(capsys, "compose", "space.safetensors", "m1", "style.safetensors:0.7", "--out", "sum.safetensors")
    assert "style.safetensors: 0." in err
    assert told["warnings"] == []
    assert told["rank"] == 3
    assert "loss" not in told
    pipe = tiny.pipeline("sd15")
    base = from_pipeline(pipe).adapter_base
    from w2w_space.files.space import load_space

    point = load_space("space.safetensors").member("m1")
    wanted = compose([point.adapter(), read_adapter("style.safetensors", base)], [1.0, 0.7]).adapter
    theirs = output(pipe)
    pipe.load_lora_weights(".", weight_name="sum.safetensors")
    shown, ours = output(pipe), from_pipeline(tiny.pipeline("sd15")).with_adapter(wanted).pipeline
    assert float((shown - theirs).abs().max()) > 1e-3
    assert torch.allclose(shown, output(ours), atol=1e-5 * float(theirs.abs().max()))
    # The file of a subject is recognised, and two points are no merge.
    run(capsys, "export", "space.safetensors", "m1", "m1.safetensors", "--no-card")
    told, _ = run(capsys, "compose", "space.safetensors", "m2", "m1.safetensors", "--out", "two.safetensors")
    assert "third subject" in told["warnings"][0]
    assert told["shares_inside"]["m1.safetensors"] > 0.99
    told, _ = run(capsys, "compose", "space.safetensors", "m1:0.5", "m2:0.5", "--out", "between.safetensors")
    assert "not a merge" in told["warnings"][0]
    assert told["rank"] == 1
    cut, _ = run(capsys, "compose", "model", "style.safetensors", "m1.safetensors:-2", "--out", "c", "--format", "peft",
                 "--rank", "1")  # fmt: skip
    assert 0 < cut["loss"] < cut["worst_loss"] < 1
    assert set(cut["losses"]) == set(wanted.modules)
    for words, message in (
        (["m1:nan"], "give a finite number"),
        (["nobody"], "neither a file nor one of"),
        (["m1", "--rank", "0"], "--rank is 0"),
    ):
        assert message in run(capsys, "compose", "space.safetensors", *words, "--out", "x.safetensors", code=2)[1]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_plain_diffusers_shows_the_edit_through_the_slider(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], format: str
):
    monkeypatch.chdir(made)
    words = ["space.safetensors", "tall", f"tall-{format}.safetensors", "--directions", "directions.safetensors"]
    told, _ = run(capsys, "slider", *words, "--subject", "m5", "--at", "1.5", "--format", format)
    assert told["largest_rounding_error"] < 1e-6
    with safe_open(words[2], framework="pt") as file:
        kept = json.loads(file.metadata()["w2w_space_slider"])
    assert kept["useful_range"] == told["useful_range"]
    shown = run(capsys, "info", words[2], "--model", "model")[0]["slider"]
    assert (shown["attribute"], shown["exact_at"], shown["subject"]) == ("tall", 1.5, "m5")
    run(capsys, "export", "space.safetensors", "m5", f"m5-{format}.safetensors", "--dtype", "float32", "--no-card")
    pipe = tiny.pipeline("sd15")
    pipe.load_lora_weights(".", weight_name=f"m5-{format}.safetensors", adapter_name="subject")
    own = output(pipe)
    pipe.load_lora_weights(".", weight_name=words[2], adapter_name="tall")

    def slid(strength: float) -> torch.Tensor:
        pipe.set_adapters(["subject", "tall"], [1.0, strength])
        return output(pipe)

    def edited(strength: float) -> torch.Tensor:
        name = f"edited-{format}{strength:g}.safetensors"
        run(capsys, "edit", "space.safetensors", "m5", f"tall={strength}", "--directions", "directions.safetensors",
            "--out", name, "--overwrite")  # fmt: skip
        other = tiny.pipeline("sd15")
        other.load_lora_weights(".", weight_name=name)
        return output(other)

    change = float((edited(1.5) - own).abs().max())
    assert change > 1e-3
    assert float((slid(1.5) - edited(1.5)).abs().max()) < 2e-3 * change  # half precision of the edited file
    assert float((slid(0.0) - own).abs().max()) < 1e-5
    assert 0.02 * change < float((slid(-1.5) - edited(-1.5)).abs().max()) < 2 * change  # the quadratic part
    assert (
        "there is no direction 'old'" in run(capsys, "slider", words[0], "old", "x.safetensors", *words[3:], code=2)[1]
    )


def test_a_header_that_is_no_sliders_is_passed_over(tmp_path: Path):
    space, _ = planted()
    base = base_of_layout(space.layout)
    for number, text in enumerate(("no json", "[1]", '{"attribute": "x", "other": 1}')):
        path = tmp_path / f"{number}.safetensors"
        write_adapter(space.point().adapter(), path, base=base, metadata={"w2w_space_slider": text})
    found = [slider_of(tmp_path / f"{number}.safetensors") for number in range(3)]
    assert found == [None, None, {"attribute": "x"}]
    with pytest.raises(ValueError, match="layout writes itself"):
        write_adapter(space.point().adapter(), tmp_path / "x.safetensors", metadata={"format": "np"})


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_a_kept_scale_is_stated_and_has_the_same_effect(tmp_path: Path, format: str):
    space, _ = planted()
    base, adapter = base_of_layout(space.layout), space.member("m3").adapter()
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    write_adapter(adapter, path, format=format, base=base, scale=27.0)  # type: ignore[arg-type]
    read = read_adapter(path, base)
    assert {change.alpha for change in read.modules.values()} == {27.0}
    for module, change in adapter.modules.items():
        assert change.relative_error(read.modules[module]) < 1e-6
        assert torch.allclose(27 * read.modules[module].up.norm(), change.up.norm(), rtol=1e-4)
    with pytest.raises(UserError, match="`scale` is -1"):
        write_adapter(adapter, tmp_path / "b.safetensors", base=base, scale=-1.0)
