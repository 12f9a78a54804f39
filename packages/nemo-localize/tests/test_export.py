"""The edit in all its forms: hooks, weights, checkpoint and LoRA give the same numbers; restore gives the bytes."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError
from diffcore.io import artifact
from diffcore.models import DiffusionModel, load
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from nemo_localize.ablate import ablated, ablated_copy
from nemo_localize.app import cli
from nemo_localize.files.export import checkpoint_in, export, restore
from nemo_localize.neurons import NeuronSet
from nemo_localize.sites import value_sites

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
NEURONS = NeuronSet.of({FIRST: [1, 3, 30], MIDDLE: [0]})
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    tiny.pipeline("sd15").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(source: Path) -> DiffusionModel:
    return load(source, Runtime(device="cpu"))


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "run"
    export(source, NEURONS, out, reasons={"a caption": NEURONS})
    return out


@pytest.fixture
def double(model: DiffusionModel) -> DiffusionModel:
    return model.with_modules("float64", {"unet": deepcopy(model.backbone).double()})


def output(model: DiffusionModel, rows: int = 4, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.backbone.parameters()).dtype
    x_t = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    states = torch.randn(rows, 7, width, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        return model.denoiser(x_t, torch.full((rows,), 981.0), {"encoder_hidden_states": states}).output


class Channels(nn.Module):
    """Stands for a residual block: repeats or cuts channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.repeat(1, -(-self.width // x.shape[1]), 1, 1)[:, : self.width]


@pytest.fixture(scope="module")
def full_width(model: DiffusionModel) -> DiffusionModel:
    """The seven searched cross-attentions of Stable Diffusion 1.x at their size, with random weights, in float64.

    What is never edited and holds most of the weights has stand-ins: residual blocks, resampling, self-attention and
    feed-forward layers.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(
            sample_size=8, cross_attention_dim=768, attention_head_dim=8, up_block_types=("UpBlock2D",) * 4
        )
    for module in list(unet.modules()):
        if hasattr(module, "resnets"):
            module.resnets = nn.ModuleList(Channels(resnet.out_channels) for resnet in module.resnets)
        if hasattr(module, "attn2"):
            module.attn1.forward = lambda hidden, *_, **__: torch.zeros_like(hidden)
            module.attn1.to_q = module.attn1.to_k = module.attn1.to_v = module.attn1.to_out = nn.ModuleList()
            module.ff = nn.Identity()
        for resampling, cheap in (("upsamplers", nn.Identity()), ("downsamplers", nn.AvgPool2d(2))):
            for layer in getattr(module, resampling, None) or ():
                layer.conv = cheap
    unet.to_empty(device="cpu").double()
    torch.manual_seed(0)
    for module in unet.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.with_modules("full width", {"unet": unet.eval()})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_hooks_rows_and_columns_are_one_edit(double: DiffusionModel, scale: float):
    before = output(double)
    with ablated(double.backbone, NEURONS, scale=scale):
        hooked = output(double)
    by_columns = deepcopy(double.backbone)
    for name, channels in NEURONS.layers:
        projection: Any = by_columns.get_submodule(name.removesuffix("to_v") + "to_out.0")
        with torch.no_grad():
            projection.weight[:, list(channels)] *= scale
    columns = output(double.with_modules("columns", {"unet": by_columns}))
    rows = output(ablated_copy(double, NEURONS, scale=scale))
    assert (hooked - before).abs().max() > 1e-6
    torch.testing.assert_close(rows, hooked, rtol=0, atol=1e-12)
    torch.testing.assert_close(columns, hooked, rtol=0, atol=1e-12)
    assert torch.equal(output(double), before)


def test_hooks_and_rows_are_one_edit_at_full_width(full_width: DiffusionModel):
    sites = value_sites(full_width.backbone)
    assert sites.widths == (320, 320, 640, 640, 1280, 1280, 1280)
    one_each = [span[width // 3] for span, width in zip(sites.spans, sites.widths, strict=True)]
    neurons = sites.named(one_each)
    before = output(full_width, 2, 768)
    with ablated(full_width.backbone, neurons):
        hooked = output(full_width, 2, 768)
    rows = output(ablated_copy(full_width, neurons), 2, 768)
    assert (hooked - before).abs().max() > 1e-3
    torch.testing.assert_close(rows, hooked, rtol=0, atol=1e-12)


def test_an_exception_leaves_the_model_as_it_was(model: DiffusionModel):
    before = output(model)

    def fail():
        with ablated(model.backbone, NEURONS):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(output(model), before)


def test_one_branch_alone_is_edited_where_asked_for(double: DiffusionModel):
    before = output(double)
    with ablated(double.backbone, NEURONS):
        both = output(double)
    with ablated(double.backbone, NEURONS, branch="cond"):
        cond = output(double)
    assert torch.equal(cond[:2], before[:2])
    torch.testing.assert_close(cond[2:], both[2:], rtol=0, atol=1e-12)


def test_a_bias_is_ablated_with_its_row(double: DiffusionModel):
    layer: Any = double.backbone.get_submodule(FIRST)
    layer.bias = nn.Parameter(torch.randn(layer.out_features, dtype=torch.float64))
    with ablated(double.backbone, NEURONS):
        hooked = output(double)
    torch.testing.assert_close(output(ablated_copy(double, NEURONS)), hooked, rtol=0, atol=1e-12)


def test_weights_are_shared_but_for_the_edited_layers(model: DiffusionModel):
    copy = ablated_copy(model, NEURONS)
    own = dict(copy.backbone.named_parameters())
    different = [name for name, tensor in model.backbone.named_parameters() if own[name] is not tensor]
    assert different == [f"{name}.weight" for name, _ in NEURONS.layers]
    assert copy.fingerprint != model.fingerprint


class Wrapped(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer, self.out_features = layer, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def test_adapters_and_quantised_layers_are_refused(double: DiffusionModel):
    attention: Any = double.backbone.get_submodule(FIRST.removesuffix(".to_v"))
    plain = attention.to_v
    attention.to_v = Wrapped(plain)
    with pytest.raises(IncompatibleModelError, match="merge the adapter first"):
        ablated_copy(double, NEURONS)
    attention.to_v = plain
    plain.weight = nn.Parameter(plain.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(IncompatibleModelError, match="quantised"):
        ablated_copy(double, NEURONS)


def test_neurons_of_another_model_are_refused(model: DiffusionModel, source: Path, tmp_path: Path):
    for wrong in (NeuronSet.of({FIRST: [32]}), NeuronSet.of({"down_blocks.7.to_v": [0]})):
        with pytest.raises(IncompatibleModelError):
            ablated_copy(model, wrong)
        with pytest.raises(IncompatibleModelError):
            export(source, wrong, tmp_path / "out")
    with pytest.raises(UserError, match="nothing to ablate"):
        export(source, NeuronSet(), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_checkpoint_and_loras_equal_the_edited_model(model: DiffusionModel, exported: Path):
    wanted = output(ablated_copy(model, NEURONS))
    reloaded = load(exported / "model", Runtime(device="cpu"))
    assert torch.equal(output(reloaded), wanted)
    for lora in ("diffusers.safetensors", "kohya.safetensors", "peft"):
        torch.testing.assert_close(output(model.with_adapter(exported / "lora" / lora)), wanted, rtol=0, atol=1e-6)
    assert (output(model) - wanted).abs().max() > 1e-5


def test_the_plain_library_loads_it(model: DiffusionModel, exported: Path):
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(exported / "model", local_files_only=True)
    state = ablated_copy(model, NEURONS).backbone.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert not pipeline.unet.get_submodule(FIRST).weight[[1, 3, 30]].any()


def test_nothing_else_changes_and_restore_brings_back_the_bytes(source: Path, exported: Path, tmp_path: Path):
    before, after = contents(source), contents(exported / "model")
    assert [name for name in before if before[name] != after[name]] == [WEIGHTS]
    assert (exported / "delta.safetensors").stat().st_size < 4000
    sums = restore(exported / "model", exported / "delta.safetensors", tmp_path / "restored")
    assert list(sums) == [WEIGHTS]
    assert contents(tmp_path / "restored") == before


def test_restore_refuses_another_checkpoint(source: Path, exported: Path, tmp_path: Path):
    with pytest.raises(CorruptArtifactError, match="is not what"):
        restore(source, exported / "delta.safetensors", tmp_path / "restored")
    assert not list(tmp_path.iterdir())


def test_restore_refuses_a_delta_that_does_not_restore(exported: Path, tmp_path: Path):
    found = artifact.load(exported / "delta.safetensors", schema="nemo-localize/delta@1")
    record = json.loads(json.dumps(found.fields["files"]))
    record[WEIGHTS]["runs"][0][0] += 4
    moved = tmp_path / "delta.safetensors"
    artifact.save(moved, found.tensors, schema="nemo-localize/delta@1", neurons={}, files=record)
    with pytest.raises(CorruptArtifactError, match="does not restore"):
        restore(exported / "model", moved, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_bias_goes_with_its_row_and_no_lora_can_say_so(source: Path, tmp_path: Path):
    folder = tmp_path / "pipeline"
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {f"{FIRST}.bias": torch.ones(32)}, folder / WEIGHTS)
    with pytest.raises(IncompatibleModelError, match="lora=False"):
        export(folder, NEURONS, tmp_path / "out")
    export(folder, NEURONS, tmp_path / "out", lora=False)
    bias = load_file(tmp_path / "out" / "model" / WEIGHTS)[f"{FIRST}.bias"]
    assert (bias == 0).nonzero().flatten().tolist() == [1, 3, 30]


def test_nothing_is_written_over(source: Path, exported: Path, tmp_path: Path):
    before = contents(exported)
    with pytest.raises(UserError, match="is there already"):
        export(source, NEURONS, exported)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="is there already"):
        restore(exported / "model", exported / "delta.safetensors", tmp_path / "taken")
    assert contents(exported) == before
    assert not list((tmp_path / "taken").iterdir())


def test_every_precision_is_edited_and_pickles_stay_behind(source: Path, tmp_path: Path):
    folder = tmp_path / "pipeline"
    shutil.copytree(source, folder)
    half = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (folder / "whole.ckpt").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.partial").mkdir()
    (tmp_path / "out" / "model.partial" / "leftover").write_bytes(b"x")
    manifest = export(folder, NEURONS, tmp_path / "out")
    written = contents(tmp_path / "out" / "model")
    assert manifest["left_out"] == ["unet/diffusion_pytorch_model.bin", "whole.ckpt"]
    assert not {"leftover", "whole.ckpt", "unet/diffusion_pytorch_model.bin"} & set(written)
    for name in (WEIGHTS, "unet/diffusion_pytorch_model.fp16.safetensors"):
        assert not load_file(tmp_path / "out" / "model" / name)[f"{MIDDLE}.weight"][0].any()
    # The LoRA takes away what the exact copy holds, not what half precision made of it.
    layer = load(folder, Runtime(device="cpu")).with_adapter(tmp_path / "out" / "lora" / "diffusers.safetensors")
    assert not layer.backbone.get_submodule(MIDDLE).weight[0].any()


def test_paths_of_the_machine_that_saved_the_source_are_left_out(source: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "as saved by a trainer"
    loaded: Any = StableDiffusionPipeline.from_pretrained(source, local_files_only=True)
    loaded.save_pretrained(folder)
    words = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    words = {"first": 1, **words, "name_or_path": 'C:\\Users\\somebody\\"quoted"'}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {"_name_or_path": "/home/x"}
        )
    )
    before = contents(folder)
    named = {name for name, data in before.items() if name.endswith(".json") and b"name_or_path" in data}
    assert named >= {"model_index.json", "unet/config.json", "vae/config.json"}
    export(folder, NEURONS, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.json"):
        if path.parent.name != "out":
            assert 'name_or_path": "' not in path.read_text(), path
    after = contents(tmp_path / "out" / "model")
    for name in named:
        kept = {key: value for key, value in json.loads(before[name]).items() if key.lstrip("_") != "name_or_path"}
        assert json.loads(after[name]) == kept
    assert {name for name in before if before[name] != after[name]} == named | {WEIGHTS}
    again: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "model", local_files_only=True)
    assert not again.unet.get_submodule(MIDDLE).weight[0].any()
    restore(tmp_path / "out" / "model", tmp_path / "out" / "delta.safetensors", tmp_path / "restored")
    assert contents(tmp_path / "restored") == before


@pytest.mark.parametrize("kind", ["all in half", "variants in half", "text encoder whole", "bfloat16", "U-Net alone"])
def test_the_manifest_says_how_plain_diffusers_loads_it(tmp_path: Path, kind: str):
    import diffusers

    pipeline = tiny.pipeline("sd15")
    pipeline.to(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float16)
    if kind == "text encoder whole":
        pipeline.text_encoder.float()
    folder = tmp_path / "half"
    variant = "fp16" if kind == "variants in half" else None
    saved = pipeline.unet if kind == "U-Net alone" else pipeline
    saved.save_pretrained(folder, variant=variant)
    call = export(folder, NEURONS, tmp_path / "out", lora=False)["load"]
    named = {
        "all in half": "torch_dtype=torch.float16",
        "variants in half": 'variant="fp16", torch_dtype=torch.float16',
    }
    named |= {"bfloat16": "torch_dtype=torch.bfloat16"}
    name = "UNet2DConditionModel" if kind == "U-Net alone" else "StableDiffusionPipeline"
    assert call == f'{name}.from_pretrained("model"{", " if kind in named else ""}{named.get(kind, "")})'
    call = call.replace('"model"', repr(str(tmp_path / "out" / "model")))
    loaded = eval(call, {"torch": torch, **{name: getattr(diffusers, name)}})
    if kind != "U-Net alone":
        loaded.set_progress_bar_config(disable=True)
        loaded("a cat", height=16, width=16, num_inference_steps=1, output_type="latent")


def test_of_a_whole_file_and_shards_the_lora_takes_those_in_use(source: Path, tmp_path: Path):
    folder = tmp_path / "pipeline"
    shutil.copytree(source, folder)
    other = tiny.backbone("sd15", seed=1, cross_attention_dim=32)
    other.save_pretrained(tmp_path / "other", max_shard_size="1MB")
    for path in (tmp_path / "other").glob("diffusion_pytorch_model*"):
        path.rename(folder / "unet" / path.name)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    # A name that sorts before those of the shards.
    save_file(tensors, folder / "unet" / "a.safetensors")
    export(folder, NEURONS, tmp_path / "out")
    lora = tmp_path / "out" / "lora" / "diffusers.safetensors"
    layer = load(folder, Runtime(device="cpu")).with_adapter(lora).backbone.get_submodule(MIDDLE)
    assert not layer.weight[0].any()
    assert load_file(tmp_path / "out" / "model" / "unet" / "a.safetensors")[f"{MIDDLE}.weight"][0].abs().sum() == 0


def test_a_single_file_keeps_its_layout(tmp_path: Path):
    path = tmp_path / "sd15.safetensors"
    first = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2"
    averaged = "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_vweight"
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
        f"{first}.to_k.weight": torch.ones(320, 768),
        f"{first}.to_v.weight": torch.arange(1.0, 321)[:, None].repeat(1, 768),
        averaged: torch.ones(320, 768),
    }
    save_file(tensors, path)
    export(path, NeuronSet.of({FIRST: [25]}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = tensors[f"{first}.to_v.weight"].clone()
    wanted[25] = 0
    assert torch.equal(found[f"{first}.to_v.weight"], wanted)
    assert found[averaged].sum() == 319 * 768
    lora = load_file(tmp_path / "out" / "lora" / "kohya.safetensors")
    assert any("input_blocks_1_1" in name or "down_blocks_0_attentions_0" in name for name in lora)
    restore(tmp_path / "out" / "model.safetensors", tmp_path / "out" / "delta.safetensors", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_an_interrupted_export_is_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemo_localize.files.export.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            export(source, NEURONS, out, lora=False)
    assert checkpoint_in(out) is None  # though its copy and all that lies beside it are there
    assert {"model.partial", "manifest.json", "delta.safetensors"} <= {path.name for path in out.iterdir()}
    export(source, NEURONS, out, lora=False)
    assert checkpoint_in(out) == out / "model"
    assert {path.name for path in out.iterdir()} == {"delta.json", "delta.safetensors", "manifest.json", "model"}


def test_an_edit_that_was_interrupted_after_its_last_file_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    neurons = tmp_path / "neurons.json"
    neurons.write_text(json.dumps(NEURONS.to_json()))
    tokens = ["export", str(source), str(neurons), "--no-lora", "--json", "--out", str(tmp_path / "run")]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            cli.app(tokens)
    assert cli.app(tokens) == 0
    assert json.loads(capsys.readouterr().out)["num_neurons"] == len(NEURONS)


def test_quantised_files_are_refused(source: Path, tmp_path: Path):
    folder = tmp_path / "pipeline"
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {f"{FIRST}.weight": tensors[f"{FIRST}.weight"].to(torch.int8)}, folder / WEIGHTS)
    with pytest.raises(IncompatibleModelError, match="quantised"):
        export(folder, NEURONS, tmp_path / "out")


def test_value_sites_name_what_is_exported(model: DiffusionModel):
    assert {FIRST, MIDDLE} == {site.module for site in value_sites(model.backbone).sites}
