"""Backbones are called as their classes want it: keys at the door, packed tokens, timesteps in their own units."""

import copy
import pickle

import pytest
import torch
from diffusers import ControlNetModel

from diffcore.denoiser import GuidedDenoiser
from diffcore.errors import IncompatibleModelError
from diffcore.models import ConditionKeys, backbone_call, condition_keys
from diffcore.testing import tiny


@pytest.fixture(scope="module")
def backbones():
    return {name: tiny.backbone(name) for name in tiny.NAMES}


def plain_call(name: str, backbone, x_t, t, cond):
    """The same forward pass as the library's documentation writes it."""
    if name == "sdxl":
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
        return backbone(x_t, t, cond["encoder_hidden_states"], added_cond_kwargs=added).sample
    if name in ("sd15", "unet2d"):
        return backbone(x_t, t, next(iter(cond.values()))).sample
    if name == "dit":
        return backbone(x_t, timestep=t, class_labels=cond["class_labels"]).sample
    if name == "pixart":
        none = {"resolution": None, "aspect_ratio": None}
        return backbone(x_t, timestep=t, added_cond_kwargs=none, **cond).sample
    return backbone(x_t, timestep=1000 * t, **cond).sample


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name != "flux"])
def test_a_call_is_the_librarys(backbones, name):
    x_t, t, cond = tiny.inputs(name, batch=3)
    with torch.no_grad():
        ours = backbone_call(backbones[name])(backbones[name], x_t, t, cond)
        assert torch.equal(ours, plain_call(name, backbones[name], x_t, t, cond))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_row_does_not_depend_on_its_batch(name):
    denoiser = tiny.denoiser(name)
    x_t, t, cond = tiny.inputs(name, batch=3)
    together = denoiser(x_t, t, cond).output
    for row in range(3):
        alone = denoiser(x_t[row : row + 1], t[row : row + 1], {k: v[row : row + 1] for k, v in cond.items()}).output
        assert (together[row] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", tiny.NAMES)
def test_conditions_matter_and_guidance_is_two_passes(name):
    denoiser = tiny.denoiser(name)
    x_t, t, cond = tiny.inputs(name)
    _, _, other = tiny.inputs(name, seed=1)
    if "class_labels" in cond:
        other = {"class_labels": cond["class_labels"] + 3}
    if "time_ids" in cond:
        other["time_ids"] = cond["time_ids"]
    with_, without = denoiser(x_t, t, cond), denoiser(x_t, t, other)
    assert (with_.output - without.output).abs().max() > 1e-4
    guided = GuidedDenoiser(denoiser, 3.0, other)(x_t, t, cond)
    expected = without.output + 3 * (with_.output - without.output)
    assert (guided.output - expected).abs().max() < 1e-5
    if with_.extra is not None:
        assert (guided.extra - with_.extra).abs().max() < 1e-5


@pytest.mark.parametrize("name", tiny.NAMES)
def test_missing_and_unknown_keys_are_told_at_the_door(backbones, name):
    call, keys = backbone_call(backbones[name]), condition_keys(backbones[name])
    x_t, t, cond = tiny.inputs(name)
    assert set(keys.required) <= cond.keys() <= {*keys.required, *keys.optional}
    for key in keys.required:
        with pytest.raises(ValueError, match=f"lacks {key}; it takes"):
            call(backbones[name], x_t, t, {k: v for k, v in cond.items() if k != key})
    with pytest.raises(ValueError, match="has states; it takes"):
        call(backbones[name], x_t, t, cond | {"states": x_t})


def test_optional_keys_are_used(backbones):
    x_t, t, cond = tiny.inputs("sd15")
    call = backbone_call(backbones["sd15"])
    mask = torch.tensor([[1.0] * 3 + [0.0] * 4] * 2)
    masked = call(backbones["sd15"], x_t, t, cond | {"encoder_attention_mask": mask})
    shorter = call(backbones["sd15"], x_t, t, {"encoder_hidden_states": cond["encoder_hidden_states"][:, :3]})
    assert (masked - shorter).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_residuals_of_a_control_net_are_the_librarys(backbones, name):
    network = backbones[name]
    x_t, t, cond = tiny.inputs(name)
    net = tiny.seeded(lambda: ControlNetModel.from_unet(network), 1)
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]} if name == "sdxl" else None
    edges = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    states = cond["encoder_hidden_states"]
    with torch.no_grad():
        down, mid = net(x_t, t, states, edges, added_cond_kwargs=added, return_dict=False)
        keys = condition_keys(network).residuals
        assert len(keys) == len(down) + 1
        ours = backbone_call(network)(network, x_t, t, cond | dict(zip(keys, (*down, mid), strict=True)))
        theirs = network(
            x_t,
            t,
            states,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        assert torch.equal(ours, theirs)
        assert (ours - backbone_call(network)(network, x_t, t, cond)).abs().max() > 0.01
    with pytest.raises(ValueError, match="lacks down_block_additional_residual_1, "):
        backbone_call(network)(network, x_t, t, cond | {keys[0]: down[0], keys[-1]: mid})


def test_guidance_distilled_flux_needs_its_scale():
    network = tiny.backbone("flux", guidance_embeds=True)
    x_t, t, cond = tiny.inputs("flux")
    with pytest.raises(ValueError, match="lacks guidance"):
        backbone_call(network)(network, x_t, t, cond)
    weak, strong = (
        backbone_call(network)(network, x_t, t, cond | {"guidance": torch.full((2,), scale)}) for scale in (1.0, 5.0)
    )
    assert (weak - strong).abs().max() > 1e-4


def test_flux_sees_where_a_patch_is(backbones):
    x_t, t, cond = tiny.inputs("flux")
    call = backbone_call(backbones["flux"])
    moved = call(backbones["flux"], x_t.flip(-1), t, cond).flip(-1)
    assert (call(backbones["flux"], x_t, t, cond) - moved).abs().max() > 1e-3
    with pytest.raises(ValueError, match="7x8; its sides must be even"):
        call(backbones["flux"], x_t[:, :, :7], t, cond)
    wide = call(backbones["flux"], torch.randn(2, 4, 4, 10), t, cond)
    assert wide.shape == (2, 4, 4, 10)


def test_sized_pixart_needs_its_size():
    network = tiny.backbone("pixart", use_additional_conditions=True)
    x_t, t, cond = tiny.inputs("pixart")
    size = {"resolution": torch.full((2, 2), 16.0), "aspect_ratio": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="lacks resolution, aspect_ratio"):
        backbone_call(network)(network, x_t, t, cond)
    assert backbone_call(network)(network, x_t, t, cond | size).shape == (2, 8, 8, 8)


def test_half_precision_networks_take_float_conditions():
    denoiser = tiny.denoiser("sdxl").bfloat16()
    x_t, t, cond = tiny.inputs("sdxl")
    rough, exact = denoiser(x_t, t, cond), tiny.denoiser("sdxl")(x_t, t, cond)
    assert rough.output.dtype == torch.bfloat16
    assert rough.x0.dtype == torch.float32
    assert (rough.output.float() - exact.output).abs().max() < 0.1


def test_unknown_backbones_and_conditions_are_refused():
    with pytest.raises(IncompatibleModelError, match="Linear is a backbone of unknown kind; known are DiT"):
        backbone_call(torch.nn.Linear(1, 1))
    with pytest.raises(IncompatibleModelError, match="class_embed_type = timestep"):
        backbone_call(tiny.backbone("sd15", class_embed_type="timestep"))


def test_calls_copy_and_pickle():
    denoiser = tiny.denoiser("pixart")
    x_t, t, cond = tiny.inputs("pixart")
    for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert torch.equal(twin(x_t, t, cond).output, denoiser(x_t, t, cond).output)


def test_keys_without_any():
    with pytest.raises(ValueError, match="has a; it takes nothing"):
        ConditionKeys().check({"a": torch.ones(1)}, "UNet2DModel")
