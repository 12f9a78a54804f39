"""The commands train, compare, sample and evaluate, on tiny models from folders."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from diffcore.cli import main
from diffcore.denoiser import GuidedDenoiser
from diffcore.errors import IncompatibleModelError, MachineError, UserError
from diffcore.models import generate, load
from diffcore.noise import row_noise
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from emd_distill.app import training as harness
from emd_distill.app.cli import app
from emd_distill.app.commands.use import first_of
from emd_distill.app.options_training import ChainOptions, LevelOptions, TrainingOptions, steps_of
from emd_distill.conditions import InTurn, condition_table
from emd_distill.cost import passes, weight_megabytes
from emd_distill.distill import Settings, distill
from emd_distill.files.generators import load_generator
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD, LOSSES, SiD, diff_instruct
from emd_distill.quality import Scores, losing_modes

CPU = Runtime(device="cpu")
QUICK = ["--steps", "4", "--batch-size", "4", "--log-every", "2", "--preset", "toy", "--device", "cpu"]
FEW = [*QUICK, "--num-langevin-steps", "1", "--num-looks", "2", "--checkpoint-every", "2"]
WATCHED = ["--watch-recall", "12", "--teacher-steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class-conditional EDM network, a text-to-image pipeline, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    tiny.model("unet2d").save(folder / "classes")
    tiny.pipeline("sd15").save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a cat\na dog\na cat\n")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A finished training of the class-conditional network."""
    run = folder / "trained"
    assert main(app, ["train", str(folder / "classes"), *FEW, *WATCHED, "--out", str(run)]) == 0
    return run


def weights(folder: Path) -> dict[str, Tensor]:
    return load_generator(folder).generator.state_dict()


