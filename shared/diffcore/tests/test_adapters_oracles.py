"""Adapters against the libraries that everybody uses: what diffusers and PEFT make of a file is what we make of it."""

import json
import warnings

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from diffcore.adapters import Adapter, LowRank, fuse, read_adapter, write_adapter
from diffcore.models import backbone_call, load
from diffcore.models.bases import base_of
from diffcore.runtime import Runtime
from diffcore.testing import tiny

diffusers_logging.set_verbosity_error()
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
IDS = torch.arange(7)[None]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny.pipeline(request.param).save_pretrained(folder)
    return load(folder, Runtime(device="cpu"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "unet"
    tiny.backbone("sd15").save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(folder, Runtime(device="cpu"))


def output(name: str, network) -> torch.Tensor:
    x_t, t, cond = tiny.inputs(name)
    text = cond.pop("encoder_hidden_states")
    with torch.no_grad():
        return network(x_t, t, encoder_hidden_states=text, added_cond_kwargs=cond).sample


def random_change(shape: tuple[int, ...], rank: int, alpha: float, seed: int, dtype=torch.float32) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    down = 0.1 * torch.randn(rank, *shape[1:], generator=g)
    return LowRank(down.to(dtype), (0.1 * torch.randn(shape[0], rank, generator=g)).to(dtype), alpha)


def mixed_adapter(
    base, *, text: bool = True, ranks=(2, 3, 1), alphas=(5.0, -2.0, 27.0), dtype=torch.float32
) -> Adapter:
    def of(component: str, wanted: tuple[str, ...]) -> dict[str, LowRank]:
        names = [name for name in base.shapes[component] if any(part in name for part in wanted)]
        return {
            name: random_change(base.shapes[component][name], ranks[i % 3], alphas[i % 3], i, dtype)
            for i, name in enumerate(names)
        }

    texts = [name for name in base.shapes if name != "backbone"] if text else []
    return Adapter(of("backbone", ATTENTION), {name: of(name, ("self_attn", "mlp")) for name in texts})


@pytest.mark.parametrize(
    ("model", "format", "dtype"),
    [
        ("sd15", "diffusers", None),
        ("sd15", "diffusers", torch.bfloat16),
        ("sd15", "kohya", torch.float16),
        ("sdxl", "diffusers", None),
        ("sdxl", "kohya", None),
    ],
    indirect=["model"],
    ids=str,
)
def test_plain_diffusers_reads_what_we_write_as_we_do(model, tmp_path, format, dtype):
    name = "sdxl" if "text_encoder_2" in model.modules else "sd15"
    adapter = mixed_adapter(model.adapter_base)
    path = write_adapter(adapter, tmp_path / "a.safetensors", format=format, dtype=dtype, base=model.adapter_base)
    ours = model.with_adapter(path)
    assert {t.dtype for key, t in load_file(path).items() if not key.endswith(".alpha")} == {dtype or torch.float32}
    theirs = tiny.pipeline(name)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    torch.testing.assert_close(output(name, ours.backbone), output(name, theirs.unet), atol=1e-5, rtol=1e-5)
    effect = output(name, ours.backbone) - output(name, model.backbone)
    assert effect.abs().max() > 0.1
    for part in adapter.text_encoders:
        with torch.no_grad():
            live = getattr(theirs, part)(IDS).last_hidden_state
            fused, plain = (m.modules[part](IDS).last_hidden_state for m in (ours, model))
        torch.testing.assert_close(fused, live, atol=1e-5, rtol=1e-5)
        assert (fused - plain).abs().max() > 0.1
    if dtype is None:  # folding strengths and padding ranks changed nothing
        exact = model.with_adapter(adapter)
        torch.testing.assert_close(output(name, ours.backbone), output(name, exact.backbone), atol=1e-5, rtol=1e-5)


def test_peft_reads_what_we_write_as_we_do(unet, tmp_path):
    adapter = mixed_adapter(unet.adapter_base, text=False)
    folder = write_adapter(adapter, tmp_path / "peft", format="peft")
    ours = output("sd15", unet.with_adapter(folder).backbone)
    theirs = PeftModel.from_pretrained(tiny.backbone("sd15"), str(folder))
    torch.testing.assert_close(ours, output("sd15", theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, output("sd15", unet.with_adapter(adapter).backbone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_take_adapters_as_well(tmp_path, name):
    network = tiny.backbone(name)
    base = base_of(name, {}, network)
    names = [module for module in base.shapes["backbone"] if ".attn." in module or ".ff" in module]
    changes = {module: random_change(base.shapes["backbone"][module], 2, 3.0, i) for i, module in enumerate(names)}
    path = write_adapter(Adapter(changes, backbone="transformer"), tmp_path / "a.safetensors")
    theirs = tiny.backbone(name)
    theirs.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="transformer")
    read = read_adapter(path, base)
    assert (read.backbone, sorted(read.modules)) == ("transformer", sorted(names))
    x_t, t, cond = tiny.inputs(name)
    call = backbone_call(network)
    with torch.no_grad():
        plain, ours, live = (call(n, x_t, t, cond) for n in (network, fuse(network, read.modules), theirs))
    torch.testing.assert_close(ours, live, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


CONFIGS = {
    "rank is not alpha": {"r": 3, "lora_alpha": 5},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {"attn2.to_q": 3, "to_v": 1}, "alpha_pattern": {"to_k": 27}},
    "root scaled": {"r": 4, "lora_alpha": 3, "use_rslora": True, "init_lora_weights": "gaussian"},
    "convolutions": {"r": 2, "lora_alpha": 3, "target_modules": ["conv1", "conv_shortcut", "proj_in", "time_emb_proj"]},
}


def filled(network) -> None:
    """Gives PEFT's layers, which begin as no change, random numbers."""
    g = torch.Generator().manual_seed(7)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=g)


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_what_peft_and_diffusers_write_as_they_do(unet, tmp_path, name):
    settings = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], **CONFIGS[name]}
    theirs = get_peft_model(tiny.backbone("sd15"), LoraConfig(**settings))
    filled(theirs)
    live = output("sd15", theirs)
    theirs.save_pretrained(tmp_path / "peft")
    torch.testing.assert_close(
        output("sd15", unet.with_adapter(tmp_path / "peft").backbone), live, atol=1e-5, rtol=1e-5
    )
    assert (live - output("sd15", unet.backbone)).abs().max() > 0.05

    other = tiny.backbone("sd15")
    other.add_adapter(LoraConfig(**settings))
    filled(other)
    other.save_lora_adapter(tmp_path / "bare")
    from_bare = unet.with_adapter(tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(output("sd15", from_bare.backbone), output("sd15", other), atol=1e-5, rtol=1e-5)

    # As the authors of w2w export them: the adapter's name stays between lora_A and weight.
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    named = {key.replace(".weight", ".identity1.weight"): tensor for key, tensor in state.items()}
    save_file(named, tmp_path / "peft" / "adapter_model.safetensors")
    torch.testing.assert_close(
        output("sd15", unet.with_adapter(tmp_path / "peft").backbone), live, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
@pytest.mark.parametrize("old", ["new keys", "lora.down keys", "processor keys"])
def test_an_alpha_that_diffusers_cannot_know_is_the_rank_for_us_too(model, tmp_path, old):
    """Without its entry in the header diffusers takes alpha = rank, whatever was trained: so do we, and say so."""
    adapter = mixed_adapter(model.adapter_base, ranks=(2, 2, 2), alphas=(4.0, 4.0, 4.0), text=False)
    modules = {m: c for m, c in adapter.modules.items() if ".to_" in m}
    keys = {}
    for module, change in modules.items():
        stem, _, last = module.rpartition(".to_")
        spelled = {
            "new keys": (f"unet.{module}.lora_A", f"unet.{module}.lora_B"),
            "lora.down keys": (f"unet.{module}.lora.down", f"unet.{module}.lora.up"),
            "processor keys": tuple(
                f"unet.{stem}.processor.to_{last.removesuffix('.0')}_lora.{s}" for s in ("down", "up")
            ),
        }[old]
        keys |= {f"{spelled[0]}.weight": change.down, f"{spelled[1]}.weight": change.up}
    save_file(keys, tmp_path / "a.safetensors")
    theirs = tiny.pipeline("sd15")
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    with pytest.warns(UserWarning, match="does not say the alpha"):
        ours = model.with_adapter(tmp_path / "a.safetensors")
    torch.testing.assert_close(output("sd15", ours.backbone), output("sd15", theirs.unet), atol=1e-5, rtol=1e-5)
    # The strength that was trained is lost in this file ...
    trained = output("sd15", model.with_adapter(Adapter(modules)).backbone)
    assert (trained - output("sd15", ours.backbone)).abs().max() > 0.05
    # ... and kept in the one we write.
    write_adapter(Adapter(modules), tmp_path / "b.safetensors")
    theirs.unload_lora_weights()
    theirs.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    torch.testing.assert_close(trained, output("sd15", theirs.unet), atol=1e-5, rtol=1e-5)


def kohya_file(path, adapter: Adapter, *, names=None, alphas: bool = True, dtype=torch.float32):
    tensors = {}
    prefixes = {"backbone": "lora_unet", "text_encoder": "lora_te"}
    for component, module, change in adapter:
        spelled = (names or {}).get(module, module)
        if component == "text_encoder":
            spelled = f"text_model.{module}"
        stem = f"{prefixes[component]}_{spelled.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = change.down.to(dtype)
        tensors[f"{stem}.lora_up.weight"] = change.up.reshape(*change.up.shape, *(1,) * (change.down.ndim - 2)).to(
            dtype
        )
        if alphas:
            tensors[f"{stem}.alpha"] = torch.tensor(change.alpha, dtype=dtype)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("model", "alphas", "dtype"),
    [("sd15", True, torch.float32), ("sd15", False, torch.bfloat16), ("sdxl", True, torch.float16)],
    indirect=["model"],
    ids=str,
)
def test_kohya_files_mean_to_us_what_they_mean_to_diffusers(model, tmp_path, alphas, dtype):
    name = "sdxl" if "text_encoder_2" in model.modules else "sd15"
    base = model.adapter_base
    adapter = mixed_adapter(base, ranks=(2, 2, 2), alphas=(5.0, 5.0, 5.0), text=name == "sd15")
    names = base.original if name == "sdxl" else None
    path = kohya_file(tmp_path / "a.safetensors", adapter, names=names, alphas=alphas, dtype=dtype)
    theirs = tiny.pipeline(name)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not alphas else "error")
        ours = model.with_adapter(path)
    torch.testing.assert_close(output(name, ours.backbone), output(name, theirs.unet), atol=1e-5, rtol=1e-5)
    read = read_adapter(path, base) if alphas else None
    assert read is None or {change.alpha for _, _, change in read} == {5.0}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_alphas_of_kohya_count_module_by_module_where_diffusers_mixes_them_up(unet, tmp_path):
    """Ranks 2, 3, 1 with alphas of their own: diffusers gives all modules the commonest; the formula is the oracle."""
    adapter = mixed_adapter(unet.adapter_base, alphas=(5.0, 2.0, 27.0), text=False)
    path = kohya_file(tmp_path / "a.safetensors", adapter)
    network = tiny.backbone("sd15")
    for module, change in adapter.modules.items():
        weight = network.get_submodule(module).weight
        product = torch.einsum("or,r...->o...", change.up.double(), change.down.double()) * change.alpha / change.rank
        weight.data = (weight.double() + product).float()
    expected = output("sd15", network)
    torch.testing.assert_close(output("sd15", unet.with_adapter(path).backbone), expected, atol=1e-5, rtol=1e-5)
    theirs = tiny.pipeline("sd15")
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert (output("sd15", theirs.unet) - expected).abs().max() > 0.05
    # Rewritten by us, diffusers agrees.
    write_adapter(read_adapter(path, unet.adapter_base), tmp_path / "b.safetensors", format="kohya")
    theirs.unload_lora_weights()
    theirs.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    torch.testing.assert_close(output("sd15", theirs.unet), expected, atol=1e-5, rtol=1e-5)


def test_convolutions_of_locon_files_count(unet, tmp_path):
    base = unet.adapter_base
    names = ["conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "time_embedding.linear_1"]
    adapter = Adapter({n: random_change(base.shapes["backbone"][n], 2, 3.0, i) for i, n in enumerate(names)})
    for spelled in (None, base.original):
        path = kohya_file(tmp_path / "a.safetensors", adapter, names=spelled)
        read = read_adapter(path, base)
        assert sorted(read.modules) == sorted(names)
        expected = output("sd15", fuse(unet.backbone, adapter.modules))
        torch.testing.assert_close(output("sd15", unet.with_adapter(path).backbone), expected, atol=1e-6, rtol=1e-6)
    folder = write_adapter(adapter, tmp_path / "peft", format="peft")
    theirs = PeftModel.from_pretrained(tiny.backbone("sd15"), str(folder))
    torch.testing.assert_close(output("sd15", theirs), expected, atol=1e-5, rtol=1e-5)


def test_old_and_new_names_of_text_encoders_meet(model, tmp_path):
    base = model.adapter_base
    found = next(name for name in base.shapes["text_encoder"] if name.endswith("q_proj"))
    change = random_change(base.shapes["text_encoder"][found], 2, 2.0, 0)
    level = f"text_model.{found.removeprefix('text_model.')}"
    stem = level.removesuffix(".q_proj")
    for keys in (
        (f"text_encoder.{level}.lora_linear_layer.down.weight", f"text_encoder.{level}.lora_linear_layer.up.weight"),
        (f"text_encoder.{stem}.to_q_lora.down.weight", f"text_encoder.{stem}.to_q_lora.up.weight"),
        (f"text_encoder.{level.removeprefix('text_model.')}.lora_A.weight",) * 2,
    ):
        down, up = keys[0], keys[1].replace("lora_A", "lora_B")
        save_file({down: change.down, up: change.up}, tmp_path / "a.safetensors")
        with pytest.warns(UserWarning, match="does not say"):
            read = read_adapter(tmp_path / "a.safetensors", base)
        assert list(read.text_encoders["text_encoder"]) == [found]
        assert read.modules == {}


def test_settings_in_headers_are_those_of_the_library(tmp_path, unet):
    write_adapter(mixed_adapter(unet.adapter_base, text=False), tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        values = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{name.removeprefix("unet."): value for name, value in values.items()})
    assert config.r == config.lora_alpha == 3
