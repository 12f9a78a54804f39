from copy import deepcopy

import pytest
import torch

from diffcore.errors import IncompatibleModelError
from diffcore.testing import tiny
from nemo_localize.ablate import ablated
from nemo_localize.neurons import NeuronSet
from nemo_localize.planted import Plant, planted_model
from nemo_localize.sites import ablated_rows, value_sites

LAYERS = [f"down_blocks.{block}.attentions.{place}" for block in range(3) for place in range(2)]
SD15 = [f"{layer}.transformer_blocks.0.attn2.to_v" for layer in [*LAYERS, "mid_block.attentions.0"]]


def test_the_seven_layers_of_stable_diffusion(simple):
    sites = value_sites(simple.model.backbone)
    assert [site.module for site in sites.sites] == SD15
    assert sites.widths == (16, 16, 32, 32, 32, 32, 32)
    with_up = value_sites(simple.model.backbone, up=True)
    assert [site.module for site in with_up.sites][:7] == SD15
    assert all(site.module.startswith("up_blocks.") for site in with_up.sites[7:])


def test_full_size_stable_diffusion_has_5760_neurons():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    sites = value_sites(unet)
    assert [site.module for site in sites.sites] == SD15
    assert sites.widths == (320, 320, 640, 640, 1280, 1280, 1280)
    assert sites.num_neurons == 5760


def test_several_blocks_per_attention_and_gated_blocks():
    sdxl = value_sites(tiny.backbone("sdxl"))
    names = [site.module for site in sdxl.sites]
    assert names[0] == "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    assert names[-1] == "mid_block.attentions.0.transformer_blocks.1.attn2.to_v"
    assert len(names) == 4
    gated = value_sites(tiny.backbone("sd15", only_cross_attention=True))
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v" in [site.module for site in gated.sites]


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_later_architectures_are_refused_by_name(name):
    with pytest.raises(IncompatibleModelError, match="not supported yet"):
        value_sites(tiny.backbone(name))


def test_models_that_read_no_text_are_refused():
    with pytest.raises(IncompatibleModelError, match="no cross-attention on text"):
        value_sites(tiny.backbone("unet2d"))


def test_hook_weight_and_output_column_are_the_same_edit():
    planted = planted_model([Plant("portrait of 1917 no 1", 2, 3)], dtype=torch.float64)
    unet = planted.model.backbone
    sites = value_sites(unet)
    off = NeuronSet.of({sites.sites[2].module: [3, 5], sites.sites[6].module: [0]})
    x_t = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    cond = planted.model.prompts(["portrait of 1917 no 1", "something else"])
    t = torch.full((2,), 981.0)
    before = planted.model.denoiser(x_t, t, cond).output
    with ablated(unet, off):
        masked = planted.model.denoiser(x_t, t, cond).output
    outputs = []
    for row_of_value in (True, False):
        edited = deepcopy(unet)
        for name, index in off:
            attention = edited.get_submodule(name.removesuffix(".to_v"))
            (attention.to_v.weight[index] if row_of_value else attention.to_out[0].weight[:, index]).zero_()
        # The planted patterns listen to copies of the original's hooks; what they see must be the edited values.
        outputs.append(edited(x_t, t, cond["encoder_hidden_states"], return_dict=False)[0])
    assert (masked - outputs[0]).abs().max() < 1e-12
    assert (before - masked).abs().max() > 1e-3
    # The pattern is read before the output projection, so a column is compared on a network without patterns.
    bare = tiny.backbone("sd15").double()
    site = value_sites(bare).sites[0].module
    column = deepcopy(bare)
    column.get_submodule(site.removesuffix("to_v") + "to_out.0").weight[:, 7] = 0
    small, states = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 5, 32, dtype=torch.float64)
    with ablated(bare, NeuronSet.of({site: [7]})):
        hooked = bare(small, 981, states, return_dict=False)[0]
    assert (hooked - column(small, 981, states, return_dict=False)[0]).abs().max() < 1e-12
    assert (hooked - bare(small, 981, states, return_dict=False)[0]).abs().max() > 1e-6


def test_rows_have_their_own_neurons(simple):
    unet, sites = simple.model.backbone, value_sites(simple.model.backbone)
    sets = [frozenset(), frozenset([3]), frozenset([20, 150])]
    x_t = torch.randn(3, 4, 16, 16)
    states = simple.model.prompts(["portrait of 1917 no 1"] * 3)["encoder_hidden_states"]
    with torch.no_grad():
        with ablated_rows(unet, sites, sites.table(sets)):
            together = unet(x_t, 981, states, return_dict=False)[0]
        for row, off in enumerate(sets):
            with ablated(unet, sites.named(off)):
                alone = unet(x_t[row : row + 1], 981, states[:1], return_dict=False)[0]
            assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_numbers_and_names_are_one_to_one(simple):
    sites = value_sites(simple.model.backbone)
    numbers = frozenset([0, 15, 16, 31, 32, 191])
    named = sites.named(numbers)
    assert sites.numbers(named) == numbers
    assert named[SD15[1]] == (0, 15)
    with pytest.raises(IncompatibleModelError, match=r"to_v\[16\]"):
        sites.numbers(NeuronSet.of({SD15[0]: [16]}))


def test_neuron_sets_are_values():
    a = NeuronSet.of({"b": [3, 1, 3], "a": [0], "empty": []})
    b = NeuronSet.of({"b": [3, 7]})
    assert len(a) == 3
    assert list(a) == [("a", 0), ("b", 1), ("b", 3)]
    assert a == NeuronSet.from_json(a.to_json())
    assert hash(a) == hash(NeuronSet.of({"a": [0], "b": [1, 3]}))
    assert a.union(b) == NeuronSet.of({"a": [0], "b": [1, 3, 7]})
    assert a.minus(b) == NeuronSet.of({"a": [0], "b": [1]})
    assert ("b", 3) in a
    assert a["nowhere"] == ()
    assert not NeuronSet()
    for wrong in ([1], {"a": 3}, {"a": [1.5]}, {"a": [True]}, {"a": [-1]}):
        with pytest.raises(ValueError, match="neuron"):
            NeuronSet.from_json(wrong)
