"""Timesteps, prompts and latents are what the protocol says, and those of the published code where it is asked for."""

import diffusers
import pytest
import torch

from diffcore.batching import InBatches
from diffcore.errors import IncompatibleModelError, UserError
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from diffusion_featsel.protocol import (
    Conditions,
    Protocol,
    default_timestep,
    drawn,
    encode,
    image_size,
    multiple_of,
    posterior,
    published_timestep,
    timesteps,
)

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# As their model repositories publish them.
SCHEDULERS = {
    "sd15": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}, 51),
    "sdxl": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}, 50),
    "sd21-base": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, 49),
}


@pytest.fixture(scope="module")
def model():
    return from_pipeline(tiny.pipeline("sd15"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_published_timestep_is_that_of_the_pipelines_scheduler(name):
    kind, settings, answer = SCHEDULERS[name]
    pipe = tiny.pipeline("sd15")
    scheduler = kind(**STABLE, **settings)
    model = from_pipeline(pipe, scheduler=scheduler)
    assert published_timestep(model, 50) == answer
    assert Protocol.paper().timesteps(model) == (answer,)
    assert Protocol().timesteps(model) == (50,)
    theirs = diffusers.StableDiffusionImg2ImgPipeline(
        **{key: value for key, value in pipe.components.items() if key not in ("scheduler", "image_encoder")},
        scheduler=scheduler,
        requires_safety_checker=False,
    )
    scheduler.set_timesteps(1000)
    for t in (1, 7, 50, 261, 900):
        assert published_timestep(model, t) == float(theirs.get_timesteps(1000, t / 1000, "cpu")[0][0])


def test_timesteps_are_the_asked_ones(model):
    assert timesteps(model, 50) == (50,)
    assert timesteps(model, (0, 999)) == (0, 999)
    assert timesteps(model, "12.5") == (12.5,)
    schedule = model.denoiser.schedule
    for t in (0.0, 50.0, 261.0, 999.0):
        at = torch.tensor([t], dtype=torch.float64)
        decibel = float(schedule.log_snr(at) * 10 / torch.log(torch.tensor(10.0, dtype=torch.float64)))
        assert timesteps(model, f"snr:{decibel!r}") == (t,)
        assert timesteps(model, f"sigma:{float(schedule.alpha_sigma(at)[1])!r}") == (t,)
    # Published facts about the schedule of Stable Diffusion.
    assert [timesteps(model, f"snr:{snr}")[0] for snr in (12.9, 9.3, 4.9, 2.8, -4.2)] == pytest.approx(
        [50, 100, 200, 261, 500], abs=2
    )


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (1000, "`t` is 1000, but timesteps of StableDiffusionPipeline run from 0 to 999"),
        (-1, "`t` is -1, but"),
        ("snr:40", r"`t` is snr:40, but snr of StableDiffusionPipeline runs from -23.* to 30.* dB"),
        ("sigma:0", r"`t` is sigma:0, but sigma of StableDiffusionPipeline runs from 0.029"),
        ("db:3", "`t` is db:3; give a number, 'snr:DB' or 'sigma:S'"),
        ("snr:nan", "`t` is snr:nan; give a number"),
        (float("inf"), "`t` is inf; give a number"),
        ([], "names no timestep"),
        ([50, "snr:12.93"], "names the timestep 50 twice"),
    ],
)
def test_timesteps_outside_the_schedule_are_refused(model, t, message):
    with pytest.raises(UserError, match=message):
        timesteps(model, t)


def test_timesteps_of_other_schedules_have_the_same_noise():
    flow, edm = tiny.model("sd3"), tiny.model("unet2d")
    assert default_timestep(flow) == pytest.approx(0.184, abs=5e-4)
    assert timesteps(flow, "sigma:0.3") == (0.3,)
    assert timesteps(edm, "sigma:0.3") == (0.3,)
    assert timesteps(edm, "snr:0")[0] == pytest.approx(1.0)
    assert timesteps(flow, 0) == (0.0,)
    with pytest.raises(UserError, match=r"run from 0 to 1; 'snr:12\.934' is t=50 of 1000"):
        timesteps(flow, 50)


