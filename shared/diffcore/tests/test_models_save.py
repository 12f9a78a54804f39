"""A saved model is a folder of diffusers: both libraries load it, and it is there whole or not at all."""

import os
from pathlib import Path

import diffusers
import pytest
import torch

from diffcore.errors import MachineError, UserError
from diffcore.models import from_pipeline, load
from diffcore.runtime import Runtime
from diffcore.testing import tiny

CPU = Runtime(device="cpu")


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "dit", "pixart", "sd3", "flux"])
def test_a_saved_pipeline_loads_here_and_in_diffusers(tmp_path, name):
    pipe = tiny.pipeline(name)
    model = from_pipeline(pipe)
    assert model.save(tmp_path / "deep" / name) == tmp_path / "deep" / name
    assert os.listdir(tmp_path / "deep") == [name]
    again = load(tmp_path / "deep" / name, CPU)
    assert again.denoiser.schedule == model.denoiser.schedule
    assert again.denoiser.prediction_type == model.denoiser.prediction_type
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "deep" / name, local_files_only=True)
    assert type(theirs) is type(pipe)
    for part, module in model.modules.items():
        if isinstance(module, torch.nn.Module):
            for other in (again.modules[part], getattr(theirs, part)):
                state = other.state_dict()
                assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


def test_what_the_model_predicts_is_saved_and_paths_are_not(tmp_path):
    tiny.pipeline("sd15").save_pretrained(tmp_path / "first")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "first", local_files_only=True)
    assert str(tmp_path) in pipe.unet.config["_name_or_path"]
    from_pipeline(pipe).save(tmp_path / "own")
    load(tmp_path / "first", CPU, prediction_type="v_prediction").save(tmp_path / "other")
    assert load(tmp_path / "other", CPU).denoiser.prediction_type == "v_prediction"
    for path in (tmp_path / "own").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("scheduler", [None, diffusers.EulerDiscreteScheduler(prediction_type="sample")])
def test_a_saved_backbone_keeps_its_schedule_and_prediction(tmp_path, scheduler):
    unet = tiny.backbone("sd15")
    unet.save_pretrained(tmp_path / "first")
    if scheduler is not None:
        scheduler.save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first", CPU, prediction_type="v_prediction")
    model.save(tmp_path / "second")
    again = load(tmp_path / "second", CPU)
    assert again.denoiser.prediction_type == "v_prediction"
    assert again.denoiser.schedule.timesteps(5).equal(model.denoiser.schedule.timesteps(5))
    t = torch.arange(1000)
    assert all(a.equal(b) for a, b in zip(*(m.denoiser.schedule.alpha_sigma(t) for m in (again, model)), strict=True))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "second").state_dict()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in unet.state_dict().items())


def test_a_saved_edm_network_keeps_its_preconditioning(tmp_path):
    tiny.backbone("unet2d").save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "denoiser.json").write_text('{"prediction_type": "edm", "sigma_max": 60, "sigma_data": 0.3}')
    model = load(tmp_path / "first", CPU)
    again = load(model.save(tmp_path / "second"), CPU)
    assert again.denoiser.schedule == model.denoiser.schedule
    assert (again.denoiser.prediction_type, again.denoiser.sigma_data) == ("edm", 0.3)


def test_edits_are_saved(tmp_path):
    pipe = tiny.pipeline("dit")
    model = from_pipeline(pipe)
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias.add_(1)
    saved = load(model.save(tmp_path / "edited"), CPU)
    assert torch.equal(saved.backbone.state_dict()["proj_out_2.bias"], pipe.transformer.proj_out_2.bias)


def test_nothing_is_written_over_and_half_a_model_is_never_left(tmp_path, monkeypatch):
    model = from_pipeline(tiny.pipeline("dit"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="is there already"):
        model.save(tmp_path / "taken")

    def full(self, folder: Path, **options):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.modules["vae"]), "save_pretrained", full)
    with pytest.raises(MachineError, match="No space left"):
        model.save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["taken"]
