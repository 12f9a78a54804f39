"""Names of tensors as sd-scripts of kohya publishes them, on the real architectures of SD 1.5 and SDXL.

The trainer tells how many modules it changes: 192 and 72 for SD 1.5; 722, and 264 in two text encoders, for SDXL.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffcore.adapters import Base, read_adapter, write_adapter
from diffcore.adapters.keys import BACKBONE, parse_key
from diffcore.errors import IncompatibleModelError
from diffcore.io.strictjson import StrictError
from diffcore.models.bases import family_base
from w2w_space.files.importing import import_adapters

BLOCK = [f"attn{number}_to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out_0")]
BLOCK += ["ff_net_0_proj", "ff_net_2"]
LAYER = [*(f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]


def transformer(stem: str, depth: int) -> Iterator[str]:
    yield from (f"{stem}_proj_in", f"{stem}_proj_out")
    yield from (f"{stem}_transformer_blocks_{block}_{part}" for block in range(depth) for part in BLOCK)


def sd15() -> dict[str, str]:
    """Returns the names of SD 1.5, and those of diffusers that they are, dots as underscores."""
    places = [f"down_blocks_{level}_attentions_{index}" for level in range(3) for index in range(2)]
    places += ["mid_block_attentions_0"]
    places += [f"up_blocks_{level}_attentions_{index}" for level in range(1, 4) for index in range(3)]
    return {f"lora_unet_{name}": name for place in places for name in transformer(place, 1)}


def sdxl() -> dict[str, str]:
    """Returns the names of SDXL, those of the original checkpoint, and those of diffusers that they are."""
    places = {
        "input_blocks_4_1": ("down_blocks_1_attentions_0", 2),
        "input_blocks_5_1": ("down_blocks_1_attentions_1", 2),
        "input_blocks_7_1": ("down_blocks_2_attentions_0", 10),
        "input_blocks_8_1": ("down_blocks_2_attentions_1", 10),
        "middle_block_1": ("mid_block_attentions_0", 10),
        "output_blocks_0_1": ("up_blocks_0_attentions_0", 10),
        "output_blocks_1_1": ("up_blocks_0_attentions_1", 10),
        "output_blocks_2_1": ("up_blocks_0_attentions_2", 10),
        "output_blocks_3_1": ("up_blocks_1_attentions_0", 2),
        "output_blocks_4_1": ("up_blocks_1_attentions_1", 2),
        "output_blocks_5_1": ("up_blocks_1_attentions_2", 2),
    }
    return {
        f"lora_unet_{name}": other
        for theirs, (ours, depth) in places.items()
        for name, other in zip(transformer(theirs, depth), transformer(ours, depth), strict=True)
    }


def layers(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_text_model_encoder_layers_{layer}_{part}" for layer in range(count) for part in LAYER]


NAMES = {
    "sd15": (sd15(), layers("lora_te", 12)),
    "sdxl": (sdxl(), [*layers("lora_te1", 12), *layers("lora_te2", 32)]),
}


def kind(key: str, base: Base) -> str:
    """Returns what becomes of a tensor."""
    try:
        parsed = parse_key(key)
    except StrictError as error:
        return "unsupported" if "not supported" in str(error) else "unknown"
    if base.find(parsed.component, parsed.module) is None:
        return "unknown"
    return "used" if base.component(parsed.component) == BACKBONE else "text encoder"


@pytest.fixture(scope="module", params=NAMES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a family, and a file with all of its tensors at rank 1 and alpha 0.5."""
    family: str = request.param
    base, g, tensors = family_base(family), torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name in (*NAMES[family][0], *NAMES[family][1]):
        key = parse_key(f"{name}.lora_down.weight")
        module = base.find(key.component, key.module)
        assert module is not None, name
        outputs, inputs, *kernel = base.shapes[base.component(key.component)][module]
        tensors[f"{name}.lora_down.weight"] = torch.randn(1, inputs, *kernel, generator=g).half()
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 1, *kernel, generator=g).half()
        tensors[f"{name}.alpha"] = torch.tensor(0.5)
    path = tmp_path_factory.mktemp(family) / "published.safetensors"
    save_file(tensors, path)
    return family, path


