"""The commands from end to end on a small folder of images: results, resuming, bad input."""

import json
import logging
import os
import random
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from safetensors.torch import save_file

from diffcore.cli import main
from diffcore.denoiser import schedule_from
from diffcore.io import artifact
from diffcore.models import load
from diffcore.runtime import Runtime
from immiscible_noise import NoisePlan, read_plan
from immiscible_noise.app.cli import app
from immiscible_noise.consistency import consistency_sample
from immiscible_noise.study.train import load_snapshot, read_recipe


def small(**changes: object) -> list[str]:
    """Returns the options of a training that takes a moment."""
    options = {"steps": 12, "batch-size": 16, "width": 16, "snapshots": 2, "checkpoint-every": 4} | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


SMALL = small()
QUICK = ["--num-samples", "40", "--sampling-steps", "2", "3"]


def paint(folder: Path, *, classes: int = 2, count: int = 20, size: int = 8) -> Path:
    """Writes images whose brightness is on the left in one class and on the right in the other."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
            half = slice(0, size // 2) if label % 2 == 0 else slice(size // 2, None)
            pixels[:, half] += 160
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("data") / "painted")


@pytest.fixture(autouse=True)
def logging_as_it_was(request: pytest.FixtureRequest) -> None:
    """The console script logs to the standard error of its moment, which a test replaces."""
    root = logging.getLogger()
    request.addfinalizer(partial(setattr, root, "handlers", list(root.handlers)))  # noqa: PT021  one line, no generator


def run(*tokens: object) -> int:
    return app([str(token) for token in tokens])


def weights(folder: Path, step: int = 12) -> dict[str, torch.Tensor]:
    return artifact.load(folder / "parts" / f"snapshot-{step:08d}").tensors


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "vanilla", "--objective", "ddpm"],
        ["--method", "assignment", "--objective", "edm", "--class-conditional"],
        ["--method", "knn", "--objective", "flow", "--normalisation", "standard"],
        ["--method", "assignment", "--objective", "consistency", "--cost", "l1"],
        ["--method", "assignment", "--objective", "consistency-improved", "--flip", "--until", "0.5"],
        ["--method", "assignment", "--window", "64"],
        ["--strength", "0.5", "--network", "unet", "--warmup", "3", "--gradient-clip", "1"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_train_writes_weights_pictures_and_a_report(painted: Path, tmp_path: Path, options: list[str]):
    out = tmp_path / "run"
    assert run("train", painted, "--out", out, *SMALL, *options) == 0
    assert all(value.isfinite().all() for value in weights(out).values())
    assert any(not torch.equal(weights(out)[name], weights(out, 6)[name]) for name in weights(out))
    assert (out / "figures" / "samples.png").stat().st_size > 1000
    assert "<script" not in (out / "report.html").read_text()
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("objective", ["flow", "ddpm", "edm"])
def test_an_exported_unet_predicts_in_plain_diffusers_what_it_predicts_here(
    painted: Path, tmp_path: Path, objective: str
):
    import diffusers

    out = tmp_path / "run"
    options = ["--network", "unet", "--objective", objective, "--class-conditional", *small(steps=2, snapshots=1)]
    assert run("train", painted, "--out", out, *options) == 0
    unet = diffusers.UNet2DModel.from_pretrained(out / "model" / "unet", local_files_only=True)
    config = json.loads((out / "model" / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(out / "model" / "scheduler")
    scheduler.set_timesteps(4)

    recipe = read_recipe(out)
    denoiser, labels = load_snapshot(recipe, out, 2), torch.tensor([0, 1, 1])
    assert schedule_from(scheduler).clip_x0 == recipe.clip_x0  # whoever samples from it clamps as the training did
    x_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = scheduler.timesteps[2]
    fed = scheduler.scale_model_input(x_t, timestep) if objective != "flow" else x_t
    with torch.no_grad():
        output = unet(fed, timestep.expand(3), class_labels=labels).sample
        if objective == "edm":
            sigma = scheduler.sigmas[2]
            theirs = scheduler.precondition_outputs(x_t, output, sigma)
            ours = denoiser(x_t, sigma.expand(3), {"class_labels": labels}).x0
        else:
            theirs = output
            t = timestep / 1000 if objective == "flow" else timestep
            ours = denoiser(x_t, t.expand(3), {"class_labels": labels}).output
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    loaded = load(out / "model", Runtime(device="cpu"))
    assert loaded.denoiser.prediction_type == {"flow": "flow_prediction", "ddpm": "epsilon", "edm": "edm"}[objective]
    assert torch.equal(unet.conv_in.weight, loaded.backbone.get_submodule("conv_in").weight)


def test_an_exported_consistency_function_samples_alike_in_plain_diffusers(
    painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import diffusers

    out = tmp_path / "run"
    options = ["--network", "unet", "--objective", "consistency", "--class-conditional"]
    assert run("train", painted, "--out", out, *options, *small(steps=2, snapshots=1)) == 0
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(out / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    recipe = read_recipe(out)
    denoiser, labels = load_snapshot(recipe, out, 2), torch.tensor([0, 1, 1])
    noise, fresh = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *_, **__: fresh)
    monkeypatch.setattr("immiscible_noise.consistency.row_noise", lambda *_, **__: fresh)
    for steps in ({"num_inference_steps": 1}, {"num_inference_steps": None, "timesteps": [22, 0]}):
        images = pipeline(batch_size=3, class_labels=labels, latents=noise, output_type="pt", **steps).images
        sigmas = tuple(pipeline.scheduler.sigmas[:-1].tolist())
        ours = consistency_sample(denoiser, noise, {"class_labels": labels}, sigmas=sigmas, seeds=torch.arange(3))
        assert (recipe.scale.decode(ours).clamp(0, 1) - images).abs().max() < 1e-5
        assert images.std() > 0.05


def test_couplings_of_one_seed_share_weights_order_and_noise(painted: Path, tmp_path: Path):
    """With strength 0 the assignment is vanilla to the last bit: nothing else may differ between couplings."""
    for name, options in {
        "vanilla": ["--method", "vanilla"],
        "off": ["--method", "assignment", "--strength", "0"],
        "on": ["--method", "assignment"],
    }.items():
        assert run("train", painted, "--out", tmp_path / name, *options, *SMALL) == 0
    assert_same(weights(tmp_path / "vanilla"), weights(tmp_path / "off"))
    assert any(
        not torch.equal(value, weights(tmp_path / "on")[name]) for name, value in weights(tmp_path / "vanilla").items()
    )


def test_evaluate_measures_every_snapshot_and_tells_its_features(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    run("train", painted, "--out", out, "--class-conditional", *SMALL)
    capsys.readouterr()
    assert run("evaluate", out, painted, "--json", *QUICK) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["frechet"]) == {"assignment, 2 steps", "assignment, 3 steps"}
    assert re.fullmatch(r"classifier [0-9a-f]{12}, held-out accuracy \d+\.\d%, 32 features", result["features"])
    assert 0 <= result["accuracy"]["assignment, 2 steps"] <= 1
    table = (out / "evaluation" / "tables" / "scores.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 2
    assert (out / "evaluation" / "report.html").exists()


def test_images_that_do_not_fit_a_model_leave_no_evaluation(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run("train", painted, "--out", tmp_path / "run", *SMALL)
    told = refused(capsys, "evaluate", tmp_path / "run", painted, "--size", "4", *QUICK)
    assert "the model makes 3x8x8 images, the data are 3x4x4; give --size 8" in told
    assert refused(capsys, "evaluate", tmp_path / "run", painted, "--grey", *QUICK).endswith("leave out --grey")
    told = refused(capsys, "evaluate", tmp_path / "run", painted, "--features", "nonsense", *QUICK)
    assert "nonsense is no feature extractor" in told
    assert not (tmp_path / "run" / "evaluation").exists()


def test_few_labelled_images_are_measured_without_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    few = paint(tmp_path / "few", count=4)
    options = ["--seeds", "1", "--couplings", "vanilla", *QUICK, *SMALL, "--json"]
    assert run("compare", few, "--out", tmp_path / "run", *options) == 0
    assert "principal components" in json.loads(capsys.readouterr().out)["features"]


def test_evaluate_warns_where_sampling_is_biased(painted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for method in ("assignment", "vanilla"):
        run("train", painted, "--out", tmp_path / method, "--method", method, *SMALL)
        caplog.clear()
        assert run("evaluate", tmp_path / method, painted, "--eta", "1", *QUICK) == 0
        warned = [record for record in caplog.records if "stochastic sampling" in record.message]
        assert bool(warned) == (method == "assignment")
    page = (tmp_path / "vanilla" / "evaluation" / "report.html").read_text()
    assert "fresh noise in each step (eta 1)" in page
    assert "Nothing here speaks for stochastic samplers" not in page
    assert "the couplings differ" not in page  # there is one


def test_evaluate_takes_one_and_two_steps_of_a_consistency_function_and_warns_of_the_second(
    painted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for method in ("assignment", "vanilla"):
        out = tmp_path / method
        run("train", painted, "--out", out, "--method", method, "--objective", "consistency", *SMALL)
        for steps in ([], ["--sampling-steps", "1"]):
            caplog.clear()
            told = ["--out", tmp_path / f"{method}-{len(steps)}", "--num-samples", "40", *steps]
            assert run("evaluate", out, painted, *told) == 0
            assert ("adds fresh noise" in caplog.text) == (method == "assignment" and not steps)
        result = json.loads((tmp_path / f"{method}-0" / "result.json").read_text())
        assert set(result["frechet"]) == {f"{method}, 1 steps", f"{method}, 2 steps"}


def test_compare_shows_all_couplings_and_resumes_what_is_done(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "study"
    command = ["compare", painted, "--couplings", "vanilla", "assignment", "--seeds", "2", "--out", out, *SMALL, *QUICK]
    assert run(*command, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert set(first["ratio"]) == {"assignment / vanilla, 2 steps", "assignment / vanilla, 3 steps"}
    assert first["seeds"] == 2
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == written
    for figure in ("curves", "final", "distances"):
        assert (out / "figures" / f"{figure}.png").exists()
    (out / "report.html").unlink()
    assert run("report", out) == 0
    assert "What may not" in (out / "report.html").read_text()


def test_diagnose_recommends_and_measures_the_leak(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("diagnose", painted, "--batch-sizes", "8", "32", "--out", tmp_path / "d", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["coupling"] == "assignment"
    assert result["options_of_train"] == "--method assignment --strength 1 --class-conditional --condition block"
    assert result["leak"]["assignment, batch 32"] > 0.7 > result["leak"]["blocks, batch 32"]
    assert result["reduction"]["assignment, batch 32"] > result["reduction"]["assignment, batch 8"] > 0


def test_diagnose_reads_latents_and_shows_them_decoded_or_as_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    latents = torch.randn(60, 8, 4, 4, generator=generator) + 2 * labels.view(-1, 1, 1, 1)
    save_file({"latents": latents, "labels": labels}, tmp_path / "latents.safetensors")
    told, sizes = ["diagnose", tmp_path / "latents.safetensors", "--json"], ["--batch-sizes", "8", "30"]
    assert run(*told, *sizes, "--out", tmp_path / "means") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["options_of_train"].endswith("--condition block")
    assert result["leak"]["assignment, batch 30"] > 0.7 > result["leak"]["blocks, batch 30"]
    shown = artifact.load(tmp_path / "means" / "parts" / "gallery").tensors
    assert shown["images"].shape[1:] == (1, 4, 4)
    bright = shown["images"].mean((1, 2, 3))  # of the first label, of the second, then of others
    assert len(shown["images"]) == 10
    assert bright[0] + 0.2 < bright[1]
    assert run(*told, *sizes, "--model", "zoo:portraits-sd", "--device", "cpu", "--out", tmp_path / "decoded") == 0
    shown = artifact.load(tmp_path / "decoded" / "parts" / "gallery").tensors
    assert shown["images"].shape[1:] == (3, 8, 8)
    assert "Decoded latents" in (tmp_path / "decoded" / "report.html").read_text()


def test_latents_of_other_channels_are_not_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file({"latents": torch.zeros(3, 4, 2, 2)}, tmp_path / "latents.safetensors")
    command = ["diagnose", tmp_path / "latents.safetensors", "--model", "zoo:portraits-sd", "--out", tmp_path / "out"]
    assert "latents of 8 channels" in refused(capsys, *command)
    save_file({"latents": torch.full((3, 4), torch.nan)}, tmp_path / "nan.safetensors")
    assert "latent 0" in refused(capsys, "diagnose", tmp_path / "nan.safetensors", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_writes_what_the_library_builds_from_latents(painted: Path, tmp_path: Path):
    latents, labels = torch.randn(30, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    save_file({"latents": latents, "labels": labels}, tmp_path / "latents.safetensors")
    told = ["--epochs", "2", "--window", "20", "--seed", "4", "--use-labels"]
    assert run("plan", tmp_path / "latents.safetensors", "--out", tmp_path / "out", *told) == 0
    plan = read_plan(tmp_path / "out" / "plan.safetensors")
    assert sorted(plan.order[:30].tolist()) == sorted(plan.order[30:].tolist()) == list(range(30))
    expected = NoisePlan.build(latents, plan.order, window=20, seed=4, labels=labels)
    assert torch.equal(plan.seeds, expected.seeds)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 0 < result["distance_reduction"] < 0.2
    assert "nearer" in (tmp_path / "out" / "report.html").read_text()
    assert run("plan", painted, "--out", tmp_path / "pixels", "--window", "40") == 0
    assert len(read_plan(tmp_path / "pixels" / "plan.safetensors")) == 40


def test_a_plan_of_buckets_exchanges_noise_inside_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    g = torch.Generator().manual_seed(0)
    wide, tall = torch.randn(60, 4, 2, 8, generator=g), torch.randn(40, 4, 8, 2, generator=g)
    file = tmp_path / "buckets.safetensors"
    labels = {"labels.wide": torch.arange(60) % 2, "labels.tall": torch.arange(40) % 2}
    save_file({"latents.wide": wide, "latents.tall": tall, **labels}, file)
    assert run("plan", file, "--out", tmp_path / "out", "--window", "20", "--use-labels") == 0
    plan = read_plan(tmp_path / "out" / "plan.safetensors")
    samples = [*tall, *wide]  # in the order of the names
    assert sorted(plan.order.tolist()) == list(range(100))
    told = torch.cat([labels["labels.tall"], labels["labels.wide"]])
    expected = NoisePlan.build(samples, plan.order, window=20, seed=0, labels=told)
    assert torch.equal(plan.seeds, expected.seeds)
    assert 0 < json.loads((tmp_path / "out" / "result.json").read_text())["distance_reduction"] < 0.3
    capsys.readouterr()
    assert main(app, ["diagnose", str(file), "--out", str(tmp_path / "no")]) == 2
    assert "several shapes (4x8x2, 4x2x8)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("tensors", "options", "told"),
    [
        ({"images": torch.zeros(3, 4)}, [], "no tensor latents, nor latents.NAME"),
        ({f"t{i}": torch.zeros(3) for i in range(9)}, [], "it has t0, t1, t2, t3, t4, …"),
        ({"latents": torch.zeros(3, 4).long()}, [], "no floating tensor"),
        ({"latents.a": torch.zeros(3, 4), "latents.b": torch.full((2, 5), torch.nan)}, [], "latent 0 of latents.b"),
        (
            {"latents.a": torch.zeros(3, 4), "latents.b": torch.zeros(2, 5), "labels.a": torch.zeros(3).long()},
            [],
            "labels for 1 of its 2 shapes",
        ),
        ({"latents.a": torch.zeros(3, 4), "labels.a": torch.zeros(2).long()}, [], "not one integer for each of 3"),
        ({"latents": torch.zeros(3, 4), "labels": torch.zeros(2).long()}, [], "not one integer for each of 3"),
        ({"latents": torch.zeros(3, 4)}, ["--use-labels"], "no labels for --use-labels"),
        ({"latents": torch.zeros(3, 4)}, ["--window", "1"], "--window is 1"),
        ({"latents": torch.zeros(3, 4)}, ["--strength", "2"], "--strength is 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, list)) else None,
)
def test_latents_that_cannot_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: dict, options: list[str], told: str
):
    save_file(tensors, tmp_path / "latents.safetensors")
    assert main(app, ["plan", str(tmp_path / "latents.safetensors"), "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_writes_nothing(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("compare", painted, "--out", tmp_path / "x", "--seeds", "2", "--dry-run", "--json", *SMALL) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainings"] == 6
    assert plan["parameters"] > 1000
    assert not (tmp_path / "x").exists()
    run("train", painted, "--out", tmp_path / "run", *SMALL)
    for command in (["diagnose", painted], ["evaluate", tmp_path / "run", painted]):
        capsys.readouterr()
        assert run(*command, "--out", tmp_path / "x", "--dry-run", "--json") == 0
        assert json.loads(capsys.readouterr().out)["images"] == 40
        assert not (tmp_path / "x").exists()


def start(
    *tokens: object, limit: int | None = None, ignored: signal.Signals | None = None, halting: bool = False
) -> int:
    """Runs the console script in a forked process, whose standard error goes to a file; returns the process's id.

    Args:
        tokens: Words of the command.
        limit: Largest file in bytes.
        ignored: Signal that the process ignores from the start.
        halting: Halt after the second checkpoint, for `halted`.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)
            if halting:
                halt_after_second_checkpoint()
            code = main(app, [str(token) for token in tokens])
        finally:
            os._exit(code)
    return child


