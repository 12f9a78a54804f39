"""Spaces, points and exported adapters on disk: exact where they can be, refused where they mean something else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffcore.adapters import Adapter, Base, LowRank, read_adapter
from diffcore.adapters.keys import BACKBONE
from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError
from diffcore.models import from_pipeline, load
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from w2w_space.files.base import base_from_json, base_of_layout, base_to_json
from w2w_space.files.export import export_point, merge_point
from w2w_space.files.points import is_point, load_point, save_point
from w2w_space.files.space import base_of_space, details_of_space, is_space, load_space, save_space
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.space import Point, WeightSpace

FORMATS = ("diffusers", "kohya", "peft")


def drawn_space(layout: Layout, members: int = 8, seed: int = 0, rank: int = 5, **options) -> WeightSpace:
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(members, layout.size, generator=g) * 0.1
    names = tuple(f"m{i}" for i in range(members))
    return WeightSpace.build(Population(layout, names, Stacked(matrix)), num_components=rank, **options)


@pytest.fixture(scope="module")
def space() -> WeightSpace:
    return drawn_space(Layout.of({"a": (6, 4), "b": (3, 5)}, rank=2))


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline("sd15")


@pytest.fixture(scope="module")
def fitted(pipeline) -> WeightSpace:
    """A space of the tiny pipeline's attention."""
    names = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")
    shapes = {n: tuple(m.weight.shape) for n, m in pipeline.unet.named_modules() if n.endswith(names)}
    return drawn_space(Layout.of(shapes, rank=1), members=6)


def equal(one: WeightSpace, other: WeightSpace) -> bool:
    pairs = [(one.mean, other.mean), (one.scale, other.scale), (one.components, other.components)]
    pairs += [(one.variances, other.variances), (one.members, other.members)]
    pairs += [(one.gauge.reference, other.gauge.reference)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs) and (
        (one.gauge.layout, one.gauge.kind, one.fit, one.names, one.shrinkage)
        == (other.gauge.layout, other.gauge.kind, other.fit, other.names, other.shrinkage)
    )


@pytest.mark.parametrize("gauge", ["canonical", "raw"])
def test_a_space_in_float32_comes_back_bit_by_bit(tmp_path: Path, gauge):
    space = replace(drawn_space(Layout.of({"a": (6, 4), "b": (3, 5, 3, 3)}, rank=2), gauge=gauge), shrinkage=0.7)
    path = save_space(space, tmp_path / "s", dtype="float32", recipe="a recipe")
    back = load_space(tmp_path / "s")
    assert equal(space, back)
    assert back.fingerprint == space.fingerprint == details_of_space(path)["fingerprint"]
    assert details_of_space(path)["recipe"] == "a recipe"


def test_half_precision_halves_the_file_and_keeps_the_space(space: WeightSpace, tmp_path: Path):
    whole = save_space(space, tmp_path / "whole.safetensors", dtype="float32")
    half = save_space(space, tmp_path / "half.safetensors")
    with safe_open(half, framework="pt") as file:
        assert file.get_slice("components").get_dtype() == "F16"
        assert {"gauge.a", "gauge.b", "members.coefficients", "mean", "scale", "variances"} <= set(file.keys())
    assert half.stat().st_size < whole.stat().st_size
    back = load_space(half)
    assert back.fingerprint == space.fingerprint
    assert float((back.components - space.components).abs().max()) < 5e-4
    z = torch.randn(4, space.num_components)
    assert torch.allclose(back.vectors(z), space.vectors(z), atol=1e-3)


def test_a_space_without_members_does_not_tell_them(space: WeightSpace, tmp_path: Path):
    path = save_space(space, tmp_path / "s", members=False)
    text = path.with_suffix(".json").read_text()
    assert '"m0"' not in text
    back = load_space(path)
    assert back.names == ()
    assert len(back.members) == 0
    assert details_of_space(path)["members_included"] is False
    with safe_open(path, framework="pt") as file:
        assert "members.coefficients" not in file.keys()  # noqa: SIM118
    with pytest.raises(UserError, match="without its members"):
        back.member("m0")


