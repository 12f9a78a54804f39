"""The console script `diffcore` on a tiny Stable Diffusion with random weights."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from diffcore.cli import main
from diffcore.cli.commands.app import app
from diffcore.io import artifact
from diffcore.noise import row_noise
from diffcore.testing import tiny
from diffcore.testing.checkpoints import single_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny.pipeline("sd15").save_pretrained(path)
    return path


def run(*tokens: object) -> int:
    return app([str(token) for token in tokens])


def said(capsys: pytest.CaptureFixture[str], *tokens: object) -> dict:
    capsys.readouterr()
    assert run(*tokens) == 0
    return json.loads(capsys.readouterr().out)


def test_info_tells_what_a_model_is_without_loading_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    told = said(capsys, "info", folder, "--json", "--out", tmp_path / "page")
    assert told["class"] == "StableDiffusionPipeline"
    assert told["prediction_type"] == "epsilon"
    assert told["prediction_type_from"] == "prediction_type in scheduler/scheduler_config.json"
    assert "scaled_linear" in told["schedule"]
    rows = {row["component"]: row for row in told["components"]}
    counted = sum(p.numel() for p in tiny.pipeline("sd15").unet.parameters())
    assert rows["unet"]["parameters"] == counted
    assert rows["unet"]["precision"] == "F32"
    assert len(told["fingerprint"]) == 64
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Noise schedule" in page
    assert (tmp_path / "page" / "figures" / "schedule.png").exists()


def test_info_refuses_what_is_unsafe_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pickled = tmp_path / "model.ckpt"
    torch.save({"weight": torch.zeros(2)}, pickled)
    assert main(app, ["info", str(pickled)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "pickle" in told
    assert "--allow-pickle" in told


@pytest.mark.parametrize("name", ["LCMScheduler", "DPMSolverMultistepScheduler"])
def test_info_draws_schedules_whose_solvers_take_few_steps(tmp_path: Path, name: str):
    tiny.backbone("sd15").save_pretrained(tmp_path / "model")
    getattr(diffusers, name)(num_train_timesteps=60).save_pretrained(tmp_path / "model")
    assert run("info", tmp_path / "model", "--out", tmp_path / "page") == 0
    assert (tmp_path / "page" / "figures" / "schedule.png").exists()


def test_info_says_what_a_file_predicts_and_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    markers = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file = single_file(tiny.pipeline("sdxl"), tmp_path / "m.safetensors", "sdxl", change=lambda state: state | markers)
    told = said(capsys, "info", file, "--json")
    assert (told["prediction_type"], told["prediction_type_from"]) == ("v_prediction", "the tensor v_pred")
    assert told["precision"] == "F32"


def test_sample_clamps_pixels_where_the_scheduler_says_so(tmp_path: Path):
    backbone = tiny.backbone("unet2d", num_class_embeds=None)
    with torch.no_grad():
        backbone.conv_out.weight.mul_(6)  # an imperfect network, whose x0 leaves [-1, 1]
    scheduler = diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(backbone, scheduler).save_pretrained(tmp_path / "model")
    run("sample", tmp_path / "model", "--steps", "5", "--count", "2", "--seed", "3", "--out", tmp_path / "run")
    theirs = diffusers.DDIMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(5)
    x = row_noise(3, range(2), (3, 8, 8))
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(backbone(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    ours = artifact.load(tmp_path / "run" / "parts" / "images-0000").tensors["images"]
    torch.testing.assert_close(ours, (x / 2 + 0.5).clamp(0, 1), atol=1e-3, rtol=0)


def test_hooks_lists_sites_with_shapes_and_rising_cost(folder: Path, capsys: pytest.CaptureFixture[str]):
    sites = said(capsys, "hooks", folder, "*attn2.to_v", "mid_block", "--json")["sites"]
    shapes = {site["module"]: site["shape"] for site in sites}
    assert shapes["mid_block"] == [64, 4, 4]
    assert all(site["shape"][0] == 77 for site in sites if site["module"].endswith("to_v"))
    cost = [site["cost"] for site in sites if "attn2" in site["module"]]
    assert cost == sorted(cost)
    assert 0 < cost[0] < cost[-1] < 1


def test_hooks_proposes_names_where_nothing_matches(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(app, ["hooks", str(folder), "*attn9*"]) == 2
    assert "no module of UNet2DConditionModel matches" in " ".join(capsys.readouterr().err.split())


def test_sample_draws_by_seed_and_row_and_resumes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--steps", "3", "--guidance-scale", "2"]
    told = said(capsys, "sample", folder, "a cat", "a dog", "--count", "2", *options, "--out", tmp_path / "a", "--json")
    assert told["images"] == 4
    assert told["pixels"] == "16x16"
    run("sample", folder, "a cat", "--count", "3", *options, "--out", tmp_path / "b")
    first, more = (artifact.load(tmp_path / name / "parts" / "images-0000").tensors["images"] for name in ("a", "b"))
    torch.testing.assert_close(first, more[:2], atol=1e-5, rtol=0)
    assert not torch.allclose(more[0], more[1])
    with Image.open(tmp_path / "a" / "figures" / "image-0001-0001.png") as picture:
        assert picture.size[0] == picture.size[1]
    again = (tmp_path / "a" / "parts" / "images-0001.safetensors").stat().st_mtime_ns
    run("sample", folder, "a cat", "a dog", "--count", "2", *options, "--out", tmp_path / "a")
    assert (tmp_path / "a" / "parts" / "images-0001.safetensors").stat().st_mtime_ns == again


def test_more_steps_than_a_scheduler_takes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipeline = tiny.pipeline("sd15")
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "lcm")
    assert main(app, ["sample", str(tmp_path / "lcm"), "a cat", "--steps", "60", "--out", str(tmp_path / "a")]) == 2
    assert "steps is 60; LCMScheduler has no such grid" in " ".join(capsys.readouterr().err.split())
    assert main(app, ["sample", str(tmp_path / "lcm"), "a cat", "--steps", "2", "--out", str(tmp_path / "b")]) == 0


def test_no_guidance_is_said_in_two_ways(folder: Path, tmp_path: Path):
    """The formula would draw the empty prompt at 0."""
    images = []
    for scale in ("0", "1"):
        out = tmp_path / scale
        run("sample", folder, "a cat", "a dog", "--steps", "1", "--guidance-scale", scale, "--out", out)
        images.append([artifact.load(out / "parts" / f"images-000{place}").tensors["images"] for place in range(2)])
    assert all(a.equal(b) for a, b in zip(*images, strict=True))
    assert not images[0][0].equal(images[0][1])


def test_sample_tells_what_of_a_prompt_is_lost(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = said(capsys, "sample", folder, "x " * 100, "--steps", "1", "--out", tmp_path / "c", "--json")
    assert told["truncated"][0]["lost"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["--steps", "2"], "takes prompts"), (["a cat", "--steps", "0"], "--steps is 0")],
)
def test_sample_refuses_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], tokens: list[str], message: str):
    assert main(app, ["sample", str(folder), *tokens]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
