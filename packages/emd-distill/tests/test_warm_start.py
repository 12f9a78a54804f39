"""Generators that do not come from the teacher's weights: noise from any latent, smaller networks, and their start."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffcore.cli import main
from diffcore.denoiser import EDMSchedule, NetworkDenoiser
from diffcore.errors import UserError
from diffcore.models import load
from diffcore.noise import philox_normal, row_noise
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from emd_distill.app import training as harness
from emd_distill.app.cli import app
from emd_distill.distill import Settings, distill
from emd_distill.draws import Draws
from emd_distill.files.export import export
from emd_distill.files.generators import load_generator
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD
from emd_distill.module import DistillModule
from emd_distill.noise_levels import noise_levels
from emd_distill.warm_start import lifted, smaller, warm_start

from .test_distill import Score, four_modes

CLASSES = 10
FEW = [
    "--steps", "2", "--batch-size", "4", "--preset", "toy", "--device", "cpu", "--num-langevin-steps", "1",
    "--num-looks", "1",
]  # fmt: skip
SMALL = [*FEW, "--generator-width", "0.5", "--warm-up-steps", "3"]


class Linear(nn.Module):
    """A generator whose best answer is known: a matrix."""

    def __init__(self, latent: int, data: int) -> None:
        super().__init__()
        self.net = nn.Linear(latent, data, bias=False)

    def forward(self, z: Tensor, condition: object = None) -> Tensor:
        return self.net(z)


@pytest.mark.parametrize("latent", [3, 12, 20])
def test_noise_of_any_latent_is_standard_normal_and_holds_the_latent(latent: int):
    rows = torch.arange(20_000)
    z = philox_normal(0, rows, (latent,))
    rest = None if latent == 12 else philox_normal(1, rows, (3, 4))
    noise = lifted(z, rest)
    if latent == 12:
        assert noise is z
        return
    flat = noise.flatten(1)
    assert noise.shape == (20_000, 3, 4)
    assert flat.mean(0).abs().max() < 4 / 20_000**0.5
    assert (flat.T @ flat / 20_000 - torch.eye(12)).abs().max() < 0.04
    # As many numbers are functions of the latent as there can be, and the rest of none.
    held = torch.linalg.svdvals((z.T @ flat / 20_000).double())
    assert int((held > 0.95).sum()) == min(latent, 12)
    assert int((held < 0.05).sum()) == len(held) - min(latent, 12)


@pytest.mark.parametrize("latent", [3, 8])
def test_it_finds_the_mean_over_what_the_latent_leaves_open(latent: int):
    teacher = Linear(8, 5).requires_grad_(False)
    teacher.net.weight.copy_(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))

    def start(noise: Tensor, condition: object) -> Tensor:
        return teacher(noise.flatten(1))

    generator = Linear(latent, 5)
    data = (8,) if latent == 3 else None
    losses = warm_start(generator, start, (latent,), data_shape=data, steps=600, batch_size=256, learning_rate=0.05)
    assert losses.shape == (600,)
    z = torch.eye(latent)
    best = teacher.net.weight if latent == 8 else teacher(lifted(z, torch.zeros(3, 8))).T
    torch.testing.assert_close(generator.net.weight.detach(), best, atol=0.03, rtol=0)
    open_ = float((teacher.net.weight.square().sum() - best.square().sum()) / 5)  # variance that no 3 numbers hold
    assert float(losses[-50:].mean()) == pytest.approx(open_, abs=0.1)


def test_the_start_is_a_function_of_the_seed_and_leaves_the_teacher_alone():
    def run(seed: int) -> Tensor:
        torch.manual_seed(0)
        generator = Linear(2, 2)
        warm_start(generator, lambda z, c: 2 * z, (2,), steps=3, batch_size=4, seed=seed)
        return generator.net.weight.detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    teacher = tiny.denoiser("unet2d")
    before = copy.deepcopy(teacher.state_dict())
    small = OneStepGenerator(smaller(teacher, 0.5), 900).requires_grad_(False)  # as loaded models come
    calls: list[int] = []
    classes = {"class_labels": torch.arange(4) % CLASSES}
    shape = tiny.model("unet2d").shape
    warm_start(
        small, OneStepGenerator(teacher, 900), shape, conditions=lambda step, rows: classes, steps=2, batch_size=4,
        on_step=calls.append,
    )  # fmt: skip
    assert calls == [1, 2]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(part.requires_grad for part in small.parameters())
    assert not small.training


def test_it_imitates_conditions_row_by_row():
    seen: list[Tensor] = []
    noises: list[Tensor] = []

    def start(noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        seen.append(condition["class_labels"])
        noises.append(noise)
        return noise

    warm_start(
        Linear(2, 2), start, (2,), conditions=lambda step, rows: {"class_labels": (rows + step) % 3}, steps=2,
        batch_size=4,
    )  # fmt: skip
    assert [one.tolist() for one in seen] == [[0, 1, 2, 0], [1, 2, 0, 1]]
    assert not torch.equal(*noises)


@pytest.mark.parametrize("family", ["unet2d", "sd15"])
def test_a_smaller_network_is_of_the_teachers_kind(family: str):
    teacher = tiny.denoiser(family)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    half = smaller(teacher, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(half.backbone) is type(teacher.backbone)
    assert tuple(half.backbone.config["block_out_channels"]) == (16, 32)
    assert (half.schedule, half.prediction_type) == (teacher.schedule, teacher.prediction_type)
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), smaller(teacher, 0.5).parameters(), strict=True))
    assert not torch.equal(next(half.parameters()), next(smaller(teacher, 0.5, seed=1).parameters()))
    assert smaller(copy.deepcopy(teacher).to(torch.bfloat16), 0.5).backbone.dtype == torch.bfloat16


def test_networks_that_cannot_be_cut_are_refused():
    teacher = tiny.denoiser("unet2d")
    with pytest.raises(ValueError, match="between 0 and 1"):
        smaller(teacher, 1.0)
    with pytest.raises(UserError, match="whole groups of 8"):
        smaller(teacher, 0.99)
    with pytest.raises(UserError, match="Score is no U-Net of diffusers"):
        smaller(NetworkDenoiser(Score(), EDMSchedule(), "edm"), 0.5)


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"steps": 0}, "`steps` is 0"), ({"batch_size": 0}, "`batch_size` is 0"), ({"learning_rate": 0.0}, "positive")],
)
def test_bad_numbers_are_refused(changed: dict[str, float], told: str):
    with pytest.raises(ValueError, match=told):
        warm_start(Linear(2, 2), lambda z, c: z, (2,), **changed)


def test_a_generator_with_another_latent_is_warmed_up_and_distilled():
    teacher = four_modes()
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 2))

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = generator

        def forward(self, z: Tensor, condition: object = None) -> Tensor:
            return self.net(z)

    made, student = Deep(), NetworkDenoiser(Score(), EDMSchedule(), "edm")
    warm_start(made, OneStepGenerator(teacher, 2.5), (5,), data_shape=(2,), steps=200)
    settings = Settings(
        loss=EMD(num_steps=4, gamma_z=0.0), steps=250, ema=0.95, batch_size=64, learning_rate=1e-3,
        student_learning_rate=2e-3,
    )  # fmt: skip
    levels = noise_levels(teacher.schedule, "loguniform", low=0.05, high=3.0)
    done = distill(teacher, made, (5,), settings, data_shape=(2,), student=student, time_sampler=levels)
    with torch.no_grad():
        x = done.generator(torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)))
    shares = [float(((x.sign() * 0.5 - mean).abs().sum(1) < 1e-6).float().mean()) for mean in teacher.means.float()]
    assert min(shares) > 0.1


def test_lightning_draws_samples_and_latents_in_their_own_shapes():
    student = NetworkDenoiser(Score(), EDMSchedule(), "edm")
    module = DistillModule(four_modes(), Linear(5, 2), (5,), Settings(batch_size=4), data_shape=(2,), student=student)
    drawn = module.draws(0, torch.arange(4))
    assert (tuple(drawn.z.shape), tuple(drawn.eps.shape)) == ((4, 5), (4, 2))


def test_draws_of_the_start_are_apart_from_those_of_the_training():
    seen: list[Tensor] = []

    def start(noise: Tensor, condition: object) -> Tensor:
        seen.append(noise)
        return noise

    warm_start(Linear(2, 2), start, (2,), steps=1, batch_size=4)
    drawn = Draws(0, (2,), lambda u: u)(0, torch.arange(4))
    assert not any(torch.equal(seen[0], other) for other in (drawn.z, drawn.eps))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class-conditional network and a text-to-image pipeline, each with a smaller generator's run."""
    folder = tmp_path_factory.mktemp("models")
    tiny.model("unet2d").save(folder / "classes")
    tiny.pipeline("sd15").save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    for name, given in (("classes", []), ("pipeline", ["--prompts", str(folder / "prompts.txt")])):
        assert main(app, ["train", str(folder / name), *given, *SMALL, "--out", str(folder / f"run-{name}")]) == 0
    return folder