def said(command: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Returns what a command says that fails, on one line."""
    assert main(app, command) == code
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_training_leaves_a_generator_that_draws_what_was_seen_last(trained: Path):
    loaded = load_generator(trained)
    labels = torch.arange(harness.SHOWN) % 10
    z = row_noise(0, range(harness.SHOWN), loaded.model.shape)
    with torch.no_grad():
        expected = loaded.model.codec.decode(loaded.generator(z, {"class_labels": labels}))
    with Run.reopen(trained) as run:
        looks = harness.looks_of(run)
        result = run.result
    assert [look.fields["step"] for look in looks] == [0, 2, 4]
    seconds = [look.fields["seconds"] for look in looks]
    assert seconds[0] == 0 < seconds[1] < seconds[2]
    torch.testing.assert_close(looks[-1].tensors["pictures"], expected)
    assert not torch.equal(looks[0].tensors["pictures"], expected)
    assert loaded.facts["iterations"] == 4
    assert loaded.facts["t"] == pytest.approx(2.5)
    assert loaded.facts["training"]["loss"]["gamma_z"] == 0.05
    assert result["scores"] == looks[-1].fields["scores"]
    assert None not in result.values()  # nothing is told as "warning None"
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert {
        "drift",
        "drift_1",
        "drift_5",
        "loss_g",
        "loss_phi",
        "z_move",
        "finite",
        "grad_norm_g",
        "grad_norm_phi",
    } <= set(lines[0])
    page = (trained / "report.html").read_text()
    assert all(
        part in page
        for part in (
            "Convergence",
            "Learning rates: 0.0003",
            "Norms of both networks",
            "Samples along the way",
            "Against the teacher",
        )
    )


def test_it_is_what_distill_trains(trained: Path, folder: Path):
    model = load(folder / "classes", CPU)
    generator = OneStepGenerator(load(folder / "classes", CPU).denoiser.requires_grad_(True), 2.5)
    settings = Settings(
        loss=EMD(num_steps=1, gamma_z=0.05), steps=4, batch_size=4, learning_rate=3e-4, student_learning_rate=1e-3,
        ema=0.998,
    )  # fmt: skip
    turn = InTurn({"class_labels": torch.arange(10)}, 4, 0)
    done = distill(model.denoiser, generator, model.shape, settings, conditions=turn)
    torch.testing.assert_close(weights(trained), done.generator.state_dict(), rtol=0, atol=0)


def test_accumulated_batches_take_the_conditions_of_distill(folder: Path, tmp_path: Path):
    told = ["--gradient-accumulation-steps", "2"]
    assert main(app, ["train", str(folder / "classes"), *FEW, *told, "--out", str(tmp_path / "run")]) == 0
    model = load(folder / "classes", CPU)
    generator = OneStepGenerator(load(folder / "classes", CPU).denoiser.requires_grad_(True), 2.5)
    settings = Settings(
        loss=EMD(num_steps=1, gamma_z=0.05), steps=4, batch_size=4, learning_rate=3e-4, student_learning_rate=1e-3,
        ema=0.998, gradient_accumulation_steps=2,
    )  # fmt: skip
    turn = InTurn({"class_labels": torch.arange(10)}, 8, 0)
    done = distill(model.denoiser, generator, model.shape, settings, conditions=turn)
    torch.testing.assert_close(weights(tmp_path / "run"), done.generator.state_dict(), rtol=0, atol=0)


def test_a_training_that_ends_early_is_no_success(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = True

    fit = harness.fit
    monkeypatch.setattr(harness, "fit", lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, Stop()], **k))
    command = ["train", str(folder / "classes"), *FEW, "--out", str(tmp_path / "run")]
    assert "stopped before its last iteration" in said(command, capsys, 3)
    assert not (tmp_path / "run" / "generator").exists()


def test_samples_that_are_measured_share_no_latents_with_what_they_are_measured_against(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds: dict[int, set[int]] = {}
    for name in ("drawn_images", "teacher_images"):
        draw = getattr(harness, name)

        def spy(*args: Any, draw: Any = draw, seed: int, **options: Any) -> Tensor:
            seeds.setdefault(seed, set()).add(draw.__name__)
            return draw(*args, seed=seed, **options)

        monkeypatch.setattr(harness, name, spy)
    command = ["train", str(folder / "classes"), *FEW, *WATCHED, "--steps", "1"]
    command.remove("--steps"), command.remove("4")
    assert main(app, [*command, "--out", str(tmp_path / "run")]) == 0
    assert sorted(len(names) for names in seeds.values()) == [1, 1, 1]


def test_seconds_of_training_go_on_from_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    told: dict[str, float] = {}

    def fit(*args: Any, callbacks: list[L.Callback], **options: Any) -> bool:
        (looks,) = (one for one in callbacks if isinstance(one, harness.Looks))
        looks.load_state_dict({"seconds": 1000.0})
        looks.on_train_start(L.Trainer(barebones=True), SimpleNamespace(iteration=3))
        told.update(looks.state_dict())
        raise MachineError("that is all")

    monkeypatch.setattr(harness, "fit", fit)
    said(["train", str(folder / "classes"), *FEW, "--out", str(tmp_path / "run")], capsys, 3)
    assert 1000 <= told["seconds"] < 1500


def interrupted(at: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes trainings end in one of their iterations."""
    fit = harness.fit

    class At(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: object) -> None:
            if module.iteration == at:
                act()

    monkeypatch.setattr(harness, "fit", lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, At()], **k))


