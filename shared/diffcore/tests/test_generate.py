"""Images equal those of the library's pipelines, whatever the batches; options, models without prompts, refusals."""

import warnings

import diffusers
import pytest
import torch

from diffcore.denoiser import sample
from diffcore.errors import IncompatibleModelError
from diffcore.models import generate, load
from diffcore.noise import row_noise
from diffcore.runtime import Runtime
from diffcore.testing import tiny

PROMPTS = ["a cat on a mat", "two dogs"]
SEEDS = [3, 11, 4]


@pytest.fixture
def model(loaded):
    return loaded("sd15")[1]


@pytest.fixture
def calls(model):
    """Sizes of the batches that the backbone sees."""
    sizes: list[int] = []
    hook = model.backbone.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def pixels(folder, **changes):
    unet = tiny.backbone("unet2d", **changes)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return load(folder, Runtime(device="cpu"))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("negative", ["", "a dog"])
def test_images_are_those_of_the_pipeline(loaded, name, negative):
    pipeline, model = loaded(name)
    options = {"guidance_scale": 4.0, "negative_prompt": negative}
    solver = "euler" if name == "sd3" else "ddim"
    ours = generate(model, PROMPTS, seeds=SEEDS, steps=2, solver=solver, **options)
    assert ours.shape == (2, 3, 3, 16, 16)
    for place, seed in enumerate(SEEDS):
        latents = row_noise(0, [seed, seed], model.shape)
        text = [options["negative_prompt"]] * 2 if negative else None  # the library's own "none"
        theirs = pipeline(
            PROMPTS, **options | {"negative_prompt": text}, latents=latents, num_inference_steps=2, output_type="pt"
        )
        torch.testing.assert_close(ours[:, place], theirs.images, atol=1e-5, rtol=0)
    assert float((ours[0] - ours[1]).abs().max()) > 1e-3


def test_the_size_asked_for_reaches_noise_and_condition(loaded):
    pipeline, model = loaded("sdxl")
    ours = generate(model, PROMPTS, seeds=[5], steps=2, guidance_scale=3.0, size=32)
    theirs = pipeline(
        PROMPTS,
        latents=row_noise(0, [5, 5], (4, 16, 16)),
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="pt",
        height=32,
        width=32,
    )
    torch.testing.assert_close(ours[:, 0], theirs.images, atol=1e-5, rtol=0)


def test_classes_are_guided_away_from_the_class_that_means_none(loaded):
    _, model = loaded("dit")
    options = {"seeds": [0], "steps": 2}
    guided = generate(model, labels=[3, 5], guidance_scale=3.0, **options)
    both, none = ({"class_labels": torch.tensor(labels)} for labels in ([3, 5], [10]))
    assert torch.equal(guided, generate(model, condition=both, uncond=none, guidance_scale=3.0, **options))
    assert not torch.allclose(guided, generate(model, labels=[3, 5], **options))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batches_are_full_and_change_last_bits_only(model, calls, batch_size):
    expected = torch.stack([generate(model, [p], seeds=SEEDS, steps=2, batch_size=3)[0] for p in PROMPTS])
    calls.clear()
    seen = []
    options = {"steps": 2, "batch_size": batch_size, "on_batch": lambda done, total: seen.append((done, total))}
    images = generate(model, PROMPTS, seeds=SEEDS, **options)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert calls[::2] == {1: [1] * 6, 4: [4, 2], 64: [6]}[batch_size]
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == {1: [1, 2, 3, 4, 5, 6], 4: [4, 6], 64: [6]}[batch_size]


def test_short_memory_halves_batches_of_backbone_and_codec_apart(model, calls, monkeypatch):
    expected = generate(model, PROMPTS, seeds=SEEDS, steps=1)
    decode, sizes = model.codec.decode, []
    calls.clear()

    def narrow(x0):
        sizes.append(len(x0))
        if len(x0) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(x0)

    torch.testing.assert_close(generate(model, PROMPTS, seeds=SEEDS, steps=1, decode=narrow), expected)
    assert calls == [6]
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]


