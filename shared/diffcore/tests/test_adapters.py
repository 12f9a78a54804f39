"""Adapters as values: exact changes, sharing, use without fusing, files, and the commands."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffcore import hooks
from diffcore.adapters import Adapter, Base, LowRank, apply, fuse, read_adapter, write_adapter
from diffcore.adapters.keys import parse_key
from diffcore.adapters.settings import parse_settings
from diffcore.cli import main
from diffcore.cli.commands.app import app
from diffcore.errors import IncompatibleModelError, MachineError, UserError
from diffcore.models import load
from diffcore.models.bases import base_of, family_base
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.disk import Killed, faulty_disk
from diffcore.testing.malformed.adapters import valid_peft

VALUE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
CONV = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny.pipeline("sd15").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, Runtime(device="cpu"))


@pytest.fixture(scope="module")
def adapter(model):
    shapes = model.adapter_base.shapes
    names = [
        name for name in shapes["backbone"] if ".to_" in name or name in (CONV, "conv_in", "time_embedding.linear_1")
    ]
    texts = {name: change(shape, 2, 3.0) for name, shape in shapes["text_encoder"].items()}
    return Adapter({name: change(shapes["backbone"][name], 2, -3.0) for name in names}, {"text_encoder": texts})


def change(shape: tuple[int, ...], rank: int, alpha: float) -> LowRank:
    g = torch.Generator().manual_seed(sum(shape))
    return LowRank(
        torch.randn(rank, *shape[1:], generator=g) * 0.1, torch.randn(shape[0], rank, generator=g) * 0.1, alpha
    )


def output(network: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    x_t, t, cond = tiny.inputs("sd15", batch)
    with torch.no_grad():
        return network(x_t, t, **cond).sample


def test_zeroed_rows_are_an_exact_adapter(model, tmp_path):
    weight = model.backbone.state_dict()[f"{VALUE}.weight"]
    edited = weight.clone()
    edited[[3, 17, 30]] = 0
    exact = Adapter.from_differences({VALUE: edited - weight, CONV: torch.zeros(64, 64, 3, 3)})
    assert list(exact.modules) == [VALUE]
    assert exact.modules[VALUE].rank == 3
    assert torch.equal(fuse(model.backbone, exact.modules).state_dict()[f"{VALUE}.weight"], edited)
    for format in ("diffusers", "kohya", "peft"):
        path = write_adapter(exact, tmp_path / f"{format}.safetensors", format=format)
        assert torch.equal(model.with_adapter(path).backbone.state_dict()[f"{VALUE}.weight"], edited)
    columns = weight.clone()
    columns[:, [5, 6]] += 0.25
    assert LowRank.from_difference(columns - weight).rank == 2
    assert torch.equal(LowRank.from_difference(columns - weight).delta(), columns - weight)
    kernel = torch.zeros(8, 4, 3, 3)
    kernel[2] = torch.randn(4, 3, 3)
    assert torch.equal(LowRank.from_difference(kernel).delta(), kernel)
    with pytest.raises(ValueError, match="nothing to make an adapter of"):
        Adapter.from_differences({VALUE: torch.zeros(2, 2)})


def test_only_touched_weights_are_new(model, adapter):
    fused = model.with_adapter(adapter, 0.5)
    touched = {f"{name}.weight" for name in adapter.modules}
    before, after = model.backbone.state_dict(keep_vars=True), fused.backbone.state_dict(keep_vars=True)
    assert {name for name in before if before[name] is not after[name]} == touched
    assert fused.modules["vae"] is model.modules["vae"]
    assert all(not parameter.requires_grad for parameter in fused.backbone.parameters())
    assert not fused.backbone.training
    w = before[f"{VALUE}.weight"] + 0.5 * -3.0 / 2 * adapter.modules[VALUE].up @ adapter.modules[VALUE].down
    torch.testing.assert_close(after[f"{VALUE}.weight"].data, w.data, atol=1e-7, rtol=1e-6)
    prints = {m.fingerprint for m in (model, fused, model.with_adapter(adapter), model.with_adapter(adapter, 0.25))}
    assert len(prints) == 4
    assert model.with_adapter(adapter, 0.5).fingerprint == fused.fingerprint
    assert fused.prompts is not None
    there, back = (m.prompts(["a cat"])["encoder_hidden_states"] for m in (model, fused))
    assert (there - back).abs().max() > 0.05
    assert torch.equal(output(model.with_adapter(adapter, 0.0).backbone), output(model.backbone))


def test_applying_equals_fusing_and_leaves_nothing_behind(model, adapter):
    plain = output(model.backbone)
    for scale in (1.0, -0.5):
        with apply(model.backbone, adapter.modules, scale):
            applied = output(model.backbone)
        torch.testing.assert_close(applied, output(fuse(model.backbone, adapter.modules, scale)), atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="midway"), apply(model.backbone, adapter.modules):
        raise RuntimeError("midway")
    assert torch.equal(output(model.backbone), plain)


def test_each_row_can_have_its_own_strength(model, adapter):
    strengths = torch.tensor([0.0, 1.0, -2.0])
    with apply(model.backbone, adapter.modules, strengths):
        rows = output(model.backbone, 3)
    for i, scale in enumerate(strengths.tolist()):
        alone = output(fuse(model.backbone, adapter.modules, scale), 3)[i]
        torch.testing.assert_close(rows[i], alone, atol=1e-5, rtol=1e-5)
    with apply(model.backbone, adapter.modules, strengths), pytest.raises(ValueError, match="`scale` has 3 rows"):
        output(model.backbone, 2)


def test_hooks_see_the_change_but_stay_off_the_copy(model, adapter):
    with hooks.capture(model.backbone, [VALUE]) as seen, apply(model.backbone, adapter.modules):
        output(model.backbone)
        copy = fuse(model.backbone, {VALUE: adapter.modules[VALUE]})
    assert len(copy.get_submodule(VALUE)._forward_hooks) == 0
    fused = fuse(model.backbone, adapter.modules)
    with hooks.capture(fused, [VALUE]) as wanted:
        output(fused)
    torch.testing.assert_close(seen[VALUE], wanted[VALUE], atol=1e-5, rtol=1e-5)


def test_half_precision_rounds_once_and_overflow_is_told(model):
    linear = torch.nn.Linear(4, 4).half().requires_grad_(False)
    network = torch.nn.Sequential(linear)
    small = LowRank(torch.full((1, 4), 1e-3), torch.full((4, 1), 1.0), 1.0)
    expected = (linear.weight.float() + 1e-3).half()
    assert torch.equal(fuse(network, {"0": small}).state_dict()["0.weight"], expected)
    with pytest.raises(UserError, match="the change of '0' overflows its weight"):
        fuse(network, {"0": LowRank(torch.full((1, 4), 1e3), torch.full((4, 1), 1e3), 1.0)})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nowhere": (2, 2)}, "no such module"),
        ({"conv_norm_out": (32, 32)}, "GroupNorm"),
        ({VALUE: (32, 31)}, "its change"),
    ],
)
def test_changes_made_in_memory_must_fit(model, changes, reason):
    made = {name: change(shape, 1, 1.0) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=reason):
        fuse(model.backbone, made)
    with pytest.raises(ValueError, match=reason), apply(model.backbone, made):
        pass


def test_a_text_encoder_that_is_not_there_is_named(model):
    made = Adapter({}, {"text_encoder_2": {"a": change((2, 2), 1, 1.0)}}, name="mine")
    with pytest.raises(ValueError, match="tiny-sd has no text_encoder_2, which mine changes"):
        model.with_adapter(made)


def test_a_fused_projection_is_refused(model):
    network = tiny.backbone("sd15")
    network.fuse_qkv_projections()
    with pytest.raises(IncompatibleModelError, match="unfuse_qkv_projections"):
        fuse(network, {VALUE: change((32, 32), 1, 1.0)})
    with pytest.raises(ValueError, match="must be finite"):
        fuse(model.backbone, {}, float("nan"))


def test_files_are_the_same_bytes_each_time_and_are_not_replaced_unasked(model, adapter, tmp_path):
    texts = Adapter(adapter.modules)
    for format in ("diffusers", "kohya", "peft"):
        paths = [write_adapter(texts, tmp_path / f"{format}-{i}.safetensors", format=format) for i in range(2)]
        files = [path / "adapter_model.safetensors" if path.is_dir() else path for path in paths]
        assert files[0].read_bytes() == files[1].read_bytes()
        with pytest.raises(UserError, match="is there already; choose another name, or pass `overwrite=True`"):
            write_adapter(texts, paths[0], format=format)
        write_adapter(Adapter({VALUE: texts.modules[VALUE]}), paths[0], format=format, overwrite=True)
        assert len(read_adapter(paths[0], model.adapter_base).modules) == 1
    with pytest.raises(UserError, match="changes text_encoder, and a PEFT folder holds one network"):
        write_adapter(adapter, tmp_path / "x", format="peft")
    with pytest.raises(UserError, match=r"does not end in \.safetensors"):
        write_adapter(adapter, tmp_path / "x.pt")
    with pytest.raises(UserError, match="kohya's names are those of U-Nets"):
        write_adapter(Adapter(texts.modules, backbone="transformer"), tmp_path / "y.safetensors", format="kohya")
    with pytest.raises(UserError, match="has rank 4,097, and files hold at most 4096"):
        write_adapter(
            Adapter.from_factors({"a": (torch.ones(4097, 1), torch.ones(1, 4097))}), tmp_path / "z.safetensors"
        )
    with pytest.raises(ValueError, match="changes nothing"):
        write_adapter(Adapter({}), tmp_path / "z.safetensors")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fault", ["full", "killed"])
def test_a_failing_disk_never_mixes_two_adapters(model, tmp_path, fault):
    """An old configuration beside new weights would change their strength without a word."""
    new = Adapter({VALUE: change((32, 32), 2, 2.0)})
    with faulty_disk() as disk:
        write_adapter(new, tmp_path / "golden", format="peft")
    wanted = read_adapter(tmp_path / "golden", model.adapter_base).modules[VALUE].delta()
    outcomes = set()
    for at in range(1, disk.count + 1):
        (tmp_path / str(at)).mkdir()
        path = valid_peft(tmp_path / str(at), r=2, lora_alpha=27)
        with faulty_disk(at, fault), pytest.raises((MachineError, Killed)):
            write_adapter(new, path, format="peft", overwrite=True)
        try:
            read = read_adapter(path, model.adapter_base).modules
            outcomes.add("old" if VALUE not in read else "new")
            assert VALUE not in read or torch.equal(read[VALUE].delta(), wanted)
        except UserError:
            outcomes.add("none")
    assert "none" in outcomes
    path = write_adapter(new, tmp_path / "a.safetensors")
    before = path.read_bytes()
    with faulty_disk(4, fault), pytest.raises((MachineError, Killed)):
        write_adapter(Adapter({CONV: change((64, 64, 3, 3), 1, 1.0)}), path, overwrite=True)
    assert path.read_bytes() == before


def test_strengths_are_folded_and_types_keep_their_numbers(model, adapter, tmp_path):
    original = adapter.modules[VALUE]
    half = Adapter({VALUE: LowRank(original.down.half(), original.up.half(), 4.0)})
    path = write_adapter(half, tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}  # 4 / 2 is exact
    odd = Adapter({VALUE: LowRank(half.modules[VALUE].down, half.modules[VALUE].up, 27.0)})
    path = write_adapter(odd, tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}  # 27 / 2 would round
    read = read_adapter(path, model.adapter_base).modules[VALUE]
    assert (read.alpha, read.rank) == (2.0, 2)
    assert odd.modules[VALUE].relative_error(read) < 1e-6
    assert odd.modules[VALUE].relative_error(half.modules[VALUE]) == pytest.approx(23 / 27)
    # Unlike sizes would leave float16's range on either side; balanced, they fit.
    unlike = LowRank(original.down * 2e5, original.up * 1e-8, 2.0)
    path = write_adapter(Adapter({VALUE: unlike}), tmp_path / "c.safetensors", dtype=torch.float16)
    assert unlike.relative_error(read_adapter(path, model.adapter_base).modules[VALUE]) < 1e-3
    huge = LowRank(unlike.down, unlike.up * 1e20, 2.0)
    with pytest.raises(UserError, match="float16 does not hold the numbers of"):
        write_adapter(Adapter({VALUE: huge}), tmp_path / "d.safetensors", dtype=torch.float16)


def test_alphas_of_kohya_hold_every_rank(tmp_path):
    factors = {"conv_in": (torch.ones(301, 4).bfloat16(), torch.ones(8, 301).bfloat16())}
    path = write_adapter(Adapter.from_factors(factors), tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(path)
    assert float(tensors["lora_unet_conv_in.alpha"]) == 301  # bfloat16 would say 302
    assert tensors["lora_unet_conv_in.lora_up.weight"].dtype == torch.bfloat16
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "301"


def test_names_with_underscores_are_looked_up_not_taken_apart():
    shapes = {"a_b.c": (1, 1), "a.b_c.d": (1, 1), "x.y": (1, 1), "x_y": (1, 1), "p.q_r": (1, 1), "p_q.r": (1, 1)}
    base = Base("m", "unet", {"backbone": shapes})
    assert base.find("backbone", "a_b_c") == "a_b.c"
    assert base.find("backbone", "a_b_c_d") == "a.b_c.d"
    assert base.find("backbone", "x_y") == "x_y"  # an exact name wins
    assert base.find("backbone", "p_q_r") is None  # two modules: neither is meant for sure
    assert base.find("text_encoder", "a_b_c") is None
    assert base.nearest("backbone", "a_b_x") == "a_b.c"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("lora_unet_a_b.lora_down.weight", ("backbone", "a_b", "down", "kohya")),
        ("lora_te_a.alpha", ("text_encoder", "a", "alpha", "kohya")),
        ("lora_te2_a.lora_up.weight", ("text_encoder_2", "a", "up", "kohya")),
        ("base_model.model.a.b.lora_B.identity1.weight", ("backbone", "a.b", "up", "peft")),
        ("unet.a.lora.up.weight", ("backbone", "a", "up", "diffusers")),
        ("unet.a.processor.to_out_lora.down.weight", ("backbone", "a.to_out.0", "down", "diffusers processors")),
        ("a.processor.to_k_lora.up.weight", ("backbone", "a.to_k", "up", "diffusers processors")),
        ("unet.a.to_q_lora.down.weight.alpha", ("backbone", "a.to_q", "alpha", "diffusers")),
        ("transformer.a.lora_A.weight", ("backbone", "a", "down", "diffusers")),
        ("text_encoder.a.to_out_lora.up.weight", ("text_encoder", "a.out_proj", "up", "diffusers")),
        ("text_encoder_2.a.lora_linear_layer.up.weight", ("text_encoder_2", "a", "up", "diffusers")),
        ("a.b.lora_A.weight", ("backbone", "a.b", "down", "diffusers unprefixed")),
        ("diffusion_model.a.lora_B.weight", ("backbone", "a", "up", "comfyui")),
        ("diffusion_model.a.alpha", ("backbone", "a", "alpha", "comfyui")),
    ],
)
def test_keys_mean_what_their_tools_mean(text, meant):
    key = parse_key(text)
    assert (key.component, key.module, key.part, key.layout) == meant


def test_original_names_with_dots_are_found():
    base = base_of("m", {}, tiny.backbone("sd15"))
    key = parse_key("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_A.weight")
    assert base.find(key.component, key.module) == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_patterns_fit_whole_names_from_the_end_and_the_first_wins():
    settings = parse_settings({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1, "to_q": 2}})
    assert settings.alpha_of("x.attn1.to_q", 4) == 1
    assert settings.alpha_of("x.attn2.to_q", 4) == 2
    assert settings.alpha_of("x.into_q", 4) == 8
    assert parse_settings({"r": 4, "lora_alpha": 8, "use_rslora": True}).alpha_of("x", 4) == 16  # 16 / 4 = 8 / sqrt 4


def said(capsys: pytest.CaptureFixture[str], *tokens: object) -> dict:
    capsys.readouterr()
    assert app(["adapter", *map(str, tokens), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_tells_what_an_adapter_is(model, adapter, folder, tmp_path, capsys):
    mixed = Adapter({**adapter.modules, VALUE: change((32, 32), 1, 5.0)}, adapter.text_encoders)
    source = write_adapter(mixed, tmp_path / "a.safetensors", format="kohya")
    told = said(capsys, "info", source, "--model", folder)
    assert told["layout"] == "kohya"
    assert told["fits"] == ["tiny-sd"]
    assert told["modules"] == len(adapter.modules)
    assert told["text_encoders"] == {"text_encoder": 12}
    assert told["convolutions"] == 2
    assert told["ranks"] == {"2": len(adapter.modules) + 12}
    assert told["precision"] == "F32"
    assert len(told["changes"]) == len(adapter.modules) + 12
    told = said(
        capsys, "info", valid_peft(tmp_path, base_model_name_or_path="stranger/\x1b[31mevil"), "--model", folder
    )
    assert told["alphas"] == {"4": 1}
    assert told["claims"] == {"base_model_name_or_path": "stranger/\\x1b[31mevil"}
    assert main(app, ["adapter", "info", str(source)]) == 0
    assert "none of sd15, sd21, sdxl; name a base with --model" in capsys.readouterr().out


def test_info_and_convert_find_the_family_by_themselves(tmp_path, capsys):
    base = family_base("sdxl")
    names = [name for name in base.shapes["backbone"] if "mid_block" in name and "attn2.to_v" in name]
    made = Adapter({name: LowRank(torch.ones(1, 2048).half(), torch.ones(1280, 1).half(), 3.0) for name in names})
    source = write_adapter(made, tmp_path / "a.safetensors")
    assert said(capsys, "info", source)["fits"] == ["sdxl"]
    told = said(capsys, "convert", source, tmp_path / "b.safetensors", "--format", "kohya")
    assert told["base"] == "sdxl"
    assert told["largest_relative_error"] < 1e-6
    assert "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v.alpha" in load_file(tmp_path / "b.safetensors")
    assert main(app, ["adapter", "convert", str(source), str(tmp_path / "b.safetensors")]) == 2
    assert "is there already" in capsys.readouterr().err
    told = said(
        capsys, "convert", tmp_path / "b.safetensors", tmp_path / "c", "--format", "peft", "--dtype", "bfloat16"
    )
    assert told["largest_relative_error"] < 1e-12  # ones and threes are exact
    assert {tensor.dtype for tensor in load_file(tmp_path / "c" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


def test_an_adapter_of_another_model_is_told_with_exit_code_1(tmp_path, folder, capsys):
    stranger = Adapter({"conv_in": LowRank(torch.ones(1, 5, 3, 3), torch.ones(32, 1), 1.0)})
    source = write_adapter(stranger, tmp_path / "a.safetensors")
    assert main(app, ["adapter", "info", str(source), "--model", str(folder)]) == 1
    assert "for a weight of 32x5x3x3" in capsys.readouterr().out
    assert main(app, ["adapter", "convert", str(source), str(tmp_path / "b.safetensors")]) == 2
    assert not (tmp_path / "b.safetensors").exists()


def test_a_file_without_alpha_warns_once(model, tmp_path):
    keys = {f"unet.{VALUE}.lora_A.weight": torch.ones(2, 32), f"unet.{VALUE}.lora_B.weight": torch.ones(32, 2)}
    from safetensors.torch import save_file

    save_file(keys, tmp_path / "a.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.with_adapter(tmp_path / "a.safetensors")
    assert [str(w.message) for w in caught] == [
        f"{tmp_path / 'a.safetensors'} does not say the alpha of 1 of 1 modules; the rank is taken, as other tools do: "
        "if it was trained with another alpha, its strength is lost"
    ]


def test_samples_are_drawn_with_an_adapter(folder, model, tmp_path):
    """The same as from a model with the adapter fused in; another adapter is another run."""
    made = Adapter({"conv_in": change((32, 4, 3, 3), 4, 40.0)})
    lora = write_adapter(made, tmp_path / "lora.safetensors")
    model.with_adapter(made, 0.5).pipeline.save_pretrained(tmp_path / "by-hand")
    images = {}
    for name, tokens in {
        "plain": [folder],
        "with": [folder, "--adapter", lora, "--adapter-scale", "0.5"],
        "fused": [tmp_path / "by-hand"],
    }.items():
        asked = [str(token) for token in (tokens[0], "a cat", *tokens[1:], "--steps", "1", "--out", tmp_path / name)]
        assert app(["sample", *asked]) == 0
        images[name] = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
    assert images["with"] == images["fused"]
    assert images["with"] != images["plain"]
