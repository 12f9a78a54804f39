import copy

import pytest
import torch

from diffcore.denoiser import GuidedDenoiser
from diffcore.errors import NoMatchError
from diffcore.hooks import Site, capture, intervene
from diffcore.models.backbones import backbone_call
from diffcore.testing import tiny

VALUES = {
    "sd15": "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v",
    "unet2d": "mid_block.attentions.0.to_v",
    "dit": "transformer_blocks.0.attn1.to_v",
    "pixart": "transformer_blocks.1.attn2.to_v",
    "sd3": "transformer_blocks.0.attn.to_v",
    "flux": "single_transformer_blocks.0.attn.to_v",
}


@pytest.fixture(scope="module")
def sd15():
    return tiny.denoiser("sd15"), tiny.inputs("sd15")


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_mask_on_one_row_equals_the_zeroed_weight_row_and_leaves_the_others(name):
    backbone = tiny.backbone(name)
    call, inputs, channels = backbone_call(backbone), tiny.inputs(name, batch=3), [0, 5]
    plain = call(backbone, *inputs)
    changed = copy.deepcopy(backbone)
    linear = changed.get_submodule(VALUES[name])
    linear.weight[channels] = 0
    if linear.bias is not None:
        linear.bias[channels] = 0
    expected = call(changed, *inputs)
    mask = torch.ones(3, 1, linear.out_features)
    mask[1, :, channels] = 0
    with intervene(backbone, {VALUES[name]: mask}):
        edited = call(backbone, *inputs)
    assert torch.equal(edited[1], expected[1])
    assert not torch.equal(expected[1], plain[1])
    assert torch.equal(edited[[0, 2]], plain[[0, 2]])
    assert torch.equal(call(backbone, *inputs), plain)
    assert num_hooks(backbone) == 0


def test_a_mask_on_maps_equals_the_zeroed_filter(sd15):
    denoiser, inputs = sd15
    changed = copy.deepcopy(denoiser)
    conv = changed.backbone.down_blocks[0].resnets[0].conv1
    conv.weight[3] = 0
    conv.bias[3] = 0
    mask = torch.ones(2, 32, 1, 1)
    mask[0, 3] = 0
    with intervene(denoiser.backbone, {"down_blocks.0.resnets.0.conv1": mask}):
        edited = denoiser(*inputs).output
    assert torch.equal(edited[0], changed(*inputs).output[0])
    assert torch.equal(edited[1], denoiser(*inputs).output[1])


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
def test_branches_of_a_guided_pass(sd15, branch):
    denoiser, (x_t, t, cond) = sd15
    uncond = {"encoder_hidden_states": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(9))}
    guided = GuidedDenoiser(denoiser, 3.0, uncond)
    edit = {"*.attn2.to_v": lambda v: v * 0.5}

    def alone(condition, is_edited):
        if not is_edited:
            return denoiser(x_t, t, condition).output
        with intervene(denoiser, edit):
            return denoiser(x_t, t, condition).output

    without = alone({key: value.repeat(2, 1, 1) for key, value in uncond.items()}, branch != "cond")
    with_ = alone(cond, branch != "uncond")
    with intervene(denoiser, edit, branch=branch):
        output = guided(x_t, t, cond).output
    torch.testing.assert_close(output, without + 3.0 * (with_ - without), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output, guided(x_t, t, cond).output, atol=1e-4)


def test_branches_need_pairs_of_rows(sd15):
    denoiser, _ = sd15
    with (
        pytest.raises(ValueError, match=r"'conv_in' has 3 rows, but branch='cond' needs pairs"),
        intervene(denoiser.backbone, {"conv_in": torch.ones(1)}, branch="cond"),
    ):
        denoiser(*tiny.inputs("sd15", batch=3))


def test_blocks_nest_in_the_order_of_entry(sd15):
    denoiser, inputs = sd15
    with capture(denoiser.backbone, "conv_in") as original:
        denoiser(*inputs)
    with (
        intervene(denoiser.backbone, {"conv_in": lambda x: x + 1}),
        intervene(denoiser.backbone, {"conv_*n": lambda x: x * 2}),
        capture(denoiser.backbone, "conv_in") as edited,
    ):
        denoiser(*inputs)
    assert torch.equal(edited["conv_in"], (original["conv_in"] + 1) * 2)
    with intervene(denoiser.backbone, {"conv_in": lambda x: x * 2}):
        with intervene(denoiser.backbone, {"conv_in": lambda x: x + 1}):
            pass
        with capture(denoiser.backbone, "conv_in") as doubled:
            denoiser(*inputs)
    assert torch.equal(doubled["conv_in"], original["conv_in"] * 2)


