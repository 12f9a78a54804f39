"""Single files as other tools spell them hold the same weights; other models are called what they are."""

import json
import re
import shutil
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.checkpoint import inspect_model, ldm
from diffcore.checkpoint.describe import describe
from diffcore.checkpoint.folders import inspect_configs
from diffcore.checkpoint.stored import stored_in
from diffcore.errors import IncompatibleModelError
from diffcore.io.tensorfile import read_header
from diffcore.models import load
from diffcore.models.build import build
from diffcore.models.singlefile import parts_of
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.checkpoints import single_file
from diffcore.testing.spellings import SPELLINGS

CPU = Runtime(device="cpu")
WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 32}
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Pipelines and their folders; each made once."""
    made = {}

    def get(family: str):
        if family not in made:
            pipeline = tiny.pipeline(family, width=WIDTHS[family])
            folder = tmp_path_factory.mktemp("like") / family
            pipeline.save_pretrained(folder)
            made[family] = pipeline, folder
        return made[family]

    return get


def shapes_of(file):
    return {name: entry.shape for name, entry in read_header(file).tensors.items()}


@pytest.fixture(scope="module")
def usual_shapes(saved, tmp_path_factory):
    """Shapes in a family's own spelling; each file written once."""
    folder = tmp_path_factory.mktemp("usual")
    return cache(lambda family: shapes_of(single_file(saved(family)[0], folder / f"{family}.safetensors", family)))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_holds_the_same_weights(tmp_path, saved, usual_shapes, spelling):
    family, change = SPELLINGS[spelling]
    pipeline, folder = saved(family)
    usual = usual_shapes(family)
    file = single_file(pipeline, tmp_path / "m.safetensors", family, change=change)
    different = [name for name, shape in shapes_of(file).items() if usual.get(name) != shape]
    assert different
    components = inspect_configs(folder).components
    parts = parts_of(stored_in([read_header(file)], file), family)
    assert parts.keys() == {name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in components}
    if not different[0].startswith(UNET):
        del parts["unet"]
    for part, stored in parts.items():
        naming = partial(ldm.component_names, family, part)
        options = {"dtype": torch.float32, "device": torch.device("cpu"), "leftovers": ldm.HARMLESS}
        found = build(components[part], stored, naming, **options).state_dict()
        state = getattr(pipeline, part).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_projection_is_turned_by_its_name_alone(tmp_path, saved):
    pipeline, folder = saved("sdxl")
    weight = pipeline.text_encoder_2.text_projection.weight
    assert not torch.equal(weight[:, :32], weight[:, :32].T)
    key = "conditioner.embedders.1.model.text_projection"
    file = single_file(pipeline, tmp_path / "m.safetensors", "sdxl")
    assert torch.equal(load_file(file)[key], weight.T)
    assert torch.equal(load(file, CPU, like=folder).modules["text_encoder_2"].text_projection.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_eight_bit_floats_are_weights(tmp_path, saved, dtype):
    pipeline, folder = saved("sd15")
    file = single_file(
        pipeline,
        tmp_path / "m.safetensors",
        "sd15",
        change=lambda state: {name: t.to(dtype) if name.startswith(UNET) else t for name, t in state.items()},
    )
    assert "F8_E" in describe(inspect_model(file))["precision"]
    found = load(file, CPU, like=folder).backbone.state_dict()
    assert all(torch.equal(found[name], t.to(dtype).float()) for name, t in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(
    "marker",
    [
        f"{UNET}input_blocks.1.1.proj_in.scale_weight",
        f"{UNET}input_blocks.1.1.proj_in.weight_scale",
        f"{UNET}input_blocks.1.1.proj_in.comfy_quant",
        "scaled_fp8",
        f"{UNET}out.2.weight.absmax",
        f"{UNET}out.2.weight.quant_state.bitsandbytes__nf4",
        f"{UNET}out.2.SCB",
    ],
)
def test_numbers_that_must_be_scaled_are_refused_with_the_tensor_named(tmp_path, saved, marker):
    pipeline, folder = saved("sd15")
    file = single_file(pipeline, tmp_path / "m.safetensors", "sd15", change=lambda s: s | {marker: torch.ones(1)})
    told = rf"is quantised \('{re.escape(marker)}' of F32 says how\).*use the weights it was made from"
    with pytest.raises(IncompatibleModelError, match=told):
        load(file, CPU, like=folder)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {marker: torch.ones(1)}, weights)
    with pytest.raises(IncompatibleModelError, match=told):
        inspect_model(tmp_path / "unet")


def test_a_precision_that_is_not_read_is_named_and_no_copy_is_asked_for(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.ones(4, dtype=torch.uint8)}, path)
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"F4"'))
    with pytest.raises(IncompatibleModelError, match=r"dtype F4; weights are read in .*F16, BF16") as caught:
        inspect_model(path)
    assert "clean copy" not in str(caught.value)