def halt_after_second_checkpoint() -> None:
    """Makes this process stop, as Ctrl-Z does, once its second checkpoint is written."""
    write, numbers = Trainer.save_checkpoint, iter(range(1, 10_000))

    def write_and_halt(*args: Any, **options: Any) -> None:
        write(*args, **options)
        if next(numbers) == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

    Trainer.save_checkpoint = write_and_halt


def halted(child: int) -> None:
    """Waits until a process has halted, however long that takes."""
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the command ended before its second checkpoint"


def send(child: int, number: signal.Signals) -> None:
    """Sends a signal to a halted process and lets it go on."""
    os.kill(child, number)
    os.kill(child, signal.SIGCONT)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


LONG = ["--method", "assignment", *small(steps=200, **{"checkpoint-every": 5})]


@pytest.fixture(scope="session")
def uninterrupted(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run("train", painted, "--out", out, *LONG) == 0
    return out


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["kill", "int", "term"]
)
def test_an_interrupted_training_continues_to_the_same_weights(
    painted: Path, uninterrupted: Path, tmp_path: Path, number: int, code: int
):
    out = tmp_path / "cut"
    child = start("train", painted, "--out", out, *LONG, halting=True)
    halted(child)
    send(child, number)
    assert exit_code(child) == code
    assert not (out / "result.json").exists()
    assert run("train", painted, "--out", out, *LONG) == 0
    assert_same(weights(out, 200), weights(uninterrupted, 200))
    assert (out / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()


@pytest.mark.parametrize("lost", [[6], [12], [6, 12]], ids=str)
def test_weights_that_were_damaged_are_trained_again(painted: Path, tmp_path: Path, lost: list[int]):
    out = tmp_path / "run"
    assert run("train", painted, "--out", out, *SMALL) == 0
    before = [weights(out, 6), weights(out)]
    for step in lost:
        os.truncate(out / "parts" / f"snapshot-{step:08d}.safetensors", 100)
    assert run("train", painted, "--out", out, *SMALL) == 0
    assert_same(weights(out, 6), before[0])
    assert_same(weights(out), before[1])


def test_an_ignored_signal_does_not_finish_a_training(painted: Path, uninterrupted: Path, tmp_path: Path):
    """As `nohup` or a script's `&` start it: the signal that is raised again after the fit then does nothing."""
    out = tmp_path / "cut"
    child = start("train", painted, "--out", out, *LONG, ignored=signal.SIGINT, halting=True)
    halted(child)
    send(child, signal.SIGINT)
    if exit_code(child):  # it stopped rather than went on: then it must say so
        assert not (out / "result.json").exists()
        assert run("train", painted, "--out", out, *LONG) == 0
    assert_same(weights(out, 200), weights(uninterrupted, 200))


@pytest.mark.reliability
@pytest.mark.parametrize("moment", range(50 if os.environ.get("RELIABILITY") == "long" else 4))
def test_a_training_killed_at_any_moment_continues_to_the_same_weights(
    painted: Path, uninterrupted: Path, tmp_path: Path, moment: int
):
    out = tmp_path / "cut"
    child = start("train", painted, "--out", out, *LONG)
    # No event to wait for: that it may be any moment, also before the first file, is what is tested.
    time.sleep(random.Random(moment).uniform(0, 3.0))
    os.kill(child, signal.SIGKILL)
    exit_code(child)
    assert run("train", painted, "--out", out, *LONG) == 0
    assert_same(weights(out, 200), weights(uninterrupted, 200))


@pytest.mark.parametrize(
    "noise",
    [["--method", "vanilla"], ["--scope", "global", "--class-conditional"], ["--scope", "global", "--strength", "0.5"]],
    ids=" ".join,
)
def test_two_processes_train_as_one(painted: Path, tmp_path: Path, noise: list[str]):
    """Vanilla, or assigned over both shares, so that nothing depends on which rows share a rank."""
    command = ["train", painted, *noise, "--device", "cpu", *SMALL]
    assert run(*command, "--out", tmp_path / "one") == 0
    child = start(*command, "--out", tmp_path / "two", "--devices", "2", "--strategy", "ddp_fork")
    assert exit_code(child) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--batch-size", "2"], True),
        (["--batch-size", "16"], False),
        (["--batch-size", "2", "--window", "64"], False),
        (["--batch-size", "2", "--method", "vanilla"], False),
        (["--batch-size", "2", "--condition", "ignore"], False),
        (["--batch-size", "16", "--devices", "8", "--device", "cpu"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_batches_in_which_few_images_share_their_class(
    painted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: list[str], warned: bool
):
    command = ["train", painted, "--class-conditional", *options, "--out", tmp_path / "out", "--dry-run"]
    assert run(*command) == 0
    assert ("meet no other of their class" in caplog.text) == warned


def test_a_run_goes_on_with_as_many_processes_unless_noise_is_assigned_over_all(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    two = ["--devices", "2", "--strategy", "ddp_fork"]
    for name, noise in {"local": [], "global": ["--scope", "global"]}.items():
        command = ["train", painted, *noise, "--device", "cpu", *SMALL, "--out", tmp_path / name]
        assert run(*command) == 0
        if noise:
            assert run(*command, *two) == 0  # finished, and only read
        else:
            assert "processes: nothing -> 2" in refused(capsys, *command, *two)


def refused(capsys: pytest.CaptureFixture[str], *tokens: object, code: int = 2) -> str:
    """Runs a command as the console script does, requires its exit code, and returns its message."""
    assert main(app, [str(token) for token in tokens]) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return " ".join(shown.split())


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "train", tmp_path / "empty", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "nowhere" in refused(capsys, "diagnose", tmp_path / "nowhere")


def test_a_text_file_named_png_and_a_truncated_jpeg_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    data = paint(tmp_path / "data")
    (data / "class0" / "text.png").write_text("not a picture")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(whole)
    (data / "class1" / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    assert run("train", data, "--out", tmp_path / "out", *SMALL) == 0
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "class0/text.png" in told
    assert "class1/cut.jpg" in told
    assert "text.png" in refused(capsys, "train", data, "--strict", "--out", tmp_path / "strict", *SMALL)


def test_mixed_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = paint(tmp_path / "data")
    Image.new("RGB", (12, 10)).save(data / "class1" / "odd.png")
    message = refused(capsys, "train", data, "--out", tmp_path / "out", *SMALL)
    assert "odd.png is 12 x 10" in message
    assert "--size" in message
    assert run("train", data, "--size", "8", "--out", tmp_path / "out", *SMALL) == 0


def test_images_that_are_not_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (12, 10)).save(tmp_path / "data" / "wide.png")
    assert "--size 10" in refused(capsys, "diagnose", tmp_path / "data")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--batch-size", "0", "--batch-size is 0"),
        ("--k", "0", "--k is 0"),
        ("--strength", "1.5", "--strength is 1.5"),
        ("--steps", "0", "--steps is 0"),
        ("--learning-rate", "0", "--learning-rate is 0"),
        ("--devices", "0", "--devices is 0"),
        ("--warmup", "-5", "--warmup is -5"),
        ("--ema-decay", "1.5", "--ema-decay is 1.5"),
        ("--gradient-clip", "-1", "--gradient-clip is -1"),
        ("--condition", "block", "--class-conditional"),
        ("--condition", "ignore", "--class-conditional"),
        ("--method", "asignment", "asignment"),
        ("--strenght", "1", "--strength"),
    ],
)
def test_options_out_of_range(painted: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str):
    assert told in refused(capsys, "train", painted, option, value)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["diagnose", "--k", "0"], "--k is 0"),
        (["diagnose", "--batch-sizes", "64", "1"], "--batch-sizes is 64 1; give numbers of at least 2"),
        (["diagnose", "--batch-sizes", "0", "-5"], "at least 2"),
        (["compare", "--couplings"], "names none"),
        (["compare", "--sampling-steps", "2", "2"], "--sampling-steps is 2 2; give each number once"),
        (["compare", "--features", "nonsense"], "nonsense is no feature extractor"),
        (["compare", "--sampling-batch", "0"], "--sampling-batch is 0"),
        (["compare", "--couplings", "vanilla", "ignore"], "--class-conditional"),
        (["train", "--batch-size", "3", "--devices", "2"], "2 processes"),
        (["train", "--network", "unet", "--size", "9"], "--size 8"),
        (["train", "--network", "unet", "--width", "12"], "multiple of 8"),
        (["train", "--batch-size", "16", "--window", "15"], "--window is 15, less than --batch-size 16"),
    ],
    ids=" ".join,
)
def test_settings_that_do_not_fit_leave_no_folder(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: list[str], told: str
):
    """A folder left behind would refuse the corrected command as one of other settings."""
    verb, *options = tokens
    assert told in refused(capsys, verb, painted, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["train", "compare", "diagnose"])
