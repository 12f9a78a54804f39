"""A pipeline in memory means what its folder means; the model and the pipeline share their networks."""

import warnings

import diffusers
import pytest
import torch
from torch import nn

import diffcore
from diffcore.errors import IncompatibleModelError
from diffcore.models import from_pipeline, generate, load
from diffcore.runtime import Runtime
from diffcore.testing import tiny

CPU = Runtime(device="cpu")
FAMILIES = ["sd15", "sd21", "sdxl", "dit", "pixart", "sd3", "flux"]
PROMPTS = ["a cat on a mat", "two dogs"]


def condition(model):
    return {"class_labels": torch.tensor([1, 2])} if model.prompts is None else model.prompts(PROMPTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_in_memory_equals_its_folder(tmp_path, name):
    pipe = tiny.pipeline(name)
    pipe.save_pretrained(tmp_path / name)
    ours, stored = from_pipeline(pipe, name=name), load(tmp_path / name, CPU)
    assert ours.name == stored.name
    assert ours.denoiser.schedule == stored.denoiser.schedule
    assert ours.denoiser.prediction_type == stored.denoiser.prediction_type
    assert ours.shape == stored.shape == (4, *((64, 64) if name == "flux" else (8, 8)))
    assert ours.modules.keys() == stored.modules.keys()
    assert ours.settings == stored.settings
    assert ours.fingerprint == stored.fingerprint
    cond, expected = condition(ours), condition(stored)
    assert cond.keys() == expected.keys()
    assert all(torch.equal(cond[key], expected[key]) for key in cond)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = ours.denoiser.schedule.timesteps(3)[1:2].float().expand(2)
    assert torch.equal(ours.denoiser(x, t, cond).x0, stored.denoiser(x, t, cond).x0)
    images = ours.codec.decode(x)
    assert torch.equal(images, stored.codec.decode(x))
    assert torch.equal(ours.codec.encode(images), stored.codec.encode(images))
    if ours.prompts is not None:
        none, expected = ours.prompts.unconditional(1), stored.prompts.unconditional(1)
        assert all(torch.equal(none[key], expected[key]) for key in none)


@pytest.mark.parametrize("kind", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_pipelines_of_pixels_generate_what_they_generate_themselves(tmp_path, kind):
    unet = tiny.backbone("unet2d", num_class_embeds=None)
    pipe = kind(unet, diffusers.DDIMScheduler(clip_sample=True))
    pipe.save_pretrained(tmp_path / "pixels")
    ours, stored = from_pipeline(pipe), load(tmp_path / "pixels", CPU)
    assert ours.fingerprint == stored.fingerprint
    images = generate(ours, seeds=[1, 2], steps=3)
    assert torch.equal(images, generate(stored, seeds=[1, 2], steps=3))
    assert ours.pipeline.unet is unet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bare_backbones_equal_their_folders(tmp_path, dtype):
    unet, scheduler = tiny.backbone("sd15").to(dtype), diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "unet")
    ours, stored = from_pipeline(unet, scheduler=scheduler), load(tmp_path / "unet", CPU)
    assert (ours.device.type, ours.dtype, ours.pipeline) == ("cpu", dtype, None)
    assert ours.denoiser.prediction_type == stored.denoiser.prediction_type == "v_prediction"
    assert ours.denoiser.schedule == stored.denoiser.schedule
    assert ours.fingerprint == stored.fingerprint
    with pytest.warns(UserWarning, match="no scheduler came with the model"):
        assert from_pipeline(unet).denoiser.prediction_type == "epsilon"


def test_a_scheduler_can_be_replaced():
    pipe = tiny.pipeline("sd15")
    model = from_pipeline(pipe, scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"))
    assert model.denoiser.prediction_type == "v_prediction"
    assert model.fingerprint != from_pipeline(pipe).fingerprint


def test_the_networks_are_the_pipelines_own_and_edits_are_seen():
    pipe = tiny.pipeline("sd15")
    pipe.unet.train().requires_grad_(True)
    pipe.text_encoder.eval()
    model = from_pipeline(pipe)
    assert model.backbone is pipe.unet
    assert all(model.modules[part] is getattr(pipe, part) for part in ("unet", "vae", "text_encoder", "tokenizer"))
    assert pipe.unet.training
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    pipe.unet.eval()
    before = generate(model, PROMPTS, seeds=[1], steps=2)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1.0)
    edited = generate(model, PROMPTS, seeds=[1], steps=2)
    assert not torch.allclose(before, edited)
    assert from_pipeline(pipe).fingerprint != model.fingerprint
    pipe.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert generate(model, PROMPTS, seeds=[1], steps=2).dtype == torch.float32


def test_a_network_smaller_than_a_block_has_its_own_fingerprint(tmp_path):
    model = tiny.backbone("sd15", block_out_channels=(8, 8), cross_attention_dim=8)
    scheduler = diffusers.DDIMScheduler()
    scheduler.save_pretrained(tmp_path)
    found = set()
    for _ in range(2):
        with torch.no_grad():
            model.conv_in.weight[0, 0, 0, 0] += 1
        model.save_pretrained(tmp_path)
        found.add(from_pipeline(model, scheduler=scheduler).fingerprint)
        assert load(tmp_path, CPU).fingerprint in found
    assert len(found) == 2


def test_image_to_image_relatives_share_their_parts():
    pipe = tiny.pipeline("sd15")
    relative = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    model = from_pipeline(relative)
    assert model.pipeline_class == "StableDiffusionPipeline"
    assert model.fingerprint == from_pipeline(pipe).fingerprint


def test_absent_encoders_leave_conditions_to_the_user():
    pipe = tiny.pipeline("sd15")
    pipe.text_encoder = None
    with pytest.warns(UserWarning, match="text_encoder or its tokenizer is not there"):
        model = from_pipeline(pipe)
    assert model.prompts is None
    cond = {"encoder_hidden_states": torch.zeros(1, 7, 32)}
    assert generate(model, condition=cond, seeds=[1], steps=1).shape == (1, 1, 3, 16, 16)


def test_unknown_classes_are_refused():
    pipe = tiny.pipeline("sd15")
    inpainting = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(IncompatibleModelError, match="StableDiffusionInpaintPipeline is a pipeline of unknown kind"):
        from_pipeline(inpainting)

    class Own(type(pipe.unet)):
        pass

    pipe.unet = Own.from_config(pipe.unet.config)
    with pytest.raises(IncompatibleModelError, match=r"unet is of class .*Own, which is not supported"):
        from_pipeline(pipe)
    pipe.unet = None
    with pytest.raises(IncompatibleModelError, match="has no backbone"):
        from_pipeline(pipe)
    with pytest.raises(IncompatibleModelError, match="no weights in memory"):
        from_pipeline(tiny.backbone("sd15").to("meta"))
    with pytest.raises(IncompatibleModelError, match="not supported"):
        from_pipeline(nn.Linear(1, 1))


def test_the_top_level_offers_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (diffcore.from_pipeline, diffcore.load, diffcore.generate) == (from_pipeline, load, generate)