@pytest.mark.parametrize("name", ["classes", "pipeline"])
def test_a_smaller_generator_is_trained_read_and_exported(folder: Path, tmp_path: Path, name: str):
    stored = load_generator(folder / f"run-{name}")
    assert stored.model is not None
    assert tuple(stored.generator.denoiser.backbone.config["block_out_channels"]) == (16, 32)
    assert tuple(stored.model.backbone.config["block_out_channels"]) == (32, 64)
    page = (folder / f"run-{name}" / "report.html").read_text()
    assert "Warming up" in page
    done = export(stored.model, stored.generator, tmp_path / "one-step")
    assert done.error is not None
    assert done.error < 1e-5
    again = load_generator(tmp_path / "one-step").generator
    z, given = row_noise(0, range(2), stored.model.shape), stored.model.empty_condition(2)
    with torch.no_grad():
        torch.testing.assert_close(again(z, given), stored.generator(z, given), atol=1e-5, rtol=1e-5)


def test_warming_up_is_done_once_and_before_the_first_iteration(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with Run.reopen(folder / "run-classes") as run:
        kept, first = run.load("warm-up"), harness.looks_of(run)[0]
    assert len(kept.fields["losses"]) == 3
    teacher = load(folder / "classes", Runtime(device="cpu"))
    start = OneStepGenerator(smaller(teacher.denoiser, 0.5), load_generator(folder / "run-classes").generator.t)
    start.denoiser.backbone.load_state_dict(kept.tensors)
    z, labels = row_noise(0, range(harness.SHOWN), teacher.shape), torch.arange(harness.SHOWN) % CLASSES
    with torch.no_grad():
        seen = teacher.codec.decode(start(z, {"class_labels": labels}))
    torch.testing.assert_close(first.tensors["pictures"], seen, atol=1e-5, rtol=1e-5)


def test_an_interrupted_training_warms_up_no_second_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = ["train", str(folder / "classes"), *SMALL, "--out", str(tmp_path / "run")]

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(harness, "fit", stop)
        assert main(app, command) == 130
    monkeypatch.setattr(harness, "warm_start", stop)
    assert main(app, command) == 0
    whole, parts = load_generator(folder / "run-classes").generator, load_generator(tmp_path / "run").generator
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_start_that_diverges_is_said_to(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["train", str(folder / "classes"), *SMALL, "--warm-up-learning-rate", "1e30"]
    assert main(app, [*command, "--out", str(tmp_path / "run")]) == 3
    assert "give a smaller --warm-up-learning-rate" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--generator-width", "1.5"], "--generator-width is 1.5"),
        (["--generator-width", "0.99"], "--generator-width is 0.99, and channels come in whole groups of 8"),
        (["--generator-width", "0.5", "--lora-rank", "2"], "--generator-width and --lora-rank"),
        (["--warm-up-steps", "0"], "--warm-up-steps is 0"),
        (["--warm-up-learning-rate", "0"], "--warm-up-learning-rate is 0"),
    ],
)
def test_the_command_names_its_options(folder: Path, capsys: pytest.CaptureFixture[str], given: list[str], told: str):
    assert main(app, ["train", str(folder / "classes"), *FEW, *given, "--dry-run"]) == 2
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_plan_tells_what_a_smaller_generator_takes(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(app, ["train", str(folder / "classes"), *SMALL, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    told = json.dumps(plan)
    assert "0.5 of the teacher's channels" in told
    assert "3 steps of warming up" in told
