import pytest
import torch
from torch import nn

from diffcore.errors import NoMatchError
from diffcore.hooks import Site, capture, match
from diffcore.testing import tiny


@pytest.fixture(scope="module")
def unet():
    return tiny.backbone("sd15")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_star_finds_every_module_once_but_no_container(name):
    model = tiny.backbone(name)
    expected = {n for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList | nn.ModuleDict)}
    found = [site.module for site in match(model, "*")]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_unet_runs_down_then_mid_then_up(unet):
    assert list(dict(unet.named_children()))[-4:-3] == ["mid_block"]  # the network itself lists it after up_blocks
    blocks = [site.module.partition(".")[0] for site in match(unet, "*.attn2.to_v")]
    assert blocks == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    fired = []
    with capture(unet, "*.resnets.?", reduce=lambda name, x: fired.append(name)):
        tiny.denoiser("sd15")  # another network: nothing fires
        x_t, t, cond = tiny.inputs("sd15")
        unet(x_t, t, **cond)
    assert fired == [site.module for site in match(unet, "*.resnets.?")]


def test_patterns_add_up_in_the_order_of_the_network(unet):
    both = match(unet, ["up_blocks.1.*.attn2.to_v", "down_blocks.0.*.to_v", "*.attn2.to_v"])
    assert [site.module.split(".")[0] for site in both] == ["down_blocks"] * 2 + ["mid_block"] + ["up_blocks"] * 2
    assert all(site.at == "output" and site.key == site.module for site in both)


def test_kind_restricts_and_is_named_where_nothing_is_left(unet):
    assert len(match(unet, "mid_block*", kind=nn.Conv2d)) == 6
    with pytest.raises(NoMatchError, match=r"no Conv2d of UNet2DConditionModel matches '\*\.to_v'"):
        match(unet, "*.to_v", kind=nn.Conv2d)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("down.*.attn2.to_v", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"),
        ("mid_blok", "mid_block"),
        ("*.attn2.to_w", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"),
        ("", None),
    ],
)
def test_a_pattern_without_a_match_gets_the_nearest_names(unet, pattern, nearest):
    if nearest is None:
        assert match(unet, pattern) == [Site("")]
        return
    with pytest.raises(NoMatchError) as error:
        match(unet, ["conv_in", pattern])
    assert f"no module of UNet2DConditionModel matches '{pattern}'; nearest: " in str(error.value)
    assert f"'{nearest}'" in str(error.value)
    assert str(error.value).endswith("list all with: diffcore hooks MODEL '*'")


@pytest.mark.parametrize(
    ("pattern", "child"),
    [
        ("down_blocks", "'down_blocks.0', 'down_blocks.1'"),
        ("mid_block*attn1.to_out", "'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'"),
        ("*.ff.net", "ff.net.0'"),
    ],
)
def test_containers_are_never_called_so_their_children_are_proposed(unet, pattern, child):
    with pytest.raises(NoMatchError, match="only containers") as error:
        match(unet, pattern)
    assert child in str(error.value)


def test_hostile_pattern_is_shown_escaped(unet):
    with pytest.raises(NoMatchError) as error:
        match(unet, "\x1b[2Jto_v")
    assert "\x1b" not in str(error.value)


class OldTextEncoder(nn.Module):
    """Up to transformers 4, encoders had one level more."""

    def __init__(self, text_model):
        super().__init__()
        self.text_model = text_model


def test_the_level_of_text_encoders_is_optional():
    new = tiny.text_encoder()
    old = OldTextEncoder(new)
    for model in (new, old):
        for prefix in ("", "text_model."):
            assert len(match(model, prefix + "encoder.layers.*.mlp.fc1")) == 2
            assert len(match(model, prefix + "*.mlp.fc1")) == 2
    assert {site.module for site in match(old, "encoder.layers.0")} == {"text_model.encoder.layers.0"}
    with capture(new, Site("text_model.encoder.layers.0.mlp.fc1", name="hidden")) as activations:
        new(input_ids=torch.tensor([[512, 5, 513]]))
    assert activations["hidden"].shape == (1, 3, 37)


def test_no_other_network_has_that_level(unet):
    with pytest.raises(NoMatchError):
        match(unet, "text_model.*")


def test_wrappers_for_several_devices_are_looked_through(unet):
    wrapped = nn.DataParallel(unet)
    assert match(wrapped, "*.attn2.to_v") == match(unet, "*.attn2.to_v")


@pytest.mark.parametrize("at", ["outputs", "output[-1]", "output[a]", "input[1]", ""])
def test_a_site_knows_its_places(at):
    with pytest.raises(ValueError, match="it may be 'input', 'output'"):
        Site("mid_block", at)