FIRST = {f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3)}
CROSS = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LABELS = f"{UNET}label_emb.0.0.weight"
SMALL = FIRST | {LABELS: (8, 2816), f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (4, 2048)}
FOREIGN = {
    "depth": ({f"{UNET}input_blocks.0.0.weight": (8, 5, 3, 3)}, "takes 5 input channels: a depth-to-image model"),
    "upscaler": ({f"{UNET}input_blocks.0.0.weight": (8, 7, 3, 3)}, "takes 7 input channels: an upscaler"),
    "editing": ({f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3)}, "takes 8 input channels: an editing"),
    "bare inpainting": ({"input_blocks.0.0.weight": (8, 9, 3, 3)}, "takes 9 input channels: an inpainting model"),
    "unCLIP": (FIRST | {CROSS: (4, 1024), LABELS: (8, 1536)}, "is Stable unCLIP, which sees an image"),
    "labels": (FIRST | {CROSS: (4, 768), LABELS: (8, 640)}, "is a model that takes labels"),
    "SSD-1B": (SMALL | {f"{UNET}input_blocks.8.1.transformer_blocks.3.attn2.to_k.weight": (4, 2048)}, "a smaller SDXL"),
    "Koala": (
        FIRST | {LABELS: (8, 2816)},
        "is a smaller SDXL (SSD-1B, Vega, Koala or alike)",
    ),
    "refiner": (FIRST | {LABELS: (8, 2560)}, "is an SDXL refiner"),
    "ControlNet": (FIRST | {"control_model.time_embed.0.weight": (4, 4)}, "is a ControlNet with its model"),
    "video": (FIRST | {f"{UNET}input_blocks.1.0.time_stack.in_layers.2.weight": (4, 4)}, "is a video model"),
    "Stable Cascade": ({"clip_txt_mapper.weight": (4, 4)}, "is a single file of Stable Cascade"),
    "Wan": ({f"{UNET}head.modulation": (1, 2, 4)}, "is a single file of Wan"),
    "autoencoder": ({"first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3)}, "is an autoencoder without its model"),
    "EMA alone": (
        {"model_ema.diffusion_modelout2bias": (4,), "first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3)},
        "is the averaged weights (EMA) of a network alone",
    ),
    "text encoder": ({"text_model.final_layer_norm.weight": (4,)}, "is a text encoder without its model"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_models_are_called_what_they_are(tmp_path, name):
    shapes, told = FOREIGN[name]
    file = tmp_path / "model.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(IncompatibleModelError, match=re.escape(told)) as caught:
        inspect_model(file)
    assert "copy" not in str(caught.value)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "DPMSolverSDEScheduler", "FlowMatchLCMScheduler"])
def test_a_folder_with_another_scheduler_is_not_called_damaged(tmp_path, saved, name):
    _, folder = saved("sd15")
    folder = shutil.copytree(folder, tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    with pytest.raises(IncompatibleModelError, match=f"{name} for scheduler.*save the pipeline with another scheduler"):
        inspect_model(folder)


def test_a_text_encoder_with_parts_that_nothing_uses_is_read(tmp_path, saved):
    pipeline, folder = saved("sd15")
    folder = shutil.copytree(folder, tmp_path / "m")
    weights = folder / "text_encoder" / "model.safetensors"
    names = ("logit_scale", "text_projection.weight", "visual_projection.weight", "vision_model.post_layernorm.bias")
    save_file(load_file(weights) | {name: torch.ones(2, 2) for name in names}, weights)
    found = load(folder, CPU).modules["text_encoder"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in pipeline.text_encoder.state_dict().items())


def test_tensors_that_no_family_has_are_named(tmp_path, saved):
    pipeline, folder = saved("sd15")
    stranger = {"cc_projection.bias": torch.ones(2)}
    file = single_file(pipeline, tmp_path / "m.safetensors", "sd15", change=lambda state: state | stranger)
    told = r"holds 1 tensors that no sd15 has, such as 'cc_projection\.bias'"
    with pytest.raises(IncompatibleModelError, match=told):
        load(file, CPU, like=folder)