def test_what_is_no_space_is_refused(space: WeightSpace, tmp_path: Path):
    path = save_space(space, tmp_path / "s")
    point = save_point(space.point(), tmp_path / "p.safetensors")
    assert (is_space(path), is_space(tmp_path / "s"), is_space(point), is_space(tmp_path)) == (True, True, False, False)
    assert (is_point(point), is_point(path)) == (True, False)
    with pytest.raises(UserError, match="holds no space"):
        load_space(tmp_path)
    with pytest.raises(CorruptArtifactError, match="point where a w2w-space/space"):
        load_space(point)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifactError, match="sum"):
        load_space(path)


def test_the_base_travels_with_the_space(space: WeightSpace, tmp_path: Path, pipeline):
    base = from_pipeline(pipeline).adapter_base
    path = save_space(space, tmp_path / "s", base=base)
    back = base_of_space(path)
    assert (back.name, back.backbone, dict(back.original)) == (base.name, base.backbone, dict(base.original))
    assert {c: dict(m) for c, m in back.shapes.items()} == {c: dict(m) for c, m in base.shapes.items()}
    assert base_from_json(base_to_json(base_of_layout(space.layout))).shapes[BACKBONE]["a"] == (6, 4)


def test_a_point_comes_back_in_its_own_space_alone(space: WeightSpace, tmp_path: Path):
    point = Point(space, torch.randn(space.num_components), residual=0.25)
    path = save_point(point, tmp_path / "p.safetensors", name="alice")
    back = load_point(path, space)
    assert torch.equal(back.z, point.z)
    assert back.residual == 0.25
    save_space(space, tmp_path / "s")
    assert torch.equal(load_point(path, load_space(tmp_path / "s")).z, point.z)
    for other in (
        drawn_space(space.layout, seed=1),
        space.truncated(3),
        replace(space, mean=space.mean + 1e-3),
        replace(space, components=space.components.flip(0)),
    ):
        with pytest.raises(IncompatibleModelError, match="a point of another space"):
            load_point(path, other)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (None, 2e-3)])
def test_an_export_reads_back_as_the_point(space: WeightSpace, tmp_path: Path, format, dtype, tolerance):
    point = Point(space, torch.randn(space.num_components))
    path = tmp_path / ("folder" if format == "peft" else "a.safetensors")
    written = export_point(point, path, format=format, dtype=dtype, card={"subject": "alice"})
    assert written.error < tolerance
    assert written.dtype == (dtype or torch.float16)
    read = read_adapter(path, base_of_layout(space.layout))
    for name, change in point.adapter().modules.items():
        assert change.relative_error(read.modules[name]) < tolerance
        assert read.modules[name].alpha == read.modules[name].rank == 2
        sizes = read.modules[name].down.float().norm(), read.modules[name].up.float().norm()
        assert float(sizes[0] / sizes[1]) == pytest.approx(1, abs=0.01)
    assert written.card is not None
    assert "subject: alice" in written.card.read_text()
    with pytest.raises(UserError, match="there already"):
        export_point(point, path, format=format)


def test_numbers_that_half_precision_does_not_hold_go_into_a_wider_type(space: WeightSpace, tmp_path: Path):
    far = replace(space, scale=space.scale * 1e10)
    point = Point(far, torch.ones(space.num_components))
    assert export_point(point, tmp_path / "a.safetensors").dtype == torch.float32
    with pytest.raises(UserError, match="float16 does not hold"):
        export_point(point, tmp_path / "b.safetensors", dtype=torch.float16)


