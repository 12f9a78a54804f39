"""The extractor gives the activations that a plain forward pass has, whatever shares the batch, and leaves no trace."""

import gc
from functools import partial

import pytest
import torch
from diffusers import ControlNetModel
from peft import LoraConfig
from PIL import Image

from diffcore.denoiser import DiscreteSchedule
from diffcore.errors import NoMatchError, UserError
from diffcore.hooks import capture
from diffcore.models import from_pipeline
from diffcore.models.backbones import condition_keys
from diffcore.testing import tiny
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.forward import noised
from diffusion_featsel.inventory import inventory
from diffusion_featsel.normalise import ChannelMeter
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.presets import preset
from diffusion_featsel.project import random_projection
from diffusion_featsel.protocol import Protocol, drawn, posterior
from diffusion_featsel.selection import Selection

COARSE, FINE = "up-level0-upsampler-out", "up-level1-repeat0-vit-block0-cross-q"
NAMES = (COARSE, FINE, "mid-vit-out", "up-level1-repeat1-res-out")
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline("sd15")


@pytest.fixture(scope="module")
def model(pipe):
    return from_pipeline(pipe)


@pytest.fixture(scope="module")
def extractor_of(model):
    """Returns extractors of one model, of which the activations are listed once."""
    return partial(FeatureExtractor, model, listed=inventory(model, num_text=77))


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def close(one, other, tolerance=TOLERANCE):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=0)


def hooks_of(network) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_features_are_what_a_plain_forward_pass_has_inside(extractor_of, model, images):
    extractor = extractor_of(NAMES, t=120, prompt="a cat", seed=3)
    found = extractor(images)
    x_t = noised(model, model.codec.encode(images).contiguous(), image_keys(images), 120.0, seed=3)
    states = model.prompts(["a cat"])["encoder_hidden_states"].expand(5, -1, -1)
    modules = {
        COARSE: "up_blocks.0.upsamplers.0",
        FINE: "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
        "mid-vit-out": "mid_block.attentions.0",
        "up-level1-repeat1-res-out": "up_blocks.1.resnets.1",
    }
    with torch.no_grad(), capture(model.backbone, modules.values()) as inside:
        model.backbone(x_t, torch.full((5,), 120.0), states)
    assert tuple(found) == NAMES
    for name, module in modules.items():
        tensor = inside[module]
        if tensor.ndim == 3:
            tensor = tensor.transpose(1, 2).unflatten(2, (8, 8))
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous()


def test_the_pass_ends_at_the_last_activation(extractor_of, pipe, images):
    early = extractor_of(["mid-vit-out"])
    reached = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda *_: reached.append(1))
    found = early(images)
    assert not reached
    with_last = extractor_of(["mid-vit-out", "unet-out"])(images)
    handle.remove()
    assert reached
    assert torch.equal(found["mid-vit-out"], with_last["mid-vit-out"])
    assert 0.2 < early.cost < 0.8
    assert f"{100 * early.cost:.0f} % of the network's operations" in repr(early)


def test_an_image_has_its_features_in_any_batch_and_order(extractor_of, images):
    extractor = extractor_of(NAMES)
    together = extractor(images)
    again = extractor(images)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = extractor(images[order])
    alone = [extractor(images[row : row + 1]) for row in range(5)]
    batched = extractor_of(NAMES, batch_size=2)(images)
    for name in NAMES:
        assert torch.equal(together[name], again[name])
        assert torch.equal(together[name][order], permuted[name])
    close(together, {name: torch.cat([one[name] for one in alone]) for name in NAMES})
    close(together, batched)
    other = extractor_of(NAMES, seed=1)(images)
    assert all((other[name] - together[name]).abs().max() > 0.01 for name in NAMES)


