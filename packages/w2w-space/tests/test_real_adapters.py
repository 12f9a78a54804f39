"""Adapters as peft and diffusers themselves write them: read, kept, written, and shown by both with one effect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffcore.adapters import read_adapter
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from w2w_space.files.export import export_point
from w2w_space.files.importing import import_adapters
from w2w_space.files.population import PopulationFolder
from w2w_space.space import Point, WeightSpace

TARGETS = ["to_q", "to_v"]
ALPHA = 27.0


def settings(**changes: Any) -> LoraConfig:
    return LoraConfig(
        **({"r": 1, "lora_alpha": ALPHA, "target_modules": TARGETS, "init_lora_weights": False} | changes)
    )


def trained(seed: int, config: LoraConfig) -> Any:
    """Returns a pipeline whose U-Net has an adapter that is not zero, as after training."""
    pipe = tiny.pipeline("sd15")
    torch.manual_seed(seed)
    pipe.unet.add_adapter(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    return pipe


def output(unet: Any) -> torch.Tensor:
    x, t, cond = tiny.inputs("sd15")
    with torch.no_grad():
        return unet(x, t, **cond).sample


def by_diffusers(pipe: Any, folder: Path) -> Path:
    from diffusers.utils import convert_state_dict_to_diffusers

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    config = pipe.unet.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


def by_the_unet(pipe: Any, folder: Path) -> Path:
    """Keys without a prefix, which `load_lora_weights` ignores."""
    pipe.unet.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def by_peft(pipe: Any, folder: Path) -> Path:
    """A folder of `PeftModel.save_pretrained`, of the same numbers."""
    state = get_peft_model_state_dict(pipe.unet)
    model = get_peft_model(tiny.pipeline("sd15").unet, pipe.unet.peft_config["default"])
    wanted = {name.replace("base_model.model.", ""): name for name in get_peft_model_state_dict(model)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = name.replace("base_model.model.", "").replace(".default", "")
            if key in wanted:
                parameter.copy_(state[key])
    model.save_pretrained(str(folder))
    return folder


def by_the_authors(pipe: Any, folder: Path) -> Path:
    """PEFT's folder with the adapter's name left in the keys, which the authors' code writes."""
    by_peft(pipe, folder)
    weights = folder / "adapter_model.safetensors"
    state = {key.replace(".weight", ".identity1.weight"): value for key, value in load_file(weights).items()}
    save_file(state, weights)
    return folder


WRITERS: dict[str, Callable[[Any, Path], Path]] = {
    "diffusers": by_diffusers,
    "unprefixed": by_the_unet,
    "peft": by_peft,
    "authors": by_the_authors,
}
CONFIGS = {
    "rank 1": settings(),
    "rsLoRA": settings(r=4, lora_alpha=8.0, use_rslora=True),
    "mixed ranks": settings(r=2, rank_pattern={"attn1.to_q": 4}, alpha_pattern={"attn1.to_q": 108.0}),
}


