"""Every trainer under examples/: with a network that returns its input, its loss is that by hand.

By hand means: from the images, the noise as drawn, and the permutation that the assignment returned. A target or a
noisy sample of unpermuted noise, an offset before the assignment, and images that were changed on the way all give
other losses.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from diffcore.testing import tiny
from immiscible_noise import ExactAssignmentPlanSampler, assign_noise, callback, plan_sampler

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
CAPTIONS = [f"picture number {i}" for i in range(8)]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Witness:
    """Stands in for `assign_noise` and for a network: keeps what each saw, and returns the input of the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.draws: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.times: list[Tensor] = []
        self.labels: Any = None
        for module in modules:
            monkeypatch.setattr(module, "assign_noise", self.assign)
        self.patch = monkeypatch

    def assign(self, x: Tensor, noise: Tensor, *, return_info: bool = False, **options: Any) -> Any:
        assert not self.draws, "one line is enough"
        self.x, self.labels = x.clone(), options.get("labels")
        self.draws.append(noise.clone())
        assigned, info = assign_noise(x, noise, return_info=True, **options)
        self.permutation = info.permutation
        assert not torch.equal(info.permutation, torch.arange(len(x)))
        return (assigned, info) if return_info else assigned

    @property
    def noise(self) -> Tensor:
        """The noise as drawn, in the order of the permutation."""
        return self.draws[0][self.permutation]

    def fake(self, network: nn.Module, time: str | None = None) -> None:
        """Lets a network return its input, and keeps that and its times."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(x.clone())
            self.times.append(kwargs[time].clone() if time else args[0].clone())
            return UNet2DOutput(sample=x)

        self.patch.setattr(network, "forward", forward)


def pixels(rows: int = 8) -> Tensor:
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents_of(pipe: Any, seed: int) -> Tensor:
    """Returns the latents that a step finds whose first random numbers are those of the encoder."""
    torch.manual_seed(seed)
    vae = pipe.vae.config
    return (pipe.vae.encode(pixels()).latent_dist.sample() - (vae.shift_factor or 0)) * vae.scaling_factor


def drawn(x: Tensor, noise: Tensor) -> None:
    """Checks that noise is as it was drawn: neither offset nor scaled, whatever the images are."""
    assert noise.shape == x.shape
    assert noise.flatten(2).mean(-1).abs().max() < 6 / math.sqrt(noise[0, 0].numel())
    assert noise.flatten(1).std(1).sub(1).abs().max() < 0.5


def diffused(x: Tensor, noise: Tensor, t: Tensor, scheduler: Any) -> Tensor:
    kept = scheduler.alphas_cumprod[t][:, None, None, None]
    return kept.sqrt() * x + (1 - kept).sqrt() * noise


def effective(x: Tensor, x_t: Tensor, t: Tensor, scheduler: Any) -> Tensor:
    """Returns the noise that a noisy sample holds."""
    kept = scheduler.alphas_cumprod[t][:, None, None, None]
    return (x_t - kept.sqrt() * x) / (1 - kept).sqrt()


def sd_step(name: str, kind: str = "sd15") -> Callable[..., tuple[ModuleType, Any, Any, Callable[..., Tensor]]]:
    def build() -> tuple[ModuleType, Any, Any, Callable[..., Tensor]]:
        module, pipe = example(name), tiny.pipeline(kind)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        return module, pipe, scheduler, lambda **more: module.loss(pipe, scheduler, pixels(), CAPTIONS, **more)

    return build


STABLE = [
    ("train_text_to_image", "sd15"),
    ("train_text_to_image_lora", "sd15"),
    ("train_text_to_image_sdxl", "sdxl"),
]


@pytest.mark.parametrize(("name", "kind"), STABLE)
def test_text_to_image(name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    module, pipe, scheduler, step = sd_step(name, kind)()
    witness = Witness(monkeypatch, module)
    witness.fake(pipe.unet)
    expected = latents_of(pipe, 0)
    torch.manual_seed(0)
    loss = step()
    drawn(expected, witness.draws[0])
    x_t = diffused(expected, witness.noise, witness.times[0], scheduler)
    torch.testing.assert_close(witness.x, expected)
    torch.testing.assert_close(loss, (x_t - witness.noise).square().mean())


@pytest.mark.parametrize(("name", "kind"), STABLE)
def test_the_noise_offset_is_added_to_assigned_noise(name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    module, pipe, scheduler, step = sd_step(name, kind)()
    witness = Witness(monkeypatch, module)
    witness.fake(pipe.unet)
    torch.manual_seed(0)
    loss = step(noise_offset=100.0)
    drawn(witness.x, witness.draws[0])
    noise = effective(witness.x, witness.seen[0], witness.times[0], scheduler)
    offset = noise - witness.noise
    assert offset.std() > 50
    torch.testing.assert_close(offset, offset.mean((2, 3), keepdim=True).expand_as(offset), rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(loss, (witness.seen[0] - noise).square().mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_input_perturbation_is_in_the_sample_alone(prediction: str, monkeypatch: pytest.MonkeyPatch):
    module, pipe, scheduler, step = sd_step("train_text_to_image")()
    scheduler.register_to_config(prediction_type=prediction)
    witness = Witness(monkeypatch, module)
    witness.fake(pipe.unet)
    torch.manual_seed(0)
    loss = step(input_perturbation=0.5)
    drawn(witness.x, witness.draws[0])
    t = witness.times[0]
    extra = effective(witness.x, witness.seen[0], t, scheduler) - witness.noise
    assert 0.4 < extra.std() < 0.6
    kept = scheduler.alphas_cumprod[t][:, None, None, None]
    velocity = kept.sqrt() * witness.noise - (1 - kept).sqrt() * witness.x
    target = witness.noise if prediction == "epsilon" else velocity
    torch.testing.assert_close(loss, (witness.seen[0] - target).square().mean())


def test_dreambooth_keeps_the_prior_apart(monkeypatch: pytest.MonkeyPatch):
    module, pipe = example("train_dreambooth"), tiny.pipeline("sd15")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    witness = Witness(monkeypatch, module)
    witness.fake(pipe.unet)
    expected = latents_of(pipe, 0)
    torch.manual_seed(0)
    prompts = ["a photo of sks dog"] * 4 + ["a photo of a dog"] * 4
    loss = module.loss(pipe, scheduler, pixels(), prompts, prior_weight=0.25)
    assert set(witness.permutation[:4].tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(witness.x, expected)
    error = (diffused(expected, witness.noise, witness.times[0], scheduler) - witness.noise).square()
    torch.testing.assert_close(loss, error[:4].mean() + 0.25 * error[4:].mean())


def test_sd3(monkeypatch: pytest.MonkeyPatch):
    module, pipe = example("train_dreambooth_sd3"), tiny.pipeline("sd3")
    witness = Witness(monkeypatch, module)
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, states, pooled, t, **_: seen(witness, x, t))
    expected = latents_of(pipe, 0)
    torch.manual_seed(0)
    loss = module.loss(pipe, pixels(), "a photo of sks dog")
    sigma = (witness.times[0] / 1000)[:, None, None, None]
    x_t = (1 - sigma) * expected + sigma * witness.noise
    torch.testing.assert_close(witness.x, expected)
    torch.testing.assert_close(loss, (x_t - (witness.noise - expected)).square().mean(), rtol=1e-4, atol=1e-5)


def test_flux(monkeypatch: pytest.MonkeyPatch):
    module, pipe = example("train_dreambooth_flux"), tiny.pipeline("flux")
    witness = Witness(monkeypatch, module)
    witness.fake(pipe.transformer, time="timestep")
    expected = latents_of(pipe, 0)
    torch.manual_seed(0)
    loss = module.loss(pipe, pixels(), "a photo of sks dog")
    assert witness.seen[0].shape == (8, 16, 16)  # packed: 4x4 tokens of 2x2 pixels in 4 channels
    sigma = witness.times[0][:, None, None, None]
    x_t = (1 - sigma) * expected + sigma * witness.noise
    torch.testing.assert_close(witness.x, expected)
    torch.testing.assert_close(loss, (x_t - (witness.noise - expected)).square().mean(), rtol=1e-4, atol=1e-5)


def seen(witness: Witness, x: Tensor, t: Tensor) -> tuple[Tensor]:
    witness.seen.append(x.clone())
    witness.times.append(t.clone())
    return (x,)


def images(rows: int = 16) -> Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


LABELS = torch.arange(16) % 4


@pytest.mark.parametrize("name", ["train_unconditional", "accelerate_loop"])
def test_loops_on_pixels(name: str, monkeypatch: pytest.MonkeyPatch):
    module, network, scheduler = example(name), tiny.backbone("unet2d"), DDPMScheduler()
    witness = Witness(monkeypatch, module)
    witness.fake(network)
    x = images()
    loss = module.loss(network, scheduler, x, *([LABELS] if name == "accelerate_loop" else []))
    assert torch.equal(x, images())
    x_t = diffused(images(), witness.noise, witness.times[0], scheduler)
    torch.testing.assert_close(loss, (x_t - witness.noise).square().mean())
    if name == "accelerate_loop":
        assert torch.equal(LABELS[witness.permutation], LABELS)


def test_edm(monkeypatch: pytest.MonkeyPatch):
    module, network = example("edm_loss"), tiny.backbone("unet2d")
    witness = Witness(monkeypatch, module)
    witness.fake(network)
    x = images()
    loss = module.loss(network, x, LABELS)
    assert torch.equal(x, images())
    assert torch.equal(LABELS[witness.permutation], LABELS)
    drawn(x, witness.draws[0])  # unit noise, before the product with sigma
    sigma = (4 * witness.times[0]).exp()[:, None, None, None]
    total = (sigma**2 + 0.25).sqrt()
    noisy = x + sigma * witness.noise
    denoised = noisy * 0.25 / total**2 + noisy / total * sigma * 0.5 / total
    weight = (total / (0.5 * sigma)) ** 2
    torch.testing.assert_close(loss, (weight * (denoised - x).square()).mean(), rtol=1e-4, atol=1e-5)


def test_flow_matching_with_the_plan_sampler(monkeypatch: pytest.MonkeyPatch):
    module, network = example("torchcfm_flow"), tiny.backbone("unet2d")
    witness = Witness(monkeypatch, plan_sampler)
    witness.fake(network)
    x = images()
    loss = module.loss(network, ExactAssignmentPlanSampler(), x, LABELS)
    assert torch.equal(x, images())
    assert torch.equal(LABELS[witness.permutation], LABELS)
    t = (witness.times[0] / 1000)[:, None, None, None]
    x_t = (1 - t) * witness.noise + t * x
    torch.testing.assert_close(loss, (x_t - (x - witness.noise)).square().mean(), rtol=1e-4, atol=1e-5)


def kohya_args(**changes: Any) -> SimpleNamespace:
    names = "noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations min_timestep "
    names += "max_timestep ip_noise_gamma ip_noise_gamma_random_strength"
    return SimpleNamespace(**{**dict.fromkeys(names.split()), **changes})


def test_kohya(monkeypatch: pytest.MonkeyPatch):
    module, pipe = example("kohya_noise"), tiny.pipeline("sd15")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    witness = Witness(monkeypatch, module)
    witness.fake(pipe.unet)
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = x.clone()
    args = kohya_args(noise_offset=100.0, min_timestep=200, max_timestep=300)
    loss = module.loss(pipe, scheduler, args, latents, torch.zeros(8, 1, 32))
    t = witness.times[0]
    assert torch.equal(latents, x)
    assert ((t >= 200) & (t < 300)).all()
    drawn(x, witness.draws[0])
    noise = effective(x, witness.seen[0], t, scheduler)
    offset = noise - witness.noise
    assert offset.std() > 50
    torch.testing.assert_close(offset, offset.mean((2, 3), keepdim=True).expand_as(offset), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(loss, (witness.seen[0] - noise).square().mean(), rtol=1e-3, atol=1e-3)


def test_kohya_perturbs_the_sample_alone_and_refuses_what_it_does_not_do(monkeypatch: pytest.MonkeyPatch):
    module, scheduler = example("kohya_noise"), DDPMScheduler()
    witness, x = Witness(monkeypatch, module), torch.randn(8, 4, 8, 8)
    noise, noisy, t = module.get_noise_noisy_latents_and_timesteps(kohya_args(ip_noise_gamma=0.5), scheduler, x)
    assert torch.equal(noise, witness.noise)
    assert 0.4 < (effective(x, noisy, t, scheduler) - noise).std() < 0.6
    with pytest.raises(NotImplementedError, match="train_util"):
        module.get_noise_noisy_latents_and_timesteps(kohya_args(multires_noise_iterations=6), scheduler, x)


def test_lightning(monkeypatch: pytest.MonkeyPatch):
    example_of, network = example("lightning_module"), tiny.backbone("unet2d")
    witness = Witness(monkeypatch, callback)
    witness.fake(network)
    module = example_of.Module(network)
    batch = {"images": images(), "labels": LABELS}
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    callback.ImmiscibleCallback("images", labels_key="labels").on_train_batch_start(trainer, module, batch, 0)
    loss = module.training_step(batch, 0)
    assert torch.equal(batch["images"], images())
    assert torch.equal(LABELS[witness.permutation], LABELS)
    x_t = diffused(images(), witness.noise, witness.times[0], module.scheduler)
    torch.testing.assert_close(loss, (x_t - witness.noise).square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]):
    with torch.random.fork_rng():
        example(name).main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) >= 3
    assert all(math.isfinite(float(line.split()[-1])) for line in lines)