def test_every_name_has_its_place(published: tuple[str, Path]):
    family, path = published
    base, (unet, text) = family_base(family), NAMES[family]
    assert (len(unet), len(text)) == {"sd15": (192, 72), "sdxl": (722, 264)}[family]
    kinds = {key: kind(key, base) for key in load_file(path)}
    assert {key.partition(".")[0] for key, found in kinds.items() if found == "used"} == set(unet)
    assert {key.partition(".")[0] for key, found in kinds.items() if found == "text encoder"} == set(text)
    for name, module in unet.items():
        found = base.find(BACKBONE, name.removeprefix("lora_unet_"))
        assert found is not None
        assert found.replace(".", "_") == module
    shapes = base.shapes[BACKBONE]
    wanted = {"sd15": (768, 4), "sdxl": (2048, 2)}[family]  # the prompt's width, and the sides of proj_in's weight
    some = "down_blocks.1.attentions.0"
    assert shapes[f"{some}.transformer_blocks.0.attn2.to_k"][1] == wanted[0]
    assert len(shapes[f"{some}.proj_in"]) == wanted[1]


def test_what_is_read_is_written_under_the_same_names(published: tuple[str, Path], tmp_path: Path):
    family, path = published
    base = family_base(family)
    adapter = read_adapter(path, base)
    assert len(adapter.modules) == len(NAMES[family][0])
    assert sum(map(len, adapter.text_encoders.values())) == len(NAMES[family][1])
    written = write_adapter(adapter, tmp_path / "a.safetensors", format="kohya", base=base)
    before, after = load_file(path), load_file(written)
    assert {key: tensor.shape for key, tensor in after.items()} == {key: t.shape for key, t in before.items()}
    again = read_adapter(written, base)
    for component, changes in adapter.components.items():
        for module in list(changes)[::40]:
            assert changes[module].relative_error(again.components[component][module]) < 1e-3, module


def test_a_population_takes_the_network_and_tells_of_the_rest(published: tuple[str, Path], tmp_path: Path):
    family, path = published
    found = import_adapters(tmp_path / "pop", [path], family_base(family))
    convolutions = 32 if family == "sd15" else 0  # proj_in and proj_out
    assert len(found.layout.modules) == len(NAMES[family][0]) - convolutions
    told = "text_encoder" if family == "sd15" else "text_encoder, text_encoder_2"
    assert any(f"changes of {told} are left out" in note for note in found.members[0].notes)


@pytest.mark.parametrize(
    ("family", "key", "wanted"),
    [
        ("sd15", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj.hada_w1_a", "unsupported"),
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj.lokr_w1", "unsupported"),
        ("sdxl", "lora_unet_middle_block_1_proj_in.dora_scale", "unsupported"),
        ("sdxl", "lora_unet_output_blocks_2_0_in_layers_2.lora_mid.weight", "unsupported"),
        ("sdxl", "lora_unet_output_blocks_2_0_in_layers_2.lora_down.weight", "used"),
        ("sdxl", "lora_unet_input_blocks_4_0_emb_layers_1.lora_up.weight", "used"),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "used"),
        ("sd15", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        # No attention is in these blocks; SD 1.5 is published under the names of diffusers.
        ("sd15", "lora_unet_down_blocks_3_attentions_0_proj_in.lora_down.weight", "unknown"),
        ("sdxl", "lora_unet_input_blocks_2_1_proj_in.lora_down.weight", "unknown"),
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_2_attn1_to_q.lora_down.weight", "unknown"),
        ("sdxl", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "unknown"),
        ("sdxl", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "unknown"),
        ("sd15", "lora_te_text_model_encoder_layers_12_mlp_fc1.lora_down.weight", "unknown"),
    ],
)
def test_names_of_other_methods_and_models_are_told(tmp_path: Path, family: str, key: str, wanted: str):
    base = family_base(family)
    assert kind(key, base) == wanted
    if wanted in ("unknown", "unsupported"):
        name = next(iter(NAMES[family][0]))
        module = base.find(BACKBONE, name.removeprefix("lora_unet_"))
        assert module is not None
        outputs, inputs, *kernel = base.shapes[BACKBONE][module]
        good = {f"{name}.lora_down.weight": torch.ones(1, inputs, *kernel)}
        good[f"{name}.lora_up.weight"] = torch.ones(outputs, 1, *kernel)
        other = {key.replace("lora_down", part): torch.ones(2, 2) for part in ("lora_down", "lora_up")}
        save_file(good | other, tmp_path / "a.safetensors")
        with pytest.raises(IncompatibleModelError) as told:
            read_adapter(tmp_path / "a.safetensors", base)
        assert key.partition(".")[0].removeprefix("lora_unet_").removeprefix("lora_te_") in str(told.value)