def member(path: Path, folder: Path) -> PopulationFolder:
    """Returns a population with this adapter, brought to the largest rank, so that nothing is lost."""
    base = from_pipeline(tiny.pipeline("sd15")).adapter_base
    return import_adapters(folder, [path], base, rank=4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("writer", WRITERS)
def test_the_member_shows_what_its_trainer_showed(tmp_path: Path, writer: str, config: str):
    """Compares the U-Net of the library that wrote the adapter, and ours with the vector of a population."""
    pipe = trained(0, CONFIGS[config])
    theirs = output(pipe.unet)
    found = member(WRITERS[writer](pipe, tmp_path / "lora"), tmp_path / "pop")
    assert found.names == ("lora",)
    model = from_pipeline(tiny.pipeline("sd15"))
    adapter = found.layout.adapter(found.rows([0])[0])
    ours = output(model.with_adapter(adapter).backbone)
    effect = float((theirs - output(model.backbone)).abs().max())
    assert effect > 1e-3
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_space_of_real_adapters_gives_them_back_to_diffusers(
    tmp_path: Path, format: Any, dtype: Any, tolerance: float
):
    """From files with alpha 27 to a space, to a member's point, to a file, to plain `load_lora_weights`."""
    base = from_pipeline(tiny.pipeline("sd15")).adapter_base
    paths, outputs = [], []
    for seed, writer in enumerate(("diffusers", "unprefixed", "peft", "authors")):
        pipe = trained(seed, settings())
        paths.append(WRITERS[writer](pipe, tmp_path / f"lora{seed}"))
        outputs.append(output(pipe.unet))
    found = import_adapters(tmp_path / "pop", paths, base)
    assert (len(found), found.layout.rank) == (4, 1)
    space = WeightSpace.build(found.population())
    before = output(tiny.pipeline("sd15").unet)
    for seed in (0, 3):
        path = tmp_path / f"back{seed}.safetensors"
        export_point(space.member(f"lora{seed}"), path, format=format, dtype=dtype)
        pipe = tiny.pipeline("sd15")
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
        shown = output(pipe.unet)
        assert float((outputs[seed] - before).abs().max()) > 20 * tolerance * float(before.abs().max())
        assert float((shown - outputs[seed]).abs().max()) < tolerance * float(outputs[seed].abs().max())


def test_files_of_diffusers_that_were_loaded_and_saved_again_are_read(tmp_path: Path):
    """diffusers keeps mixed ranks under anchored patterns on saving again."""
    pipe = trained(0, CONFIGS["mixed ranks"])
    first = by_diffusers(pipe, tmp_path / "first")
    again = tiny.pipeline("sd15")
    again.load_lora_weights(first.parent)
    name = next(iter(again.unet.peft_config))
    from diffusers.utils import convert_state_dict_to_diffusers

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(again.unet, adapter_name=name))
    config = again.unet.peft_config[name].to_dict()
    type(again).save_lora_weights(tmp_path / "again", unet_lora_layers=state, unet_lora_adapter_metadata=config)
    base = from_pipeline(tiny.pipeline("sd15")).adapter_base
    one = read_adapter(first, base)
    other = read_adapter(tmp_path / "again" / "pytorch_lora_weights.safetensors", base)
    assert all(change.relative_error(other.modules[name]) < 1e-6 for name, change in one.modules.items())


def test_other_methods_are_refused_by_name_and_skipped(tmp_path: Path):
    """LoHa and LoKr of peft itself, and DoRA of peft, beside two that can be read."""
    from peft import LoHaConfig, LoKrConfig

    good = [by_diffusers(trained(seed, settings()), tmp_path / f"good{seed}") for seed in range(2)]
    wrong = []
    for name, config in (
        ("LoHa", LoHaConfig(r=2, target_modules=TARGETS)),
        ("LoKr", LoKrConfig(r=2, target_modules=TARGETS)),
        ("DoRA", settings(use_dora=True)),
    ):
        get_peft_model(tiny.pipeline("sd15").unet, config).save_pretrained(str(tmp_path / name))
        wrong.append(tmp_path / name)
    base = from_pipeline(tiny.pipeline("sd15")).adapter_base
    found = import_adapters(tmp_path / "pop", [*wrong, *good], base)
    assert found.names == ("good0", "good1")
    reasons = {Path(line.source).name: line.reason for line in found.skipped}
    assert set(reasons) == {"LoHa", "LoKr", "DoRA"}
    for name, reason in reasons.items():
        assert name in reason.removeprefix(str(tmp_path / name)), reason
        assert "not supported" in reason


def test_the_header_says_one_strength_to_all(tmp_path: Path):
    """Both readings of alpha agree: the header's, and the rank that tools take where they read no header."""
    found = member(by_diffusers(trained(0, settings()), tmp_path / "lora"), tmp_path / "pop")
    matrix = found.rows([0]) * torch.tensor([[1.0], [1.1], [0.9]])
    from w2w_space.population import Population, Stacked

    space = WeightSpace.build(Population(found.layout, ("a", "b", "c"), Stacked(matrix)), scaling="none")
    path = export_point(Point(space, torch.zeros(space.num_components)), tmp_path / "out.safetensors").path
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        assert not [key for key in file.keys() if key.endswith("alpha")]  # noqa: SIM118
    assert told["unet.r"] == told["unet.lora_alpha"] == 4
    assert not told["unet.rank_pattern"]