def test_equal_images_have_equal_noise_whatever_holds_them(extractor_of):
    pixels = (torch.rand(12, 14, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    extractor = extractor_of([COARSE])
    from_picture = extractor([Image.fromarray(pixels), pixels])[COARSE]
    from_tensor = extractor(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[COARSE]
    torch.testing.assert_close(from_picture[:1], from_picture[1:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(from_picture[:1], from_tensor, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sample", [False, True])
def test_draws_are_averaged(extractor_of, model, images, sample):
    several = extractor_of(NAMES, draws=8, t=261, protocol=Protocol(sample=sample))(images)
    mean, std = posterior(model, images)
    keys = image_keys(images)
    single = extractor_of(NAMES, t=261)
    condition = single._conditions("", size=(16, 16))
    sums = dict.fromkeys(NAMES, torch.zeros(()))
    for draw in range(8):
        x0 = drawn(mean, std, keys, draw=draw) if sample else mean
        x_t = noised(model, x0, keys, 261.0, draw=draw)
        with capture(model.backbone, [row.site for row in single.activations()]) as inside, torch.no_grad():
            model.denoiser(x_t, torch.full((5,), 261.0), {k: v.expand(5, -1, -1) for k, v in condition.items()})
        sums = {row.name: sums[row.name] + row.map(inside[row.site.key]) for row in single.activations()}
    close(several, {name: value / 8 for name, value in sums.items()}, 1e-5)


def test_latents_can_be_kept_for_other_timesteps_and_prompts(extractor_of, model, images):
    extractor = extractor_of(NAMES, draws=2, protocol=Protocol(sample=True))
    kept = extractor.latents(extractor.protocol.prepare(model, images))
    close(extractor.features(kept), extractor(images), 0)
    later = extractor_of(NAMES, draws=2, t=300, prompt="a dog", protocol=Protocol(sample=True))
    close(later.features(kept), later(images), 0)
    half = extractor.features(kept[1:3])
    close(half, {name: maps[1:3] for name, maps in extractor(images).items()})


def test_several_timesteps_come_in_one_dictionary(extractor_of, images):
    both = extractor_of([COARSE], t=[50, "sigma:0.6"])
    found = both(images)
    assert tuple(found) == both.names == (f"{COARSE}@50", f"{COARSE}@270")
    assert torch.equal(found[f"{COARSE}@270"], extractor_of([COARSE], t=270)(images)[COARSE])
    both.calibrate(images)
    assert both.maps(images).shape[1] == 2 * 64


def test_each_image_may_have_its_prompt(extractor_of, images):
    extractor = extractor_of([FINE], batch_size=2)
    prompts = ["a cat", "a dog", "a cat", "", "a cat"]
    found = extractor(images, prompts)[FINE]
    for row, prompt in enumerate(prompts):
        alone = extractor_of([FINE], prompt=prompt)(images[row : row + 1])[FINE]
        torch.testing.assert_close(found[row : row + 1], alone, atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="5 images and 2 `prompts`"):
        extractor(images, ["a cat", "a dog"])


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sd3", "flux", "dit"])
def test_any_backbone_with_its_own_condition(name, images):
    extractor = FeatureExtractor.from_pipeline(tiny.pipeline(name), _two_of(name))
    found = extractor(images)
    assert all(maps.ndim == 4 and torch.isfinite(maps).all() for maps in found.values())
    alone = extractor(images[1:2])
    close({key: maps[1:2] for key, maps in found.items()}, alone, 2e-5)


def _two_of(name: str) -> list[str]:
    if name == "sdxl":
        return ["up-level0-repeat0-vit-block1-out", "up-level1-repeat0-res-out"]
    return ["vit-block0-out", "vit-block1-out"]


def test_residuals_of_a_control_net_and_class_labels_are_entries_of_the_condition(extractor_of, pipe, model, images):
    net = tiny.seeded(lambda: ControlNetModel.from_unet(pipe.unet), 1)
    edges = torch.rand(5, 3, 64, 64)
    states = model.prompts([""])["encoder_hidden_states"].expand(5, -1, -1)
    x_t = noised(model, model.codec.encode(images), image_keys(images), 50.0)
    with torch.no_grad():
        down, mid = net(x_t, torch.full((5,), 50.0), states, edges, return_dict=False)
    extra = dict(zip(condition_keys(pipe.unet).residuals, (*down, mid), strict=True))
    plain, controlled = extractor_of([COARSE], batch_size=2), extractor_of([COARSE], draws=2)
    found = plain(images, extra=extra)[COARSE]
    with torch.no_grad(), capture(pipe.unet, "up_blocks.0.upsamplers.0") as inside:
        pipe.unet(
            x_t,
            torch.full((5,), 50.0),
            states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        )
    torch.testing.assert_close(found, inside["up_blocks.0.upsamplers.0"], atol=1e-5, rtol=0)
    assert (found - plain(images)[COARSE]).abs().max() > 0.01
    # Rows of the residuals go with their images when draws are rows.
    reversed_ = {key: value.flip(0) for key, value in extra.items()}
    swapped = controlled(images.flip(0), extra=reversed_)[COARSE].flip(0)
    torch.testing.assert_close(swapped, controlled(images, extra=extra)[COARSE], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="of `extra` has 3 rows"):
        plain(images, extra={key: value[:3] for key, value in extra.items()})
    digits = tiny.model("dit")
    labels = torch.tensor([1, 2, 3, 4, 5])
    one = FeatureExtractor(digits, ["vit-block0-out"], extra={"class_labels": labels})(images)
    two = FeatureExtractor(digits, ["vit-block0-out"])(images, extra={"class_labels": labels[1:2]})
    torch.testing.assert_close(one["vit-block0-out"][1], two["vit-block0-out"][1], atol=TOLERANCE, rtol=0)


def test_an_adapter_counts_live_and_fused(extractor_of, images):
    pipe = tiny.pipeline("sd15")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    live = FeatureExtractor.from_pipeline(pipe, [FINE])(images)[FINE]
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    fused = FeatureExtractor.from_pipeline(pipe, [FINE])(images)[FINE]
    torch.testing.assert_close(fused, live, atol=1e-4, rtol=0)
    assert (fused - extractor_of([FINE])(images)[FINE]).abs().max() > 0.01


def test_hooks_are_gone_afterwards_and_the_pipeline_is_what_it_was(extractor_of, pipe, images):
    before = hooks_of(pipe.unet)
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}

    def picture():
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **settings).images

    pipe.set_progress_bar_config(disable=True)
    first = picture()
    extractor = extractor_of(NAMES)
    extractor(images)
    assert hooks_of(pipe.unet) == before
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("halt")))
    with pytest.raises(RuntimeError, match="halt"):
        extractor(images)
    handle.remove()
    assert hooks_of(pipe.unet) == before
    assert torch.equal(picture(), first)


def test_gradients_flow_where_they_are_asked_for(extractor_of, images):
    model = from_pipeline(tiny.pipeline("sd15"))
    own = partial(FeatureExtractor, model, listed=extractor_of.keywords["listed"])
    wanted = images.clone().requires_grad_()
    weight = model.backbone.get_parameter("conv_in.weight").requires_grad_(True)
    frozen = own([FINE])
    assert not frozen(wanted)[FINE].requires_grad
    extractor = own([FINE], differentiable=True)
    keys = image_keys(images)
    loss = extractor(wanted, keys=keys)[FINE].square().sum()
    loss.backward()
    assert wanted.grad is not None
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-3
    with torch.no_grad():
        up, down = (extractor(images + s * step * direction, keys=keys)[FINE].square().sum() for s in (1, -1))
    slope = (up - down) / (2 * step)
    assert float((wanted.grad * direction).sum()) == pytest.approx(float(slope), rel=0.02)
    assert not extractor(images)[FINE].is_leaf
    with torch.no_grad():
        assert not extractor(wanted)[FINE].requires_grad


@pytest.mark.parametrize("differentiable", [False, True])
def test_nothing_holds_the_graph_over_many_steps(extractor_of, images, differentiable):
    model = from_pipeline(tiny.pipeline("sd15"))
    own = partial(FeatureExtractor, model, listed=extractor_of.keywords["listed"])
    model.backbone.requires_grad_(True)
    extractor = own([COARSE, FINE], differentiable=differentiable)
    head = torch.nn.Conv2d(64, 2, 1)

    def step():
        loss = head(extractor(images)[COARSE]).square().mean()
        loss.backward()

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    step()
    before = alive()
    for _ in range(12):
        step()
    assert alive() <= before


def test_maps_are_balanced_resized_and_concatenated(extractor_of, images):
    extractor = extractor_of(["mid-vit-out", FINE])
    with pytest.raises(UserError, match="`balance` is 'rms', and that of mid-vit-out is not known"):
        extractor.maps(images)
    extractor.calibrate([images[:2], images[2:]])
    whole = extractor_of(["mid-vit-out", FINE])
    whole.calibrate(images)
    assert extractor.selection.rms == pytest.approx(whole.selection.rms, rel=1e-4)
    maps = extractor.maps(images)
    assert tuple(maps.shape) == (5, 96, 8, 8)
    raw = extractor(images)
    rms = raw[FINE].square().mean().sqrt()
    torch.testing.assert_close(maps[:, 64:], raw[FINE] / rms, atol=1e-4, rtol=1e-4)
    resized = torch.nn.functional.interpolate(raw["mid-vit-out"], (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(maps[:, :64] * extractor.selection.rms["mid-vit-out"], resized, atol=1e-4, rtol=1e-4)
    again = extractor_of(extractor.selection)
    torch.testing.assert_close(again.maps(images), maps)
    weighted = Selection(("mid-vit-out", FINE), weights={FINE: 3.0})
    plain = extractor_of(weighted, balance="none").maps(images, size=(4, 4))
    torch.testing.assert_close(plain[:, :64], raw["mid-vit-out"])
    finer = torch.nn.functional.interpolate(3 * raw[FINE], (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(plain[:, 64:], finer)


def test_features_can_be_normalised_and_projected(extractor_of, images):
    projection = random_projection(FINE, 32, 5)
    extractor = extractor_of([FINE], projections={FINE: projection}, draws=2)
    full = extractor_of([FINE], draws=2)(images)[FINE]
    torch.testing.assert_close(extractor(images)[FINE], projection(full), atol=1e-5, rtol=0)
    meter = ChannelMeter(32)
    meter.add(full)
    scored = extractor_of([FINE], draws=2, normalise="zscore", statistics={FINE: meter.statistics})(images)
    assert scored[FINE].mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(scored[FINE].std((0, 2, 3), correction=0), torch.ones(32), atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="`normalise` is 'center', which needs statistics"):
        extractor_of([FINE], normalise="center")(images)
    with pytest.raises(UserError, match="takes tensors after adaptive layer norm"):
        extractor_of([FINE], normalise="adaln")


def test_the_paper_protocol_takes_its_timestep_and_draws_latents(extractor_of, model, images):
    extractor = extractor_of([COARSE], protocol="paper")
    assert extractor.protocol.sample
    assert extractor.t == (50.0,)  # DDIM with an offset of 1
    mean, std = posterior(model, images)
    keys = image_keys(images)
    x_t = noised(model, drawn(mean, std, keys), keys, 50.0)
    states = model.prompts([""])["encoder_hidden_states"].expand(5, -1, -1)
    with torch.no_grad(), capture(model.backbone, "up_blocks.0.upsamplers.0") as inside:
        model.backbone(x_t, torch.full((5,), 50.0), states)
    assert torch.equal(extractor(images)[COARSE], inside["up_blocks.0.upsamplers.0"])


def test_selections_bring_their_settings(extractor_of, model, images):
    chosen = Selection((COARSE,), t=200.0, prompt="a cat", draws=2)
    extractor = extractor_of(chosen)
    assert (extractor.t, extractor.prompt, extractor.protocol.draws) == ((200.0,), "a cat", 2)
    other = extractor_of(chosen, t=50, prompt="", draws=1)
    assert torch.equal(other(images)[COARSE], extractor_of(COARSE)(images)[COARSE])
    with pytest.warns(UserWarning, match="chosen on another model"):
        extractor_of(Selection((COARSE,), model="0" * 64))


def test_images_of_their_own_proportions(extractor_of):
    extractor = extractor_of([COARSE, FINE], mode="native")
    found = extractor(torch.rand(2, 3, 30, 21))
    assert [tuple(maps.shape[2:]) for maps in found.values()] == [(16, 10), (16, 10)]
    wide = extractor_of([COARSE], size=(16, 24), mode="letterbox")
    assert tuple(wide(torch.rand(1, 3, 30, 21))[COARSE].shape[2:]) == (8, 12)


def test_t_zero_is_allowed(extractor_of, model, images):
    assert isinstance(model.denoiser.schedule, DiscreteSchedule)
    assert torch.isfinite(extractor_of([COARSE], t=0)(images)[COARSE]).all()


def test_what_cannot_be_a_feature_is_refused(extractor_of):
    with pytest.raises(NoMatchError, match="up-level1-repeat0"):
        extractor_of(["up-level7-repeat0-res-out"])
    with pytest.raises(UserError, match="has a map for every place"):
        extractor_of(["up-level1-repeat0-vit-block0-self-map"])
    with pytest.raises(UserError, match="is text, or one vector per image"):
        extractor_of(["up-level1-repeat0-vit-block0-cross-k"])
    with pytest.raises(UserError, match="names no activation"):
        extractor_of([])


def test_networks_stay_in_eval_and_move_with_the_module(extractor_of, pipe, model):
    extractor = extractor_of([COARSE])
    assert not extractor.train().networks.training
    assert extractor.training
    assert any(parameter is pipe.unet.conv_in.weight for parameter in extractor.parameters())
    assert extractor_of([COARSE], differentiable=True).train().networks.training
    model.backbone.eval()
    model.codec.vae.eval()


def test_aliases_are_the_same_tensor_computed_once(extractor_of, images):
    found = extractor_of(["unet-after-conv-in", "skip0"])(images)
    assert torch.equal(found["unet-after-conv-in"], found["skip0"])


def test_maps_of_attention_to_text_are_features(extractor_of, images):
    found = extractor_of(["up-level1-repeat0-vit-block0-cross-map"], prompt="a cat", draws=2)(images)
    maps = found["up-level1-repeat0-vit-block0-cross-map"]
    assert tuple(maps.shape) == (5, 77, 8, 8)
    torch.testing.assert_close(maps.sum(1), torch.ones(5, 8, 8))


def test_presets_bring_size_resizing_and_draws():
    backbone = tiny.backbone(
        "sd15",
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    pipe = tiny.pipeline("sd15")
    pipe.unet = backbone
    model = from_pipeline(pipe)
    chosen = preset("dift/sd21").selection
    assert chosen.draws == 8
    dift = FeatureExtractor(model, "dift/sd21", size=32)
    assert (dift.protocol.sample, dift.protocol.draws, dift.t, dift.prompt) == (True, 8, (261.0,), "")
    image = torch.rand(1, 3, 40, 40)
    found = dift(image)["up-level1-upsampler-out"]
    draws = []
    for draw in range(8):
        mean, std = posterior(model, dift.protocol.prepare(model, image).images)
        x0 = drawn(mean, std, image_keys(image), draw=draw)
        x_t = noised(model, x0, image_keys(image), 261.0, draw=draw)
        with torch.no_grad(), capture(model.backbone, "up_blocks.1.upsamplers.0") as inside:
            model.backbone(x_t, torch.tensor([261.0]), dift._conditions("", size=(32, 32))["encoder_hidden_states"])
        draws.append(inside["up_blocks.1.upsamplers.0"])
    torch.testing.assert_close(found, torch.stack(draws).mean(0), atol=TOLERANCE, rtol=0)
    practical = FeatureExtractor(model, "sd15/practical")
    assert practical.protocol.size == 512
    assert practical.prompt.startswith("a highly realistic photo")
    assert practical.cost < 0.9
    assert FeatureExtractor(model, "sd15/practical", protocol="paper", size=32).protocol.published