def test_the_same_command_goes_on_after_a_kill(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ["train", str(folder / "classes"), *FEW, *WATCHED, "--out", str(tmp_path / "run")]
    child = os.fork()
    if child == 0:
        interrupted(3, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        main(app, command)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "run" / "generator").exists()
    assert main(app, command) == 0
    torch.testing.assert_close(weights(tmp_path / "run"), weights(trained), rtol=0, atol=0)
    assert (tmp_path / "run" / "log.jsonl").read_text() == (trained / "log.jsonl").read_text()
    with Run.reopen(tmp_path / "run") as run, Run.reopen(trained) as whole:
        for ours, theirs in zip(harness.looks_of(run), harness.looks_of(whole), strict=True):
            assert torch.equal(ours.tensors["pictures"], theirs.tensors["pictures"])


def test_a_pipeline_learns_its_prompts_with_guidance_and_encodes_each_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from diffcore.models import PromptEncoder

    encoded: list[str] = []
    call = PromptEncoder.__call__

    def spy(self: PromptEncoder, prompts: Any, **options: Any) -> Any:
        encoded.extend(prompts)
        return call(self, prompts, **options)

    monkeypatch.setattr(PromptEncoder, "__call__", spy)
    run = tmp_path / "run"
    command = ["train", str(folder / "pipeline"), "--prompts", str(folder / "prompts.txt"), *QUICK]
    command += ["--loss", "dmd", "--guidance-scale", "3", "--validation-prompts", "a cup", "--out", str(run)]
    assert main(app, command) == 0
    assert [encoded.count(text) for text in ("a cat", "a dog", "a cup")] == [1, 1, 1]
    loaded = load_generator(run)
    images = generate(loaded.model, ["a cup"], seeds=[0], generator=loaded.generator)
    with Run.reopen(run) as opened:
        seen = harness.looks_of(opened)[-1].tensors["pictures"]
    torch.testing.assert_close(seen[:1], images[0])


def test_guidance_is_the_teachers(folder: Path):
    model = load(folder / "pipeline", CPU)
    made = harness.Training(
        model, "", condition_table(model, ["a cat"]), 600.0, lambda u: u, TrainingOptions(guidance_scale=2.0), CPU
    )
    assert isinstance(made.teacher, GuidedDenoiser)
    assert made.teacher.guidance_scale == 2.0
    torch.testing.assert_close(made.uncond["encoder_hidden_states"], model.prompts([""])["encoder_hidden_states"])


def test_classes_come_in_turn_whatever_the_share_of_a_process():
    turn = InTurn({"class_labels": torch.arange(7)}, 4, 3)
    whole = torch.cat([turn(step, torch.arange(4))["class_labels"] for step in range(7)])
    assert sorted(whole[:7].tolist()) == list(range(7))
    assert torch.bincount(whole).tolist() == [4] * 7
    assert turn(5, torch.arange(2, 4))["class_labels"].tolist() == whole[22:24].tolist()


class Counted(nn.Module):
    """A backbone that counts its calls by whether gradients reach its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 2), 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


@pytest.mark.parametrize(
    "loss",
    [
        diff_instruct(),
        SiD(),
        EMD(num_steps=3, gamma_z=0.0),
        EMD(num_steps=3),
        EMD(num_steps=3, noise_cancel="stein"),
        EMD(num_steps=2, gamma_z=0.0, noise_cancel="stein"),
    ],
)
@pytest.mark.parametrize("updates", [1, 3])
def test_the_plan_counts_the_passes_that_are_made(loss: Any, updates: int):
    from diffcore.denoiser import EDMSchedule, NetworkDenoiser

    teacher, student, inner = (NetworkDenoiser(Counted(), EDMSchedule(), "edm") for _ in range(3))
    told = Settings(loss=loss, steps=1, batch_size=2, student_updates=updates)
    distill(teacher, OneStepGenerator(inner, 2.5), (2,), told, student=student)
    made = passes(loss, student_updates=updates)
    assert (made.teacher, made.student, made.generator) == tuple(
        network.backbone.calls for network in (teacher, student, inner)
    )


def test_memory_is_that_of_weights_gradients_moments_and_average():
    teacher, generator, student = (nn.Linear(1000, 1000, bias=False) for _ in range(3))
    assert weight_megabytes(teacher, generator, student, teacher_bytes=2) == pytest.approx(2 + 20 + 16)
    frozen = teacher.requires_grad_(False)
    assert weight_megabytes(teacher, frozen, frozen, teacher_bytes=2) == pytest.approx(2)  # shared, and learns nothing


def test_a_generator_is_sampled_at_fixed_seeds_whatever_the_batch(trained: Path, tmp_path: Path):
    command = ["sample", str(trained), "--count", "2", "--device", "cpu"]
    assert main(app, [*command, "--out", str(tmp_path / "a")]) == 0
    assert main(app, [*command, "--batch-size", "3", "--out", str(tmp_path / "b")]) == 0
    images = []
    for name in ("a", "b"):
        with Run.reopen(tmp_path / name) as run:
            images.append(run.load("images").tensors["images"])
        assert len(list((tmp_path / name / "figures").glob("image-*.png"))) == 20
    torch.testing.assert_close(*images)
    loaded = load_generator(trained)
    z = row_noise(0, range(20), loaded.model.shape)
    with torch.no_grad():
        x0 = loaded.generator(z, {"class_labels": torch.arange(20) // 2})
    torch.testing.assert_close(images[0], loaded.model.codec.decode(x0))


def test_images_that_were_drawn_are_not_drawn_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError

    command = ["sample", str(trained), "--device", "cpu", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("diffcore.report.image_grid", fails)
        assert main(app, command) == 70
    monkeypatch.setattr("emd_distill.quality.drawn_images", fails)
    assert main(app, command) == 0
    assert (tmp_path / "run" / "figures" / "grid.png").exists()


def test_a_grid_shows_the_first_of_many_images():
    images = torch.arange(300.0).view(-1, 1, 1, 1)
    shown, columns = first_of(images, 3)
    assert columns == 20
    assert shown.flatten().tolist() == [*range(20), *range(100, 120), *range(200, 220)]
    assert len(first_of(images, 1)[0]) == 300
    assert len(first_of(torch.zeros(5000, 1, 1, 1), 5000)[0]) == 400


def test_an_evaluation_ranks_the_teacher_itself_first(trained: Path, tmp_path: Path, folder: Path):
    run = tmp_path / "eval"
    few = ["--count", "30", "--teacher-steps", "3", "--device", "cpu"]
    assert main(app, ["evaluate", str(trained), *few, "--out", str(run)]) == 0
    scores = json.loads((run / "result.json").read_text())["scores"]
    assert scores["teacher, many steps"]["recall"] > scores["generator, 1 step"]["recall"] + 0.5
    assert scores["generator, 1 step"] != scores["teacher, 1 step"]
    drawn = tmp_path / "drawn"
    assert main(app, ["sample", str(trained), "--count", "3", "--device", "cpu", "--out", str(drawn)]) == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in (drawn / "figures").glob("image-*.png"):
        path.rename(pictures / path.name)
    assert main(app, ["evaluate", str(trained), str(pictures), *few, "--out", str(tmp_path / "own")]) == 0
    scores = json.loads((tmp_path / "own" / "result.json").read_text())["scores"]
    assert scores["generator, 1 step"]["distance"] < scores["teacher, many steps"]["distance"]


def test_losses_are_compared_and_one_that_diverges_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Bad(SiD):
        def __call__(self, s: Any) -> Any:
            from dataclasses import replace

            told = super().__call__(s)
            return replace(told, loss=told.loss * torch.nan)

    monkeypatch.setitem(LOSSES, "sid", Bad)  # pyright: ignore[reportArgumentType]
    run = tmp_path / "run"
    command = ["compare", str(folder / "classes"), "--losses", "emd1", "sid", "diff-instruct", *QUICK]
    command += ["--num-looks", "2", "--watch-recall", "12", "--teacher-steps", "2", "--out", str(run)]
    assert main(app, command) == 1
    result = json.loads((run / "result.json").read_text())
    assert list(result["at_equal_iterations"]) == ["emd1", "diff-instruct"]
    assert "NaN" in result["failed"]["sid"]
    one, other = (load_generator(run / "arms" / name).facts for name in ("emd1", "diff-instruct"))
    assert one["training"]["loss"]["num_steps"] == 1
    assert other["training"]["loss"]["num_steps"] == 0
    assert "sid was left out" in (run / "report.html").read_text()


def test_rising_quality_with_falling_recall_is_told():
    early, late = Scores(2.0, 0.8, 0.6, 0.9), Scores(1.0, 0.9, 0.4, 0.9)
    assert losing_modes([(0, early), (10, late)])
    assert losing_modes([(0, early)]) is None
    assert losing_modes([(0, late), (10, early)]) is None  # recall has risen
    assert losing_modes([(0, early), (10, Scores(3.0, 0.7, 0.4, 0.9))]) is None  # all is worse: that is seen
    assert losing_modes([(0, early), (10, Scores(1.0, 0.8, 0.6, 0.7))])  # coverage


def test_schedules_of_langevin_steps_are_read():
    assert steps_of("0:1,1000:8") == {0: 1, 1000: 8}
    for text in ("x", "0:1,0:2", "0:", "1:2:3"):
        with pytest.raises(UserError, match="0:1,1000:8"):
            steps_of(text)
    for text in ("5:1", "0:-1", "-3"):
        with pytest.raises(UserError, match="`num_langevin_steps`"):
            ChainOptions(num_langevin_steps=text).loss("emd")


def test_presets_differ_as_said():
    safe, paper, toy = (ChainOptions(preset=name).loss("emd") for name in ("safe", "paper", "toy"))
    assert [(loss.gamma_z, loss.kappa) for loss in (safe, paper, toy)] == [(1.6e-5, 0.25), (1.6e-5, 0.0), (0.05, 0.25)]
    assert ChainOptions(preset="toy", gamma_z=0.0).loss("emd").gamma_z == 0.0


def test_a_lora_learns_faster_unless_told_otherwise():
    def rates(preset: Any, **options: Any) -> tuple[float, float]:
        told = TrainingOptions(**options).settings(EMD(), preset, 0)
        return told.learning_rate, told.student_learning_rate

    assert rates("safe") == rates("paper") == (2e-6, 1e-5)
    assert rates("safe", lora_rank=4) == rates("paper", lora_rank=4) == (1e-4, 5e-4)
    assert rates("toy", lora_rank=4) == rates("toy") == (3e-4, 1e-3)
    assert rates("safe", lora_rank=4, learning_rate=1e-5) == (1e-5, 5e-4)


def test_the_level_of_the_generator_is_given_in_either_unit():
    from diffcore.denoiser import DiscreteSchedule, EDMSchedule

    assert LevelOptions().level(EDMSchedule()) == pytest.approx(2.5)
    assert LevelOptions(log_snr=-6.0).level(EDMSchedule()) == pytest.approx(20.09, abs=0.01)
    assert LevelOptions(timestep=399.0).level(DiscreteSchedule()) == 399
    with pytest.raises(UserError, match="give one of them"):
        LevelOptions(timestep=399.0, log_snr=-6.0).level(DiscreteSchedule())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gamma-e", "0"], "must lie between 0 and 1"),
        (["--gamma-e", "1"], "must lie between 0 and 1"),
        (["--num-langevin-steps", "0", "--noise-cancel", "last"], "has no step"),
        (["--loss", "dmd", "--num-langevin-steps", "4"], "has no chain"),
        (["--low", "5", "--high", "1"], "nothing is left"),
        (["--std", "0"], "must be positive"),
        (["--timestep", "0"], "has no noise"),
        (["--guidance-scale", "3"], "--guidance-scale"),
        (["--prompts", "prompts.txt"], "takes no prompts"),
        (["--validation-prompts", "a cat"], "takes no prompts"),
        (["--watch-recall", "3"], "five neighbours"),
        (["--features", "dinosaur", *WATCHED], "no feature extractor"),
        (["--features", "dino:nowhere", *WATCHED], "there is no nowhere"),
        (["--steps", "0"], "--steps"),
        (["--ema", "1"], "--ema"),
        (["--num-looks", "0"], "--num-looks"),
        (["--gradient-clip", "-1"], "--gradient-clip"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--dtype", "float16"], "float16"),
        (["--batch-size", "3", "--devices", "2"], "no multiple of the 2 processes"),
    ],
)
def test_bad_input_is_told_before_a_folder_is_made(
    options: list[str], words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(folder)
    assert words in said(["train", "classes", *options, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_lines_of_a_file_of_prompts_that_are_left_out_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"a cat\r\n\r\na\tdog\r\n")
    command = ["train", str(folder / "pipeline"), "--prompts", str(path), *FEW, "--dry-run", "--out"]
    told = said([*command, str(tmp_path / "run")], capsys, code=0)
    assert "mixed.txt line 3 holds the control character" in told
    assert "blank line" in told


def test_a_teacher_that_is_not_where_it_was_is_asked_for(
    folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = (folder / "classes").rename(folder / "moved")
    try:
        told = said(["sample", str(trained), "--out", str(tmp_path / "run")], capsys)
        assert "the teacher of" in told
        assert "point to it with --model" in told
        assert main(app, ["sample", str(trained), "--model", str(moved), "--dry-run"]) == 0
    finally:
        moved.rename(folder / "classes")


def test_more_bad_input(folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path / "run")]
    assert "takes prompts" in said(["train", str(folder / "pipeline"), *out], capsys)
    assert "no loss" in said(["compare", str(folder / "classes"), "--losses", "vsd", *out], capsys)
    assert "none twice" in said(["compare", str(folder / "classes"), "--losses", "sid", "sid", *out], capsys)
    assert "holds no generator" in said(["sample", str(folder), *out], capsys)
    assert "takes no prompts" in said(["sample", str(trained), "a cat", *out], capsys)
    assert "--count is 3;" in said(["evaluate", str(trained), "--count", "3", *out], capsys)
    assert "--batch-size is 0;" in said(["sample", str(trained), "--batch-size", "0", *out], capsys)
    assert "there is no nowhere" in said(["evaluate", str(trained), "--features", "dino:nowhere", *out], capsys)
    assert "--guidance-scale" in said(["evaluate", str(trained), "--guidance-scale", "2", *out], capsys)
    assert not (tmp_path / "run").exists()
    with pytest.raises(IncompatibleModelError, match="not the model"):
        load_generator(trained, load(folder / "pipeline", CPU))
