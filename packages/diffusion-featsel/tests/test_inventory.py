"""The inventory: its counts against the published lists, its names, shapes, costs and places."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore.errors import IncompatibleModelError, NoMatchError
from diffcore.testing import tiny
from diffusion_featsel.activation import Activation
from diffusion_featsel.inventory import Inventory, inventory, inventory_of_config, inventory_of_network, meta_backbone
from diffusion_featsel.names import Name, canonical

Real = Callable[[str], Inventory]


def of_kind(found: Inventory, *kinds: str) -> list[Activation]:
    return [row for row in found if row.kind in kinds]


@pytest.mark.parametrize(
    ("name", "count", "maps", "tflop"),
    [("sd15", 197, 32, 0.803), ("sdxl", 612, 140, 6.761), ("pixart-alpha", 224, 56, None)],
)
def test_published_backbones_have_the_published_number_of_names(
    real_inventory: Real, name: str, count: int, maps: int, tflop: float | None
) -> None:
    found = real_inventory(name)
    assert len(found.paper) == count
    assert sum(row.derived for row in found.paper) == maps
    assert tflop is None or found.flops / 1e12 == pytest.approx(tflop, abs=5e-4)
    names = [row.name for row in found]
    assert len(set(names)) == len(names)


def test_stable_diffusion_2_has_the_names_of_1_5(real_inventory: Real, real_config: Any) -> None:
    at_512 = inventory_of_config(real_config("sd21"), size=(64, 64))
    assert [row.name for row in at_512] == [row.name for row in real_inventory("sd15")]
    assert at_512.flops / 1e12 == pytest.approx(0.804, abs=5e-4)


@pytest.mark.parametrize(("name", "total", "inner", "self_gib"), [("sd15", 278, 88, 1.33), ("sdxl", 2069, 800, 5.47)])
def test_memory_is_as_measured(real_inventory: Real, name: str, total: float, inner: float, self_gib: float) -> None:
    found = real_inventory(name)
    assert sum(row.megabytes for row in found.paper if not row.derived) == pytest.approx(total, abs=0.5)
    assert sum(row.megabytes for row in of_kind(found, "ffn-inner")) == pytest.approx(inner, abs=0.5)
    assert sum(row.megabytes for row in of_kind(found, "self-map")) / 1024 == pytest.approx(self_gib, abs=0.01)


def test_skips_are_other_names(real_inventory: Real) -> None:
    for name, count in (("sd15", 12), ("sdxl", 9)):
        skips = of_kind(real_inventory(name), "skip")
        assert [row.name for row in skips] == [f"skip{number}" for number in range(count)]
        assert skips[0].same_as == "unet-after-conv-in"
        kinds = {real_inventory(name)[row.same_as or ""].kind for row in skips}
        assert kinds == {"after-conv-in", "vit-out", "downsampler-out", "res-out"}
        assert not {row.name for row in skips} & {row.name for row in real_inventory(name).features}


def test_flux_counts_single_blocks_on_and_cuts_their_text(real_inventory: Real) -> None:
    found = real_inventory("flux-dev")
    first_single, last = found["vit-block19-out"], found["vit-block56-out"]
    assert first_single.site.module == "single_transformer_blocks.0"
    assert last.site.module == "single_transformer_blocks.37"
    assert "vit-block57-out" not in found
    assert [found[f"vit-block{block}-q"].num_text for block in (18, 19)] == [0, 512]
    assert found["vit-block19-q"].numbers == found["vit-block18-q"].numbers


@pytest.mark.parametrize("name", tiny.NAMES)
def test_names_sites_and_costs_of_every_class(name: str) -> None:
    backbone = tiny.backbone(name)
    found = inventory(backbone)
    assert len({row.site.key for row in found if row.same_as is None}) == len([r for r in found if r.same_as is None])
    for row in found:
        assert str(Name.parse(row.name)) == row.name
        backbone.get_submodule(row.site.module)
        assert 0 <= row.cost <= 1
    costs = [row.cost for row in found if row.same_as is None and row.kind != "up-cross-map"]
    assert costs == sorted(costs)
    assert found.model_class == type(backbone).__name__


def test_text_is_listed_without_places() -> None:
    found = inventory(tiny.backbone("sd15"))
    text = of_kind(found, "cross-k", "cross-v")
    assert len(text) == 8
    assert all(row.grid is None and row.num_text == 77 and row.name not in found.maps for row in text)
    assert not {row.name for row in text} & {row.name for row in found.features}


def test_as_many_places_as_text_tokens_are_still_places() -> None:
    found = inventory(tiny.backbone("sd15"), size=(14, 22), num_text=77)
    row = found["up-level1-repeat0-vit-block0-self-q"]
    assert (row.grid, row.num_text) == ((14, 22), 0)
    low = inventory(tiny.backbone("sdxl"), size=(14, 22), num_text=77)["mid-vit-block0-cross-q"]
    assert (low.grid, low.num_text) == ((7, 11), 0)


def test_configuration_and_weights_give_the_same_inventory() -> None:
    backbone = tiny.backbone("sdxl")
    config = {**backbone.config, "_class_name": "UNet2DConditionModel"}
    assert inventory_of_config(config) == inventory(backbone) == inventory(tiny.model("sdxl"))
    assert all(parameter.is_meta for parameter in meta_backbone(config).parameters())


def test_old_class_name_of_pixart_is_understood(real_config: Any) -> None:
    assert real_config("pixart-alpha")["_class_name"] == "Transformer2DModel"
    assert type(meta_backbone(real_config("pixart-alpha"))).__name__ == "PixArtTransformer2DModel"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "nothing is no backbone"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL is no backbone"),
        ({"_class_name": "UNet2DConditionModel", "block_out_channels": 3}, "does not build UNet2DConditionModel"),
    ],
)
def test_other_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleModelError, match=message):
        inventory_of_config(config)


def test_unknown_classes_have_names_of_modules() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten())
    with pytest.raises(IncompatibleModelError, match=r"inventory_of_network"):
        inventory(network)
    x = torch.empty(1, 4, 8, 8, device="meta")
    found = inventory_of_network(network, lambda meta: meta(x), size=(8, 8))
    assert [(row.name, row.grid) for row in found] == [("0", (8, 8)), ("1", (8, 8)), ("2", None)]


def test_lookup_by_abbreviation_and_module() -> None:
    found = inventory(tiny.backbone("sd15"))
    wanted = found["up-level1-repeat0-vit-block0-cross-q"]
    for name in ("up1-rep0-vit0-cross-q", "up1-r0-b0-cross-q", "up_level1 repeat0 block0 cross-q", wanted.site.module):
        assert found.named([name]) == [wanted]
    assert found.named(["unet-out", "conv_in:input"]) == [found["unet-out"], found["unet-in"]]
    joint = inventory(tiny.backbone("sd3"))
    assert joint["vit0-self-q"] is joint["vit-block0-q"]


def test_unknown_names_list_the_nearest(real_inventory: Real) -> None:
    with pytest.raises(NoMatchError, match=r"'up-level3-repeat0-res-out'; nearest: up-level\d-repeat0-res-out"):
        real_inventory("sdxl").named(["up-level3-repeat0-res-out"])
    with pytest.raises(NoMatchError, match="encoded image itself"):
        real_inventory("sd15").named("vae-out")
    with pytest.raises(NoMatchError, match="nearest"):
        real_inventory("sd15").match("up-level9-*")


def test_match_keeps_the_order_of_execution() -> None:
    found = inventory(tiny.backbone("sd15"))
    names = [row.name for row in found.match(["up-*-res-out", "down-*-res-out", "mid-vit-out"])]
    order = [row.name for row in found]
    assert names == sorted(names, key=order.index)
    assert len(names) == 7


def test_rows_say_which_presets_and_filters_keep_an_activation(real_inventory: Real) -> None:
    rows = {row["name"]: row for row in real_inventory("sd15").to_rows()}
    row = rows["up-level1-repeat1-vit-block0-cross-q"]
    assert row["presets"] == ["sd15/practical", "sd15/amalgam", "xl-t"]
    assert (row["paper_keeps"], row["dropped"], row["channels"], row["height"]) == (True, None, 1280, 16)
    assert rows["mid-vit-out"]["dropped"] == "noise: outside the up stage"
    other = inventory(tiny.backbone("dit")).to_rows()[0]
    assert (other["presets"], other["paper_keeps"], other["dropped"]) == ([], None, None)


SD15_COSTS = {
    "down0-rep0-res-out": 0.019,
    "down0-downsampler": 0.137,
    "down2-downsampler": 0.301,
    "mid-vit-out": 0.321,
    "mid-rep1-res-out": 0.326,
    "up0-upsampler": 0.358,
    "up1-rep0-res-out": 0.388,
    "up1-rep0-vit0-cross-q": 0.395,
    "up1-rep1-vit0-cross-q": 0.447,
    "up1-rep2-res-out": 0.487,
    "up1-upsampler": 0.546,
    "up2-rep1-vit0-cross-q": 0.652,
    "up2-upsampler": 0.754,
    "up3-rep0-vit0-self-k": 0.798,
    "up3-rep0-vit-out": 0.843,
    "up3-rep1-vit-out": 0.921,
    "up3-rep2-vit-out": 1.0,
}
SDXL_COSTS = {
    "down1-downsampler": 0.100,
    "mid-vit-out": 0.425,
    "up0-rep0-vit0-cross-q": 0.452,
    "up0-rep0-vit5-out": 0.508,
    "up0-rep0-vit7-out": 0.528,
    "up0-upsampler": 0.793,
    "up1-rep0-vit0-cross-q": 0.821,
    "up1-rep0-vit0-out": 0.828,
    "up1-rep2-vit0-self-k": 0.904,
}


@pytest.mark.parametrize(("name", "costs"), [("sd15", SD15_COSTS), ("sdxl", SDXL_COSTS)])
def test_published_costs(real_inventory: Real, name: str, costs: dict[str, float]) -> None:
    found = real_inventory(name)
    assert {key: round(found[key].cost, 3) for key in costs} == pytest.approx(costs, abs=1.1e-3)


def test_costs_of_blocks(real_inventory: Real) -> None:
    for name, block, cost in (("sd3", 11, 0.0417), ("flux-dev", 9, 0.0176), ("flux-dev", 30, 0.0175)):
        found = real_inventory(name)
        step = found[f"vit-block{block}-out"].cost - found[f"vit-block{block - 1}-out"].cost
        assert step == pytest.approx(cost, abs=1e-3)


@pytest.mark.parametrize("text", ["up-sideways", "mid-level0-res-out", "up-repeat0-res-out", "nonsense", "up-level1-"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no name of an activation"):
        Name.parse(text)


def test_abbreviations_are_spelled_out() -> None:
    assert canonical("UP1-REP1-VIT0-CROSS-Q") == "up-level1-repeat1-vit-block0-cross-q"
    assert canonical("up_blocks.1.resnets.0") == "up_blocks.1.resnets.0"
