"""Two sampling steps through our denoiser and sampler equal the library's own pipeline or scheduler."""

import math
import warnings

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from diffcore.checkpoint import inspect_model
from diffcore.denoiser import GuidedDenoiser, NetworkDenoiser, sample, schedule_from
from diffcore.denoiser.scheduler import OTHERS, PLAIN
from diffcore.models import backbone_call, from_pipeline, load
from diffcore.models.backbones import pack, unpack
from diffcore.models.schedules import schedule_of
from diffcore.runtime import Runtime
from diffcore.testing import tiny

CPU = Runtime(device="cpu")
PROMPTS = ["a cat on a mat", "two dogs"]


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "backbone"
    tiny.backbone("sd15").save_pretrained(folder)
    return folder


def noise(channels: int = 4, side: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(7))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = theirs.abs().max()
    assert scale > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * max(float(scale), 1.0)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_guided_stable_diffusion_equals_its_pipeline(loaded, name):
    pipeline, model = loaded(name)
    expected = pipeline(
        PROMPTS, latents=noise(), guidance_scale=5.0, num_inference_steps=2, output_type="latent"
    ).images
    uncond = model.prompts.unconditional(2)
    ours = sample(GuidedDenoiser(model.denoiser, 5.0, uncond), noise(), model.prompts(PROMPTS), steps=2)
    close(ours, expected)
    images = pipeline(PROMPTS, latents=noise(), guidance_scale=5.0, num_inference_steps=2, output_type="pt").images
    close(model.codec.decode(ours), images)


def test_the_rebuilt_pipeline_is_the_librarys(loaded):
    pipeline, model = loaded("sdxl")
    rebuilt = model.pipeline
    rebuilt.set_progress_bar_config(disable=True)
    options = {"latents": noise(), "num_inference_steps": 1, "output_type": "latent"}
    assert torch.equal(rebuilt(PROMPTS, **options).images, pipeline(PROMPTS, **options).images)


def test_sd3_equals_its_pipeline(loaded):
    pipeline, model = loaded("sd3")
    expected = pipeline(
        PROMPTS, latents=noise(), guidance_scale=4.0, num_inference_steps=2, output_type="latent"
    ).images
    guided = GuidedDenoiser(model.denoiser, 4.0, model.prompts.unconditional(2))
    close(sample(guided, noise(), model.prompts(PROMPTS), steps=2, solver="euler"), expected)


def test_sd3_without_t5_equals_its_pipeline(loaded):
    pipeline, model = loaded("sd3")
    states = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)[0]
    close(model.prompts(PROMPTS)["encoder_hidden_states"], states)
    towers, last = model.prompts.towers, pipeline.text_encoder_3
    model.prompts.towers, pipeline.text_encoder_3 = towers[:2], None
    try:
        states = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)[0]
        ours = model.prompts(PROMPTS)["encoder_hidden_states"]
    finally:
        model.prompts.towers, pipeline.text_encoder_3 = towers, last
    close(ours, states)
    assert not ours[:, 77:].any()


def test_flux_equals_its_pipeline(loaded):
    pipeline, model = loaded("flux")
    size = {"height": 16, "width": 16}
    expected = pipeline(
        PROMPTS, latents=pack(noise()), num_inference_steps=2, guidance_scale=3.5, output_type="latent", **size
    ).images
    schedule = schedule_from(pipeline.scheduler, num_tokens=16)
    denoiser = NetworkDenoiser(model.backbone, schedule, "flow_prediction", call=model.denoiser.call)
    ours = sample(denoiser, noise(), model.prompts(PROMPTS), steps=2, solver="euler")
    close(ours, unpack(expected, 8, 8))
    images = pipeline(PROMPTS, latents=pack(noise()), num_inference_steps=2, output_type="pt", **size).images
    close(model.codec.decode(ours), images)


def test_flux_packing_is_the_librarys():
    x = torch.randn(2, 4, 6, 8)
    tokens = diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8)
    assert torch.equal(pack(x), tokens)
    assert torch.equal(unpack(tokens, 6, 8), x)


def test_pixart_equals_its_pipeline(loaded):
    pipeline, model = loaded("pixart")
    expected = pipeline(
        PROMPTS,
        latents=noise(),
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
        height=64,  # the pipeline takes 8 pixels per latent for granted in its checks
        width=64,
    ).images
    guided = GuidedDenoiser(model.denoiser, 3.0, model.prompts.unconditional(2))
    close(sample(guided, noise(), model.prompts(PROMPTS), steps=2), expected)