def test_what_this_machine_cannot_do_leaves_no_folder(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for options, told in ((["--device", "cuda"], "try --device auto"), (["--dtype", "float16"], "--dtype bfloat16")):
        assert told in refused(capsys, verb, painted, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_wrong_baseline_is_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("immiscible_noise.app.bench.cases", lambda **_: pytest.fail("cases were made"))
    assert "with --baseline" in refused(capsys, "bench", "--fail-below", "0.8")
    message = refused(capsys, "bench", "--baseline", tmp_path / "none.json")
    assert message.endswith("none.json is no file; give as --baseline one that --json named")


def test_one_image_is_too_few_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    assert "at least 2" in refused(capsys, "diagnose", tmp_path / "one", "--out", tmp_path / "out")


def test_batches_smaller_than_the_gallery_are_shown(painted: Path, tmp_path: Path):
    assert run("diagnose", painted, "--batch-sizes", "4", "--out", tmp_path / "d") == 0
    assert artifact.load(tmp_path / "d" / "parts" / "gallery").tensors["images"].shape[0] == 4


def test_a_batch_of_one_trains(painted: Path, tmp_path: Path):
    assert run("train", painted, "--out", tmp_path / "out", *small(**{"batch-size": 1})) == 0


def test_a_batch_larger_than_the_data_trains(painted: Path, tmp_path: Path):
    assert run("train", painted, "--out", tmp_path / "out", *small(**{"batch-size": 100})) == 0


def test_labels_asked_for_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "flat" / f"{i}.png")
    assert "no sub-folders" in refused(capsys, "train", tmp_path / "flat", "--class-conditional", *SMALL)


def test_a_run_folder_of_other_settings(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    run("train", painted, "--out", out, *SMALL)
    before = (out / "run.json").read_bytes()
    message = refused(capsys, "train", painted, "--out", out, *SMALL, "--learning-rate", "0.01")
    assert "learning_rate: 0.001 -> 0.01" in message
    assert (out / "run.json").read_bytes() == before
    assert run("train", painted, "--out", out, "--restart", *SMALL, "--learning-rate", "0.01") == 0
    assert (tmp_path / "run.old-1" / "run.json").read_bytes() == before


def test_output_that_cannot_be_written(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("in the way")
    assert "is a file" in refused(capsys, "train", painted, "--out", tmp_path / "file", *SMALL)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_that_is_no_training_run(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "no run of 'immiscible-noise train'" in refused(
        capsys, "evaluate", painted, painted, "--out", tmp_path / "e"
    )


def test_a_training_of_an_earlier_version_is_read(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    run("train", painted, "--out", out, *SMALL)
    part = out / "parts" / "recipe"
    old = {"arm" if name == "coupling" else name: value for name, value in artifact.load(part).fields.items()}
    recipe = read_recipe(out)
    artifact.save(part, {}, schema="diffcore/part@1", **old)
    assert read_recipe(out) == recipe
    assert run("evaluate", out, painted, *QUICK) == 0
    assert run("report", out) == 0


def test_a_comparison_of_an_earlier_version_is_refused_in_one_line(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    run("train", painted, "--out", out, *SMALL)
    assert run("evaluate", out, painted, *QUICK) == 0
    part = out / "evaluation" / "parts" / "comparison"
    fields = dict(artifact.load(part).fields)
    fields["scores"] = [
        {"arm" if name == "coupling" else name: value for name, value in row.items()} for row in fields["scores"]
    ]
    artifact.save(part, {}, schema="diffcore/part@1", **fields)
    assert "earlier version" in refused(capsys, "report", out / "evaluation")


def test_a_model_of_another_size(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run("train", painted, "--out", tmp_path / "run", *SMALL)
    message = refused(capsys, "evaluate", tmp_path / "run", painted, "--size", "16", "--out", tmp_path / "e", *QUICK)
    assert "--size 8" in message


def test_images_are_read_for_an_evaluation_as_they_were_for_the_training(tmp_path: Path):
    data, out = paint(tmp_path / "data", size=12), tmp_path / "run"
    assert run("train", data, "--out", out, "--size", "8", "--grey", *small(steps=2, snapshots=1)) == 0
    assert run("evaluate", out, data, *QUICK) == 0


def test_a_conditional_model_needs_the_labels_that_it_was_trained_on(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run("train", painted, "--out", tmp_path / "run", "--class-conditional", *SMALL)
    for data in (painted / "class0", paint(tmp_path / "three", classes=3)):
        message = refused(capsys, "evaluate", tmp_path / "run", data, "--out", tmp_path / "e", "--restart", *QUICK)
        assert "conditioned on 2 classes" in message


def test_an_unknown_coupling(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = refused(capsys, "compare", painted, "--couplings", "best", "--out", tmp_path / "c")
    assert "vanilla" in told
    assert "knn-inner" in told


def test_a_full_disk_is_the_machines_fault_and_loses_nothing(
    painted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A file-size limit stands in for the full disk: the first checkpoint does not fit under it."""
    command = ["train", painted, "--out", tmp_path / "run", *small(width=64)]
    child = start(*command, limit=60_000)
    assert exit_code(child) == 3
    assert "Traceback" not in capfd.readouterr().err
    assert run(*command) == 0
    assert run("train", painted, "--out", tmp_path / "whole", *small(width=64)) == 0
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_data_folder_named_as_output_is_refused_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = paint(tmp_path / "data")
    before = sorted(data.rglob("*"))
    assert "not of a run" in refused(capsys, "train", data, "--out", data, *SMALL)
    assert sorted(data.rglob("*")) == before


def test_stray_files_beside_the_images_do_not_change_the_data(painted: Path, tmp_path: Path):
    data = paint(tmp_path / "data")
    assert run("train", data, "--out", tmp_path / "run", *SMALL) == 0
    (data / "class0" / ".DS_Store").write_bytes(b"\0")
    assert run("train", data, "--out", tmp_path / "run", *SMALL) == 0


def test_labels_that_cannot_be_learnt_give_no_features(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rng = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / str(label) / f"{i}.png")
    run("train", tmp_path / "data", "--out", tmp_path / "run", *SMALL)
    assert run("evaluate", tmp_path / "run", tmp_path / "data", *QUICK) == 0
    assert (
        "principal components" in json.loads((tmp_path / "run" / "evaluation" / "result.json").read_text())["features"]
    )
    assert any("most frequent label" in record.getMessage() for record in caplog.records)
