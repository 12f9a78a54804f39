import gc
import weakref

import pytest
import torch

from diffcore.errors import IncompatibleModelError, NoMatchError
from diffcore.hooks import Site, stream
from diffcore.hooks.match import modules_of
from diffcore.models import load
from diffcore.noise import row_noise
from diffcore.runtime import Runtime
from diffcore.testing import tiny

TIMES = {"unet2d": (0.3, 2.0), "sd3": (0.2, 0.7), "flux": (0.2, 0.7)}
DEFAULT_TIMES = (50, 600)


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request):
    """A model, its timesteps, three images and their conditions."""
    name = request.param
    model = tiny.model(name)
    side = 8 if name == "unet2d" else 16
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return model, TIMES.get(name, DEFAULT_TIMES), images, tiny.inputs(name, batch=3)[2]


def some_of(model):
    """Every fourth module of a backbone; Flux's table of positions has no rows."""
    modules = modules_of(model.backbone).items()
    names = [name for name, module in modules if name and not isinstance(module, torch.nn.ModuleList)]
    return [name for name in names if name != "pos_embed"][::4]


@pytest.fixture(scope="module")
def pixels():
    return tiny.model("unet2d"), torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def by_hand(model, images, cond, t, seed):
    """Every module's output in a whole forward pass, by the plainest hooks; the first call of each."""
    x0 = 2 * images - 1
    if hasattr(model.codec, "vae"):
        vae = model.codec.vae
        x0 = (vae.encode(x0).latent_dist.mode() - model.codec.shift) * model.codec.scaling
    x0 = x0.contiguous()  # kernels for other layouts differ in the last bits
    times = torch.full((len(images),), float(t))
    alpha, sigma = (level[:, None, None, None] for level in model.denoiser.schedule.alpha_sigma(times))
    x_t = alpha * x0 + sigma * torch.cat([row_noise(seed, [i], x0.shape[1:]) for i in range(len(images))])
    found = {}

    def hook(name):
        def keep(module, args, output):
            first = output if isinstance(output, torch.Tensor) else next(x for x in output if x is not None)
            found.setdefault(name, first.detach().clone())

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.backbone.named_modules() if name]
    with torch.no_grad():
        model.denoiser(x_t, times, cond)
    for handle in handles:
        handle.remove()
    return found


def test_all_activations_equal_those_of_plain_hooks(family):
    model, times, images, cond = family
    sites = some_of(model)
    seen = list(stream(model, images, sites, t=times, seeds=(0, 7), cond=cond))
    assert [(batch.rows, batch.seed, batch.t) for batch in seen] == [
        (range(3), seed, float(t)) for seed in (0, 7) for t in times
    ]
    for batch in seen:
        expected = by_hand(model, images, cond, batch.t, batch.seed)
        assert batch.activations.keys() == set(sites)
        assert all(torch.equal(value, expected[name]) for name, value in batch.activations.items())
        assert all(value.grad_fn is None for value in batch.activations.values())


def test_the_size_of_batches_changes_nothing(family):
    model, times, images, cond = family
    sites = some_of(model)
    together = list(stream(model, images, sites, t=times, seeds=7, cond=cond, batch_size=3))
    apart = list(stream(model, images, sites, t=times, seeds=7, cond=cond, batch_size=2))
    assert [batch.rows for batch in apart] == [range(2)] * 2 + [range(2, 3)] * 2
    for first, second, whole in zip(apart[:2], apart[2:], together, strict=True):
        assert first.t == second.t == whole.t
        for name, value in whole.activations.items():
            joined = torch.cat([first.activations[name], second.activations[name]])
            assert torch.allclose(joined, value, rtol=2e-5, atol=2e-5), name


def test_loaders_tensors_and_single_images_are_one_data_set(pixels):
    model, images = pixels
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    results = [
        torch.cat([batch.activations["mid_block"] for batch in stream(model, given, "mid_block", t=0.5, cond=LABELS)])
        for given in (images, loader, iter(images), [images[:4], images[4]])
    ]
    assert all(torch.equal(result, results[0]) for result in results)


LABELS = {"class_labels": torch.tensor([1, 2, 3, 4, 5])}