def unet_output(unet) -> torch.Tensor:
    x, t, cond = tiny.inputs("sd15")
    with torch.no_grad():
        return unet(x, t, **cond).sample


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_plain_diffusers_shows_the_point(fitted: WeightSpace, tmp_path: Path, format):
    """A real pipeline reads the file by its own `load_lora_weights` and gives our outputs."""
    pipe = tiny.pipeline("sd15")
    point = Point(fitted, torch.randn(fitted.num_components, generator=torch.Generator().manual_seed(1)) * 3)
    path = export_point(point, tmp_path / "a.safetensors", format=format, dtype=torch.float32).path
    before = unet_output(pipe.unet)
    ours = unet_output(from_pipeline(pipe).with_adapter(point.adapter()).backbone)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    theirs = unet_output(pipe.unet)
    assert float((ours - before).abs().max()) > 1e-3
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


def test_peft_shows_the_point(fitted: WeightSpace, tmp_path: Path):
    """PEFT's own reader gives our outputs too."""
    from peft import PeftModel

    pipe = tiny.pipeline("sd15")
    point = Point(fitted, torch.randn(fitted.num_components, generator=torch.Generator().manual_seed(2)) * 3)
    export_point(point, tmp_path / "a", format="peft", dtype=torch.float32)
    ours = unet_output(from_pipeline(pipe).with_adapter(point.adapter()).backbone)
    theirs = unet_output(PeftModel.from_pretrained(pipe.unet, str(tmp_path / "a")))
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


def test_alpha_is_kept_where_the_naive_rewrite_loses_it(fitted: WeightSpace, tmp_path: Path):
    """Takes rank 1 and alpha 27 in diffusers' keys; the file without a stated alpha shows a twenty-seventh."""
    from safetensors.torch import save_file

    adapter = fitted.point(torch.full((fitted.num_components,), 2.0)).adapter()
    strong = Adapter({n: LowRank(c.down, c.up / 27 * 4, 27.0) for n, c in adapter.modules.items()}, name="strong")
    pipe = tiny.pipeline("sd15")
    before, ours = unet_output(pipe.unet), unet_output(from_pipeline(pipe).with_adapter(strong).backbone)
    naive = {}
    for name, change in strong.modules.items():
        naive |= {f"unet.{name}.lora_A.weight": change.down, f"unet.{name}.lora_B.weight": change.up}
    save_file({name: tensor.contiguous() for name, tensor in naive.items()}, tmp_path / "naive.safetensors")
    vector = fitted.layout.vector(strong)
    everything = replace(fitted, mean=vector)
    export_point(everything.point(), tmp_path / "good.safetensors", dtype=torch.float32)
    errors = {}
    for name in ("naive", "good"):
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors")
        errors[name] = float((unet_output(pipe.unet) - ours).abs().max())
        pipe.unload_lora_weights()
    effect = float((ours - before).abs().max())
    assert errors["good"] < 1e-5 * effect + 1e-6
    assert errors["naive"] > 0.5 * effect


def test_a_merged_checkpoint_is_the_adapted_model(fitted: WeightSpace, tmp_path: Path):
    model = from_pipeline(tiny.pipeline("sd15"))
    point = fitted.point(torch.full((fitted.num_components,), 1.5))
    folder = merge_point(model, point, tmp_path / "merged", weight=0.5)
    merged = load(folder, Runtime(device="cpu")).backbone
    ours = unet_output(model.with_adapter(point.adapter(), 0.5).backbone)
    assert float((unet_output(merged) - ours).abs().max()) < 1e-6
    assert float((unet_output(model.backbone) - ours).abs().max()) > 1e-4
    assert "weight: 0.5" in (folder / "README.md").read_text()


def test_kohyas_names_need_the_base_of_sdxl(tmp_path: Path):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    base = Base("sdxl", "unet", {BACKBONE: {name: (4, 3)}, "text_encoder_2": {}}, {name: "input_blocks.4.1.to_q"})
    space = drawn_space(Layout.of({name: (4, 3)}, rank=1), members=5, rank=2)
    path = export_point(space.point(), tmp_path / "a.safetensors", format="kohya", base=base).path
    with safe_open(path, framework="pt") as file:
        assert "lora_unet_input_blocks_4_1_to_q.lora_down.weight" in file.keys()  # noqa: SIM118
