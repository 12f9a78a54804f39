"""The extractor as users of timm and torchvision expect it; benchmarks/featsel_timm.py compares with timm itself."""

import pytest
import torch

from diffcore.errors import NoMatchError, UserError
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from diffusion_featsel.backbone_form import FeatureInfo, create_feature_extractor
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.normalise import ChannelStatistics
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.project import random_projection

CROSS = "up-level1-repeat0-vit-block0-cross-q"
NAMES = [
    "mid-vit-out",
    "up-level0-upsampler-out",
    "down-level1-repeat0-res-out",
    "up-level1-repeat0-vit-block0-cross-q",
]


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor(from_pipeline(tiny.pipeline("sd15")), NAMES)


def test_maps_come_from_fine_to_coarse_as_described(extractor):
    backbone = extractor.as_backbone()
    info = backbone.feature_info
    images = torch.rand(2, 3, 32, 24)
    maps = backbone(images)
    assert isinstance(maps, list)
    assert info.reduction() == [2, 2, 4, 4]
    assert [found.shape[1] for found in maps] == info.channels() == [64, 32, 64, 64]
    assert [tuple(found.shape[2:]) for found in maps] == [(32 // by, 24 // by) for by in info.reduction()]
    assert info.module_name(0) == "up_blocks.0.upsamplers.0"
    sized = FeatureExtractor(extractor.model, NAMES, size=(32, 24))(images, keys=image_keys(images))
    for row, found in zip(info.get_dicts(), maps, strict=True):
        assert torch.equal(found, sized[row["name"]])


def test_the_network_runs_up_to_the_last_map_that_is_returned(extractor):
    some = extractor.as_backbone(out_indices=(-2,))
    assert some.out_indices == some.feature_info.out_indices == (-2,)
    assert some.feature_info.channels() == [64]
    assert some.feature_info.module_name() == ["mid_block.attentions.0"]
    assert some.extractor.cost < extractor.cost
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(some(images)[0], extractor(images)["mid-vit-out"])
    assert extractor.names == tuple(NAMES)


def test_sides_that_the_network_does_not_divide_are_refused(extractor):
    with pytest.raises(UserError, match="`size` is 30x16 pixels; this network takes multiples of 4, such as 32x16"):
        extractor.as_backbone()(torch.rand(1, 3, 30, 16))


def test_a_head_learns_on_top_and_the_weights_stay(extractor):
    body = extractor.as_backbone((0,))
    head = torch.nn.Conv2d(body.feature_info.channels()[0], 2, 1)
    torch.nn.Sequential(body, head).train()
    assert not body.extractor.networks.training
    before = extractor.model.backbone.get_parameter("conv_in.weight").clone()
    optimizer = torch.optim.AdamW([*head.parameters(), *body.parameters()])
    head(body(torch.rand(1, 3, 16, 16))[0]).mean().backward()
    optimizer.step()
    assert torch.equal(before, extractor.model.backbone.get_parameter("conv_in.weight"))


def test_indices_beyond_the_maps_are_refused():
    info = FeatureInfo([{"num_chs": 1, "reduction": 1, "module": "a"}], (0,))
    with pytest.raises(IndexError, match="`out_indices` has 1, and there are 1 maps"):
        info.from_other((1,))


def test_nodes_have_the_users_names(extractor):
    images = torch.rand(1, 3, 16, 16)
    nodes = {"mid_block.attentions.0": "coarse", "up0-upsampler-out": "fine"}
    named = create_feature_extractor(extractor.model, nodes)(images)
    full = extractor(images)
    assert list(named) == ["coarse", "fine"]
    assert torch.equal(named["coarse"], full["mid-vit-out"])
    assert torch.equal(named["fine"], full["up-level0-upsampler-out"])
    assert list(create_feature_extractor(extractor.model, ["mid-vit-out"])(images)) == ["mid-vit-out"]
    with pytest.raises(NoMatchError):
        create_feature_extractor(extractor.model, {"layer1": "a"})
    with pytest.raises(UserError, match="names an activation twice"):
        create_feature_extractor(extractor.model, ["mid-vit-out", "mid_block.attentions.0"])
    with pytest.raises(UserError, match="`t` names 2 timesteps"):
        create_feature_extractor(extractor.model, ["mid-vit-out"], t=[1, 2])


def test_described_channels_are_those_of_projected_maps(extractor):
    projected = FeatureExtractor(extractor.model, [CROSS], projections={CROSS: random_projection(CROSS, 32, 5)})
    body = projected.as_backbone()
    assert body.feature_info.channels() == [5] == [body(torch.rand(1, 3, 16, 16))[0].shape[1]]
    massive = ChannelStatistics(torch.zeros(32), torch.ones(32), torch.tensor([100.0] + [1.0] * 31), 1)
    fewer = FeatureExtractor(extractor.model, [CROSS], normalise="drop-massive", statistics={CROSS: massive})
    assert fewer.channels(CROSS) == 31 == fewer(torch.rand(1, 3, 16, 16))[CROSS].shape[1]


def test_only_keeps_what_is_there(extractor):
    with pytest.raises(UserError, match="has no vit-out; it has mid-vit-out"):
        extractor.only(["vit-out"])