def test_dit_equals_its_pipeline(loaded):
    pipeline, model = loaded("dit")
    generator = torch.Generator().manual_seed(7)
    expected = pipeline([3, 5], guidance_scale=1.0, num_inference_steps=2, generator=generator, output_type="np").images
    ours = sample(model.denoiser, noise(), {"class_labels": torch.tensor([3, 5])}, steps=2)
    close(model.codec.decode(ours).permute(0, 2, 3, 1), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_discrete_prediction_equals_the_librarys_scheduler(kind):
    backbone = tiny.backbone("sd15")
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(2)
    _, _, cond = tiny.inputs("sd15")
    state = noise()
    with torch.no_grad():
        for t in scheduler.timesteps:
            state = scheduler.step(backbone(state, t, **cond).sample, t, state).prev_sample
    denoiser = NetworkDenoiser(backbone, schedule_from(scheduler), kind, call=backbone_call(backbone))
    close(sample(denoiser, noise(), cond, steps=2), state)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_x0_is_clamped_where_the_scheduler_says_so_and_after_guidance(tmp_path, guidance_scale, bound):
    backbone = tiny.backbone("sd15")
    backbone.save_pretrained(tmp_path)
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=bound)
    scheduler.save_pretrained(tmp_path)
    scheduler.set_timesteps(4)
    (_, _, cond), uncond = tiny.inputs("sd15"), {"encoder_hidden_states": torch.zeros(2, 7, 32)}
    state = noise()
    with torch.no_grad():
        for t in scheduler.timesteps:
            without, with_ = backbone(state, t, **uncond).sample, backbone(state, t, **cond).sample
            output = without + guidance_scale * (with_ - without)
            state = scheduler.step(output, t, state, use_clipped_model_output=True).prev_sample
    denoiser = GuidedDenoiser(load(tmp_path, CPU).denoiser, guidance_scale, uncond)
    # Noise of the clamped x0 is divided by sigma: the library's float32 tables show.
    torch.testing.assert_close(sample(denoiser, noise(), cond, steps=4), state, atol=5e-4, rtol=0)
    assert float(state.abs().max()) <= bound + 1e-6
    assert float(sample(denoiser, noise(), cond, steps=4, clip_x0=math.inf).abs().max()) > bound
    assert float(sample(denoiser, noise(), cond, steps=4, clip_x0=0.1).abs().max()) <= 0.1 + 1e-6


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_folders_take_the_steps_of_their_schedulers(backbone_folder, name):
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.save_pretrained(backbone_folder)  # some write -Infinity
    _, schedule, _ = schedule_of(inspect_model(backbone_folder))
    assert schedule == schedule_from(scheduler)
    assert len(schedule.timesteps(4)) == 4


def test_an_edm_network_equals_the_librarys_scheduler(tmp_path):
    backbone = tiny.backbone("unet2d")
    backbone.save_pretrained(tmp_path)
    (tmp_path / "denoiser.json").write_text('{"prediction_type": "edm", "sigma_max": 60}')
    model = load(tmp_path, CPU)
    assert model.denoiser.prediction_type == "edm"
    scheduler = EDMEulerScheduler(sigma_max=60.0)
    scheduler.set_timesteps(3)
    cond = {"class_labels": torch.tensor([1, 2])}
    state = noise(3) * 60
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = backbone(scheduler.scale_model_input(state, t), t, **cond).sample
            state = scheduler.step(output, t, state).prev_sample
    close(sample(model.denoiser, noise(3), cond, steps=3, solver="euler"), state)


def test_prompt_states_are_the_pipelines(loaded):
    pipeline, model = loaded("pixart")
    states, mask, *_ = pipeline.encode_prompt(["  A Cat ", "dog"], do_classifier_free_guidance=False)
    cond = model.prompts(["  A Cat ", "dog"])
    close(cond["encoder_hidden_states"], states)
    assert torch.equal(cond["encoder_attention_mask"], mask)


def test_encode_is_the_posteriors_mode_and_sampling_has_its_moments(loaded):
    pipeline, model = loaded("sd3")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = pipeline.vae.encode(2 * images - 1).latent_dist
    close(model.codec.encode(images), (posterior.mode() - 0.0609) * 1.5305)
    seeds = torch.arange(400)
    drawn = model.codec.encode(images[:1].expand(400, -1, -1, -1), sample=True, seeds=seeds) / 1.5305 + 0.0609
    alone = model.codec.encode(images[:1], sample=True, seeds=seeds[7:8])[0] / 1.5305 + 0.0609
    assert torch.allclose(drawn[7], alone, atol=1e-5)
    deviation = (drawn - posterior.mode()[0]) / posterior.std[0]
    assert abs(float(deviation.mean())) < 0.02
    assert abs(float(deviation.std()) - 1) < 0.02
    with pytest.raises(ValueError, match="without `seeds`"):
        model.codec.encode(images, sample=True)
    with pytest.raises(ValueError, match="multiples of 2, such as 16x16"):
        model.codec.encode(torch.rand(1, 3, 17, 16))


def test_mean_and_deviation_of_the_posterior_are_in_the_scale_of_x0():
    model = from_pipeline(tiny.pipeline("sd3"))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mean, std = model.codec.posterior(images)
    assert torch.equal(mean, model.codec.encode(images))
    expected = model.modules["vae"].encode(2 * images - 1).latent_dist
    torch.testing.assert_close(std, expected.std * 1.5305)
    assert not mean.requires_grad
    for x0 in (model.codec.encode(images, grad=True), model.codec.posterior(images, grad=True)[0]):
        (gradient,) = torch.autograd.grad(x0.sum(), images)
        assert gradient.abs().max() > 0
    pixels = tiny.model("unet2d").codec
    assert torch.equal(pixels.posterior(images)[0], 2 * images - 1)
    assert not pixels.posterior(images)[1].any()


def test_no_scheduler_means_the_usual_one_and_a_warning(tmp_path):
    tiny.backbone("sd3").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no scheduler came with the model"):
        model = load(tmp_path, CPU)
    assert model.denoiser.prediction_type == "flow_prediction"
    assert model.denoiser.schedule.shift == 3.0
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, CPU).denoiser.schedule.shift == 2.0