@pytest.mark.parametrize("at", ["output", "input"])
def test_capture_sees_edits_that_were_entered_before_it(sd15, at):
    denoiser, inputs = sd15
    site = Site("mid_block", at)
    with capture(denoiser.backbone, site) as plain:
        denoiser(*inputs)
    with (
        capture(denoiser.backbone, site) as before,
        intervene(denoiser.backbone, {site: lambda x: -x}),
        capture(denoiser.backbone, site) as after,
        capture(denoiser.backbone, site, prepend=True) as ahead,
    ):
        denoiser(*inputs)
    original = plain["mid_block"]
    assert torch.equal(before["mid_block"], original)
    assert torch.equal(ahead["mid_block"], original)
    assert torch.equal(after["mid_block"], -original)


def test_one_element_of_a_tuple_is_replaced_and_the_rest_kept(sd15):
    denoiser, inputs = sd15
    skip = Site("down_blocks.0", "output[1][1]")
    sites = [Site("down_blocks.0", f"output{path}", path) for path in ("[0]", "[1][0]", "[1][1]")]
    with capture(denoiser.backbone, sites) as plain:
        denoiser(*inputs)
    with intervene(denoiser.backbone, {skip: torch.zeros(1)}), capture(denoiser.backbone, sites) as edited:
        output = denoiser(*inputs).output
    assert torch.equal(plain["[0]"], edited["[0]"])
    assert torch.equal(plain["[1][0]"], edited["[1][0]"])
    assert not edited["[1][1]"].any()
    assert not torch.equal(output, denoiser(*inputs).output)


def test_keyword_inputs_and_output_classes():
    backbone = tiny.backbone("flux")
    call, inputs = backbone_call(backbone), tiny.inputs("flux")
    through_module = Site("transformer_blocks.0", "input")  # hidden_states=, by keyword
    with intervene(backbone, {through_module: lambda x: x + 1}):
        by_input = call(backbone, *inputs)
    with intervene(backbone, {"x_embedder": lambda x: x + 1}):
        assert torch.equal(call(backbone, *inputs), by_input)
    unet = tiny.backbone("sd15")
    x_t, t, cond = tiny.inputs("sd15")
    with intervene(unet, {Site(""): lambda x: x * 3}):
        output = unet(x_t, t, **cond)
    assert type(output).__name__ == "UNet2DConditionOutput"
    assert torch.equal(output.sample, unet(x_t, t, **cond).sample * 3)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda x: x[:, :1],
            ValueError,
            r"returned float32 \(2, 1, 8, 8\) on cpu; it must keep float32 \(2, 32, 8, 8\)",
        ),
        (lambda x: x.double(), ValueError, r"returned float64 \(2, 32, 8, 8\) on cpu"),
        (lambda x: x.to("meta"), ValueError, r"returned float32 \(2, 32, 8, 8\) on meta"),
        (lambda x: None, TypeError, "returned NoneType, not a tensor"),
        (lambda x: x.mul_(2), ValueError, "changed its argument in place"),
        (torch.ones(3, 32, 1, 1), ValueError, r"the mask of 'conv_in' has shape \(3, 32, 1, 1\); \(2, 32, 8, 8\)"),
        (torch.ones(1, 2, 32, 1, 1), ValueError, r"has shape \(1, 2, 32, 1, 1\)"),
    ],
)
def test_an_edit_keeps_shape_dtype_and_device_or_fails_and_no_hook_is_left(sd15, edit, error, message):
    denoiser, inputs = sd15
    expected = denoiser(*inputs).output
    with pytest.raises(error, match=message), intervene(denoiser.backbone, {"conv_in": edit, "mid_block": edit}):
        denoiser(*inputs)
    assert num_hooks(denoiser) == 0
    assert torch.equal(denoiser(*inputs).output, expected)


def test_masks_follow_the_precision_of_the_network():
    backbone = tiny.backbone("sd15").to(torch.bfloat16)
    x_t, t, cond = tiny.inputs("sd15")
    cond = {key: value.bfloat16() for key, value in cond.items()}
    with torch.inference_mode(), intervene(backbone, {"mid_block": torch.zeros(2, 1, 1, 1)}):
        assert backbone(x_t.bfloat16(), t, **cond).sample.dtype == torch.bfloat16


def test_gradients_flow_through_edits_also_under_checkpointing():
    backbone = tiny.backbone("sd15").requires_grad_(True).train()
    x_t, t, cond = tiny.inputs("sd15")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        backbone.zero_grad()
        with intervene(backbone, {"down_blocks.0.resnets.0.norm1": lambda x: x * 3}):
            backbone(x_t, t, **cond).sample.square().sum().backward()
        gradients.append(backbone.conv_in.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_pattern_without_a_match_leaves_no_hook(sd15):
    denoiser, _ = sd15
    edits = {"backbone.conv_in": torch.ones(1), "*.attn3.to_v": torch.ones(1)}
    with pytest.raises(NoMatchError, match=r"no module of NetworkDenoiser matches"), intervene(denoiser, edits):
        pass
    assert num_hooks(denoiser) == 0