def test_sizes_come_from_the_model(model):
    assert image_size(model) == (16, 16)
    assert [multiple_of(tiny.model(name)) for name in ("unet2d", "pixart", "flux")] == [1, 4, 4]
    assert multiple_of(model, "native") == 4
    ready = Protocol(mode="native").prepare(model, torch.rand(1, 3, 30, 21))
    assert tuple(ready.images.shape[2:]) == (32, 20)
    assert tuple(Protocol().prepare(model, torch.rand(1, 3, 30, 21)).images.shape[2:]) == (16, 16)
    with pytest.raises(UserError, match="`draws` is 0"):
        Protocol(draws=0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_conditions_are_the_pipelines_and_each_prompt_is_encoded_once(name):
    pipe = tiny.pipeline(name)
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    conditions = Conditions(from_pipeline(pipe))
    cond = conditions(["a cat", "", "a cat"], size=(24, 16))
    theirs = pipe.encode_prompt(
        ["a cat", "", "a cat"],
        device="cpu",
        do_classifier_free_guidance=False,
        **({"num_images_per_prompt": 1} if name != "sdxl" else {}),
    )
    torch.testing.assert_close(cond["encoder_hidden_states"], theirs[0], atol=1e-5, rtol=0)
    assert not torch.equal(cond["encoder_hidden_states"][0], cond["encoder_hidden_states"][1])
    calls.clear()
    again = conditions("a cat", size=(24, 16))
    assert not calls
    assert torch.equal(again["encoder_hidden_states"], cond["encoder_hidden_states"][:1])
    if name == "sdxl":
        assert cond["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]] * 3


def test_only_the_last_prompts_are_kept(model):
    conditions = Conditions(model)
    rows = conditions([str(number) for number in range(100)], size=(16, 16))
    assert len(rows["encoder_hidden_states"]) == 100
    assert len(conditions._kept) == 64


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_clip_reads_long_prompts_in_pieces(name):
    model = from_pipeline(tiny.pipeline(name))
    tower, conditions = model.prompts.towers[0], Conditions(model)
    long = "a horse on a hill, " * 20
    ids = tower.tokenizer(long).input_ids
    assert len(ids) > 3 * 77
    pieces = [torch.tensor([[ids[0], *ids[1:-1][start : start + 75], ids[-1]]]) for start in (0, 75, 150)]
    states = [tower.encoder(piece, output_hidden_states=True) for piece in pieces]
    expected = [out.hidden_states[-2] if name == "sdxl" else out[0] for out in states]
    cond = conditions(long, size=(16, 16))
    width = expected[0].shape[-1]
    found = cond["encoder_hidden_states"]
    torch.testing.assert_close(found[:, :231, :width], torch.cat(expected, 1), atol=1e-5, rtol=0)
    assert found.shape[1] == 77 * -(-(len(ids) - 2) // 75)
    if name == "sdxl":
        torch.testing.assert_close(cond["text_embeds"], model.prompts([long])["text_embeds"], atol=1e-5, rtol=0)


def test_a_long_prompt_beside_a_short_one_changes_neither():
    model = from_pipeline(tiny.pipeline("sd15"))
    conditions, prompts = Conditions(model), ["a horse", "a horse on a hill, " * 10]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 50.0)
    with torch.no_grad():
        both = model.denoiser(x, t, conditions(prompts, size=(16, 16))).noise
        alone = [
            model.denoiser(x[place : place + 1], t[:1], conditions(prompt, size=(16, 16))).noise
            for place, prompt in enumerate(prompts)
        ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)
    assert not torch.allclose(alone[1], model.denoiser(x[1:], t[:1], model.prompts(prompts[1:])).noise, atol=1e-4)


def test_a_cut_prompt_is_told():
    conditions = Conditions(from_pipeline(tiny.pipeline("pixart")))
    with pytest.warns(UserWarning, match="does not see the end of 'x{70}.*'x+"):
        conditions("x" * 1000, size=(16, 16))


def test_models_without_text_encoders_take_no_prompt():
    with pytest.raises(UserError, match="came without text encoders; leave it empty"):
        Conditions(tiny.model("sd15"))("a cat", size=(16, 16))
    with pytest.raises(IncompatibleModelError, match="takes encoder_hidden_states and came without"):
        Conditions(tiny.model("sd15"))("", size=(16, 16))
    with pytest.raises(UserError, match="takes no prompts; leave it empty"):
        Conditions(tiny.model("dit"))("a cat", size=(16, 16))
    assert Conditions(tiny.model("dit"))(["", ""], size=(16, 16))["class_labels"].tolist() == [0, 0]
    labels = {"class_labels": torch.tensor([3, 4])}
    assert Conditions(tiny.model("dit"), labels)("", size=(16, 16))["class_labels"].tolist() == [3, 4]
    states = {"encoder_hidden_states": torch.zeros(1, 7, 32)}
    assert Conditions(tiny.model("sd15"), states)("", size=(16, 16)).keys() == states.keys()


def test_latents_are_the_mode_or_draws_that_depend_on_the_key_alone(model):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x0 = encode(model, images)
    assert torch.equal(x0, model.codec.encode(images))
    torch.testing.assert_close(encode(model, images, in_batches=InBatches(3)), x0, atol=1e-5, rtol=0)
    mean, std = posterior(model, images)
    one = encode(model, images, [1, 2, 3, 4], sample=True, seed=5)
    assert torch.equal(one, drawn(mean, std, [1, 2, 3, 4], seed=5))
    # The same number of standard deviations from the mean, whichever image has the key.
    other = drawn(mean, std, [4, 3, 2, 1], seed=5)
    torch.testing.assert_close((other[0] - mean[0]) / std[0], (one[3] - mean[3]) / std[3], atol=1e-4, rtol=0)
    draws = torch.stack([(drawn(mean, std, [1, 2, 3, 4], draw=draw) - mean) / std for draw in range(60)])
    assert abs(float(torch.corrcoef(draws[:2].flatten(1))[0, 1])) < 0.1
    assert abs(float(draws.mean())) < 0.02
    assert abs(float(draws.std()) - 1) < 0.02
    with pytest.raises(ValueError, match="without `keys`"):
        encode(model, images, sample=True)
    with pytest.raises(IncompatibleModelError, match="without an autoencoder"):
        encode(from_pipeline(tiny.backbone("sd15"), scheduler=diffusers.DDIMScheduler()), images)
