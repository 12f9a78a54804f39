"""Names of tensors as published LoRA files have them: each finds its place in the network of real size."""

from collections import Counter

import pytest

from diffcore.adapters import scan_adapter
from diffcore.adapters.read import place
from diffcore.errors import IncompatibleModelError
from diffcore.models.bases import FAMILIES, base_for, base_of, families_of, family_base, misfit
from diffcore.testing import tiny
from diffcore.testing.adapter_keys import FOLDER, fitting_shapes, published, write_hollow

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
EXPECTED = {  # modules of backbone and text encoders, as today's classes count them
    "kohya-sd15": (192, 72, 0),
    "kohya-sd15-original-names": (192, 0, 0),
    "kohya-sdxl": (722, 72, 192),
    "locon-sdxl": (788, 0, 0),
    "diffusers-sdxl-processors": (560, 0, 0),
    "diffusers-sd15": (128, 48, 0),
    "peft-sd15-lcm": (278, 0, 0),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_finds_its_place(tmp_path, name):
    listing = published(name)
    base = family_base(listing["base"])
    assert set(listing["seen"]) <= set(listing["keys"])
    path = write_hollow(fitting_shapes(listing["keys"], base, listing["rank"]), tmp_path / "a.safetensors")
    found = scan_adapter(path)
    assert found.layout == listing["layout"]
    places = place(found, base)
    counts = Counter(pair.component for pair in places)
    assert (counts["backbone"], counts["text_encoder"], counts["text_encoder_2"]) == EXPECTED[name]
    assert all(counts[part] == count for part, count in listing["published_counts"].items())
    assert len({(pair.component, module) for pair, module in places.items()}) == len(places)
    assert [fit.name for fit in families_of(found)] == [listing["base"]]
    assert base_for(found, None) is base
    others = [family for family in FAMILIES if family != listing["base"]]
    assert all(misfit(found, family_base(other)) is not None for other in others)


def test_locon_covers_all_but_the_ends_of_the_network():
    listing = published("locon-sdxl")
    base = family_base("sdxl")
    from diffcore.adapters.keys import parse_key

    covered = {base.find("backbone", parse_key(key).module) for key in listing["keys"]}
    assert set(base.shapes["backbone"]) - covered == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
    }


def test_a_foreign_network_is_told_apart(tmp_path):
    keys = {
        f"transformer.single_transformer_blocks.0.attn.to_q.lora_{side}.weight": shape
        for side, shape in (("A", (4, 3072)), ("B", (3072, 4)))
    }
    found = scan_adapter(write_hollow(keys, tmp_path / "a.safetensors"))
    assert families_of(found) == []
    with pytest.raises(IncompatibleModelError, match="fits none of sd15, sd21, sdxl; name its base model"):
        base_for(found, None)


def test_kohyas_names_of_flux_are_refused(tmp_path):
    """Its fused projections would have to be parted, which is not done: no part of such a file is applied."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    keys = {f"{stem}.lora_down.weight": (4, 32), f"{stem}.lora_up.weight": (96, 4), f"{stem}.alpha": ()}
    found = scan_adapter(write_hollow(keys, tmp_path / "a.safetensors"))
    with pytest.raises(IncompatibleModelError, match="holds nothing that fits flux: it changes '"):
        place(found, base_of("flux", {}, tiny.backbone("flux")))
    with pytest.raises(IncompatibleModelError, match="fits none of sd15, sd21, sdxl"):
        base_for(found, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_a_family_are_not_ambiguous(family):
    base = family_base(family)
    assert all(None not in aliases.values() for aliases in base._aliases.values())
    assert set(base.original) == set(base.shapes["backbone"])
    assert len(set(base.original.values())) == len(base.original)