def test_images_of_other_sizes_go_into_batches_of_their_own(pixels):
    model, images = pixels
    given = [*images[:2], torch.rand(3, 16, 8), images[2]]
    seen = list(stream(model, given, "conv_in", t=0.5))
    assert [(batch.rows, tuple(batch.activations["conv_in"].shape)) for batch in seen] == [
        (range(2), (2, 32, 8, 8)),
        (range(2, 3), (1, 32, 16, 8)),
        (range(3, 4), (1, 32, 8, 8)),
    ]


def test_nothing_runs_after_the_last_site(pixels):
    model, images = pixels
    calls = {"mid_block.resnets.1": 0, "up_blocks.0.resnets.0": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return model.backbone.get_submodule(name).register_forward_hook(hook)

    handles = [count(name) for name in calls]
    sites = ["conv_in", "mid_block.resnets.0"]
    early = list(stream(model, images, sites, t=[0.5, 1.0], seeds=[0, 1], batch_size=2))
    assert calls == {"mid_block.resnets.1": 0, "up_blocks.0.resnets.0": 0}
    late = list(stream(model, images, sites, t=[0.5, 1.0], seeds=[0, 1], batch_size=2, stop=False))
    assert calls == {"mid_block.resnets.1": 12, "up_blocks.0.resnets.0": 12}
    for handle in handles:
        handle.remove()
    assert len(early) == len(late) == 12
    for a, b in zip(early, late, strict=True):
        assert a.activations.keys() == set(sites)
        assert all(torch.equal(a.activations[site], b.activations[site]) for site in sites)


def test_reduce_runs_in_the_hook_and_activations_are_gone_after(pixels):
    model, images = pixels
    alive = []

    def mean(name, x):
        alive.append(weakref.ref(x))
        return x.mean(dim=tuple(range(2, x.ndim)))

    gc.disable()
    try:
        means = next(stream(model, images, "*.resnets.0", t=0.5, reduce=mean, cond=LABELS)).activations
        assert len(alive) == 5
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()
    whole = next(stream(model, images, "*.resnets.0", t=0.5, cond=LABELS)).activations
    assert all(torch.equal(means[name], whole[name].mean((2, 3))) for name in whole)
    nothing = next(stream(model, images, "conv_in", t=0.5, reduce=lambda name, x: None)).activations
    assert not nothing
    assert nothing.silent == set()


def test_encoded_images_are_taken_as_they_are(family):
    model, times, images, cond = family
    sites = some_of(model)
    x0 = model.codec.encode(images)
    ours = next(stream(model, x0, sites, t=times[0], cond=cond, encoded=True)).activations
    expected = next(stream(model, images, sites, t=times[0], cond=cond)).activations
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_gradients_flow_back_to_the_latents_as_by_hand(family):
    model, times, images, cond = family
    names = [name for name, module in model.backbone.named_modules() if isinstance(module, torch.nn.Linear)][4:12:3]
    x0 = model.codec.encode(images).contiguous().requires_grad_()
    batch = next(stream(model, x0, names, t=times[0], seeds=3, cond=cond, encoded=True, grad=True))
    (ours,) = torch.autograd.grad(sum(batch.activations[name].square().sum() for name in names), x0)

    kept = []
    modules = [model.backbone.get_submodule(name) for name in names]
    handles = [module.register_forward_hook(lambda m, a, out: kept.append(out)) for module in modules]
    t = torch.full((3,), float(times[0]))
    x_t = model.denoiser.schedule.add_noise(x0, row_noise(3, range(3), x0.shape[1:]), t)
    model.denoiser(x_t, t, cond)
    for handle in handles:
        handle.remove()
    (expected,) = torch.autograd.grad(sum(value.square().sum() for value in kept), x0)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert expected.any()


def test_gradients_reach_weights_only_on_request(pixels):
    _, images = pixels
    model = tiny.model("unet2d")
    model.backbone.conv_in.weight.requires_grad_()
    modes = []
    handle = model.backbone.conv_in.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    without = next(stream(model, images, "mid_block", t=0.5)).activations["mid_block"]
    assert not without.requires_grad
    with torch.no_grad():
        batch = next(stream(model, images, "mid_block", t=0.5, grad=True))
    handle.remove()
    assert modes == [False, True]
    batch.activations["mid_block"].sum().backward()
    assert model.backbone.conv_in.weight.grad.abs().sum() > 0
    assert torch.is_grad_enabled()


def test_a_module_that_runs_twice_gives_its_first_call(pixels):
    _, images = pixels
    model = tiny.model("unet2d")
    network = model.backbone.mid_block
    network.resnets[1] = network.resnets[0]
    first = next(stream(model, images, "mid_block.resnets.0", t=0.5, stop=False)).activations
    assert len(first.calls["mid_block.resnets.0"]) == 2
    assert not torch.equal(*first.calls["mid_block.resnets.0"])
    assert torch.equal(first["mid_block.resnets.0"], first.calls["mid_block.resnets.0"][0])
    stopped = next(stream(model, images, "mid_block.resnets.0", t=0.5)).activations
    assert torch.equal(stopped["mid_block.resnets.0"], first.calls["mid_block.resnets.0"][0])


def test_a_site_that_never_runs_says_so(pixels):
    _, images = pixels
    model = tiny.model("unet2d")
    model.backbone.spare = torch.nn.Linear(2, 2)
    batch = next(stream(model, images, ["spare", "conv_in"], t=0.5))
    assert batch.activations.keys() == {"conv_in"}
    with pytest.raises(NoMatchError, match="'spare' was never called"):
        batch.activations["spare"]


def test_inputs_of_modules_are_sites_too(pixels):
    model, images = pixels
    sites = [Site("mid_block", "input", "before"), "mid_block"]
    activations = next(stream(model, images, sites, t=0.5)).activations
    below = next(stream(model, images, "down_blocks.1", t=0.5)).activations["down_blocks.1"]
    assert torch.equal(activations["before"], below)


def test_without_a_condition_the_prompt_is_empty(tmp_path):
    tiny.pipeline("sd15").save_pretrained(tmp_path)
    model = load(tmp_path, Runtime(device="cpu"))
    images = torch.rand(2, 3, 16, 16)
    site = "*.attn2.to_k"
    empty, given, other = (
        next(stream(model, images, site, t=50, cond=cond)).activations
        for cond in (None, model.prompts([""] * 2), model.prompts(["a cat"]))
    )
    assert all(torch.equal(empty[name], value) for name, value in given.items())
    assert not any(torch.equal(empty[name], value) for name, value in other.items())


def test_conditions_go_with_their_images(pixels):
    model, images = pixels
    apart = list(stream(model, images, "mid_block", t=0.5, cond=LABELS, batch_size=2))
    for batch in apart:
        for place, row in enumerate(batch.rows):
            label = {"class_labels": LABELS["class_labels"][row : row + 1]}
            alone = [*stream(model, images, "mid_block", t=0.5, cond=label, batch_size=1)][row]
            found = batch.activations["mid_block"][place]
            torch.testing.assert_close(found, alone.activations["mid_block"][0], rtol=2e-5, atol=2e-5)


def test_bad_input_is_refused(pixels):
    model, images = pixels
    with pytest.raises(NoMatchError, match=r"no module of UNet2DModel matches 'mid_blok'"):
        next(stream(model, images, "mid_blok", t=0.5))
    with pytest.raises(ValueError, match="class_labels of the condition has 3 rows; give one, or one per image"):
        list(stream(model, images, "conv_in", t=0.5, cond={"class_labels": torch.arange(3)}, batch_size=2))
    with pytest.raises(TypeError, match=r"images yielded dict; pass floating point tensors"):
        next(stream(model, iter([{"image": images}]), "conv_in", t=0.5))
    with pytest.raises(TypeError, match=r"images yielded torch.uint8 \(3, 8, 8\)"):
        next(stream(model, (255 * images).to(torch.uint8), "conv_in", t=0.5))
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(stream(model, images, "conv_in", t=0.5, batch_size=0))
    with pytest.raises(ValueError, match="there are 1000 timesteps"):
        next(stream(tiny.model("dit"), torch.rand(1, 3, 16, 16), "pos_embed", t=1000))
    with pytest.raises(IncompatibleModelError, match="takes encoder_hidden_states and came without text encoders"):
        next(stream(tiny.model("sd15"), torch.rand(1, 3, 16, 16), "conv_in", t=50))