def test_noise_of_prompts_can_be_their_own(model):
    noise = torch.randn(2, 3, 4, 8, 8)
    images = generate(model, PROMPTS, seeds=SEEDS, noise=noise, steps=2)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], seeds=SEEDS, noise=noise[index : index + 1], steps=2)[0]
        torch.testing.assert_close(images[index], alone, atol=1e-5, rtol=0)


def test_the_key_of_the_noise_matters_and_fresh_noise_depends_on_the_seed_alone(model):
    first, other = (generate(model, PROMPTS, seeds=SEEDS, steps=2, seed=key) for key in (0, 1))
    assert not torch.allclose(first, other)
    fresh = generate(model, PROMPTS, seeds=SEEDS, steps=3, eta=1.0)
    alone = generate(model, PROMPTS[1:], seeds=SEEDS[1:2], steps=3, eta=1.0)
    torch.testing.assert_close(fresh[1:, 1:2], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(fresh, generate(model, PROMPTS, seeds=SEEDS, steps=3))


def test_a_one_step_generator_takes_the_place_of_the_solver(model, calls):
    def one_step(noise, cond):
        t = torch.full((len(noise),), 499.0)
        return model.denoiser(noise, t, cond).x0

    images = generate(model, PROMPTS, seeds=SEEDS, generator=one_step, guidance_scale=7.0)
    assert calls == [6]
    noise, cond = row_noise(0, SEEDS, model.shape), model.prompts(PROMPTS[1:])
    cond = {key: value.expand(3, *value.shape[1:]) for key, value in cond.items()}
    x0 = model.denoiser(noise, torch.full((3,), 499.0), cond).x0
    torch.testing.assert_close(images[1], model.codec.decode(x0), atol=1e-5, rtol=0)
    single = generate(model, PROMPTS, seeds=SEEDS, timesteps=torch.tensor([499.0]), decode=lambda x0: x0)
    latents = sample(model.denoiser, noise, cond, timesteps=torch.tensor([499.0]))
    torch.testing.assert_close(single[1], latents, atol=1e-5, rtol=0)


def test_models_without_prompts_generate_one_row_of_pixels(tmp_path):
    model = pixels(tmp_path, num_class_embeds=None)
    images = generate(model, seeds=range(4), steps=2)
    assert images.shape == (1, 4, 3, 8, 8)
    x0 = sample(model.denoiser, row_noise(0, range(4), (3, 8, 8)), {}, steps=2)
    assert torch.equal(images[0], model.codec.decode(x0))


def test_labels_reach_the_backbone_and_must_be_given(tmp_path):
    model = pixels(tmp_path)
    images = generate(model, labels=[1, 7], seeds=SEEDS, steps=2)
    seven = generate(model, labels=torch.tensor([7]), seeds=SEEDS, steps=2)[0]
    torch.testing.assert_close(images[1], seven, atol=1e-5, rtol=0)
    assert not torch.allclose(images[0], images[1])
    with pytest.raises(ValueError, match="give `labels`"):
        generate(model, seeds=SEEDS)
    with pytest.raises(ValueError, match="needs an `uncond`"):
        generate(model, labels=[1], seeds=SEEDS, guidance_scale=2.0)
    with pytest.raises(IncompatibleModelError, match="takes no prompts"):
        generate(model, PROMPTS, seeds=SEEDS)


def test_prompts_that_are_cut_are_told_of_once(model):
    with pytest.warns(UserWarning, match="2 of 3 prompts are too long") as told:
        generate(model, ["x " * 100, "a cat", "y " * 100], seeds=SEEDS, steps=1, batch_size=2)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, PROMPTS, seeds=SEEDS, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": PROMPTS, "labels": [1, 2]}, "`prompts` and `labels` exclude each other"),
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": PROMPTS, "seeds": []}, "nothing to generate"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"seeds": SEEDS} | options)
    with pytest.raises(TypeError, match="pass a list"):
        generate(model, "a cat", seeds=SEEDS)
