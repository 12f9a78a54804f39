"""Exported folders draw g(z) when diffusers loads and calls them by itself; which schedulers do not is known."""

import contextlib
import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from diffcore.denoiser import DiscreteSchedule, NetworkDenoiser
from diffcore.denoiser.library import built
from diffcore.errors import CorruptArtifactError, IncompatibleModelError, MachineError, UserError
from diffcore.models import from_pipeline, load
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from emd_distill.export import one_step_scheduler
from emd_distill.files import export as writing
from emd_distill.files.export import export
from emd_distill.files.generators import load_generator, save_generator
from emd_distill.generator import OneStepGenerator

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def changed(denoiser: NetworkDenoiser, t: float) -> OneStepGenerator:
    """A generator that differs from its teacher."""
    generator = OneStepGenerator(copy.deepcopy(denoiser), t)
    with torch.no_grad():
        for part in generator.parameters():
            part.mul_(1.01)
    return generator.eval()


def teacher(name: str = "sd15", kind: str | None = None):
    pipe = tiny.pipeline(name)
    if kind is None:
        return from_pipeline(pipe)
    scheduler = built("DDIMScheduler", {**STABLE, "prediction_type": kind, "clip_sample": False, "steps_offset": 1})
    return from_pipeline(pipe, scheduler=scheduler)


@contextlib.contextmanager
def hushed():
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(before)


def one_step(scheduler, network, z: torch.Tensor, hidden: torch.Tensor, t: int, *, given: bool) -> torch.Tensor:
    """What a scheduler makes of noise in one step, told to start at t or by itself."""
    with hushed():
        scheduler.set_timesteps(timesteps=[t]) if given else scheduler.set_timesteps(1)
        time = scheduler.timesteps[0]
        x = z * float(scheduler.init_noise_sigma)
        with torch.no_grad():
            output = network(scheduler.scale_model_input(x, time), time, encoder_hidden_states=hidden).sample
        return scheduler.step(output, time, x).prev_sample


OFF = {"clip_sample": False}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}  # as in Stable Diffusion's folders
EXACT = [
    ("LCMScheduler", OFF),
    ("DDPMScheduler", OFF),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),  # given its timestep; see below
]
WRONG = [
    ("DDIMScheduler", {**OFF, "set_alpha_to_one": False}),
    ("EulerDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero", **LEADING}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "zero", **LEADING}),
]


@pytest.mark.parametrize("t", [399, 500, 999])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_which_schedulers_draw_the_generators_sample(kind, t):
    """LCM, DDPM and DDIM that ends clean draw g(z); DDIM that ends at level 0 and Euler do not."""
    model = teacher(kind=kind)
    generator = changed(model.denoiser, t)
    g = torch.Generator().manual_seed(0)
    z, hidden = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 32, generator=g)
    with torch.no_grad():
        wanted = generator(z, {"encoder_hidden_states": hidden})
    size, network = float(wanted.abs().max()), generator.denoiser.backbone

    def error(name: str, changes: dict, *, given: bool = True) -> float:
        scheduler = built(name, {**STABLE, "prediction_type": kind, **changes})
        return float((one_step(scheduler, network, z, hidden, t, given=given) - wanted).abs().max()) / max(size, 1)

    for name, changes in EXACT:
        assert error(name, changes) < 1e-5, name
    cut = one_step_scheduler(model.denoiser.schedule, t, kind, plain=True)  # DDIM takes no list of timesteps
    assert type(cut).__name__ == "DDIMScheduler"
    assert float((one_step(cut, network, z, hidden, t, given=False) - wanted).abs().max()) / max(size, 1) < 1e-5
    ours = one_step_scheduler(model.denoiser.schedule, t, kind)
    assert float((one_step(ours, network, z, hidden, t, given=False) - wanted).abs().max()) / max(size, 1) < 1e-5
    assert type(ours).__name__ == ("DDIMScheduler" if t < 500 else "LCMScheduler")
    for name, changes in WRONG:
        assert error(name, changes, given=name == "EulerDiscreteScheduler") > 1e-3, name
    # The same cut schedule, but ending at the level of index 0.
    open_ended = built("DDIMScheduler", {**dict(cut.config), "set_alpha_to_one": False})
    assert float((one_step(open_ended, network, z, hidden, t, given=False) - wanted).abs().max()) / max(size, 1) > 1e-4


@pytest.mark.parametrize(("name", "t"), [("sd15", 999), ("sd15", 625), ("sd15", 399), ("sdxl", 399)])
def test_a_pipeline_folder_draws_g_in_one_step_by_plain_diffusers(tmp_path, name, t):
    from diffusers import DiffusionPipeline

    model = teacher(name)
    generator = changed(model.denoiser, t)
    done = export(model, generator, tmp_path / "one", licence="mit", training={"num_steps": 4, "gamma_e": 0.16})
    assert done.error is not None
    assert done.error < 1e-5
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "one")
    pipe.set_progress_bar_config(disable=True)
    prompts, z = ["a cat", "two dogs"], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with hushed():
        found = pipe(prompts, num_inference_steps=1, guidance_scale=1.0, latents=z.clone(), output_type="latent").images
    with torch.no_grad():
        wanted = generator(z, model.prompts(prompts))
    assert float((found - wanted).abs().max()) < 1e-5 * max(float(wanted.abs().max()), 1)
    card = (tmp_path / "one" / "README.md").read_text()
    for part in ('license: "mit"', "| gamma e | 0.16 |", "num_inference_steps=1", "guidance_scale=1.0"):
        assert part in card
    assert ("use diffusers" in card) == (t != 999)
    names = [path.name for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    for path in (tmp_path / "one").rglob("*.json"):
        assert "_name_or_path" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
    # Read back as a generator, and as a model, by this package.
    again = load_generator(tmp_path / "one", model.denoiser)
    with torch.no_grad():
        torch.testing.assert_close(again.generator(z, model.prompts(prompts)), wanted, rtol=1e-5, atol=1e-5)
    assert again.training["num_steps"] == 4


def test_a_class_conditional_transformer_draws_g_in_its_pipeline(tmp_path):
    from diffusers import DiffusionPipeline

    model = teacher("dit")
    generator = changed(model.denoiser, 700)
    export(model, generator, tmp_path / "one")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "one")
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(5)
    found = pipe(class_labels=[3], guidance_scale=1.0, num_inference_steps=1, generator=g, output_type="np").images
    z = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = model.codec.decode(generator(z, {"class_labels": torch.tensor([3])}))
    assert float((torch.from_numpy(found).permute(0, 3, 1, 2) - wanted).abs().max()) < 1e-5


def test_a_flow_pipeline_keeps_its_scheduler_and_starts_at_one(tmp_path):
    model = teacher("sd3")
    done = export(model, changed(model.denoiser, 1.0), tmp_path / "one")
    assert done.scheduler == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(IncompatibleModelError, match=r"t = 0\.9.*level 1"):
        export(model, changed(model.denoiser, 0.9), tmp_path / "two")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("kind", ["edm", "epsilon", "v_prediction"])
def test_the_lines_in_the_card_of_a_bare_network_run_and_draw_g(tmp_path, monkeypatch, kind):
    if kind == "edm":
        model, t = load("zoo:digits8-edm", Runtime(device="cpu")), 2.5
    else:
        scheduler = built("DDPMScheduler", {"prediction_type": kind, "clip_sample": False})
        model, t = from_pipeline(tiny.backbone("unet2d"), scheduler=scheduler), 700
    generator = changed(model.denoiser, t)
    export(model, generator, tmp_path / "one")
    (lines,) = re.findall(r"```python\n(.*?)```", (tmp_path / "one" / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path / "one")
    space: dict = {}
    exec(lines, space)
    with torch.no_grad():
        wanted = generator(space["z"], {"class_labels": torch.tensor([0])})
    assert float((space["x0"] - wanted).abs().max()) < 1e-5 * max(float(wanted.abs().max()), 1)
    again = load_generator(tmp_path / "one", model.denoiser).generator
    with torch.no_grad():
        torch.testing.assert_close(again(space["z"], {"class_labels": torch.tensor([0])}), wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_is_written_whole_and_named(tmp_path):
    from diffusers import DiffusionPipeline

    model = teacher()
    done = export(model, changed(model.denoiser, 999), tmp_path / "one", dtype="bfloat16")
    assert done.error is not None
    assert 1e-5 < done.error < 0.1
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert model.dtype == torch.float32  # the teacher's networks are left alone
    assert "dtype=torch.bfloat16" in (tmp_path / "one" / "README.md").read_text()


def test_a_folder_that_draws_something_else_is_not_kept(tmp_path, monkeypatch):
    model = teacher()
    generator = changed(model.denoiser, 999)

    def early(schedule: DiscreteSchedule, t: int, kind: str, *, plain: bool = False):
        return one_step_scheduler(schedule, t - 200, kind, plain=plain)

    monkeypatch.setattr("emd_distill.export.one_step_scheduler", early)
    with pytest.raises(MachineError, match=r"differ by .*1e-05 is allowed"):
        export(model, generator, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []
    done = export(model, generator, tmp_path / "one", verify=False)
    assert done.error is None


def test_a_network_that_reads_back_with_other_weights_is_not_kept(tmp_path, monkeypatch):
    model = teacher()
    written = writing.library_class

    def spoiled(name: str):
        kind = written(name)

        class Spoiled(kind):
            @classmethod
            def from_pretrained(cls, *args, **options):
                pipe = kind.from_pretrained(*args, **options)
                with torch.no_grad():
                    next(pipe.vae.parameters()).add_(1)
                return pipe

        return Spoiled

    monkeypatch.setattr(writing, "library_class", spoiled)
    with pytest.raises(MachineError, match="vae was read back with another"):
        export(model, changed(model.denoiser, 999), tmp_path / "one")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_knows_what_it_drew_and_is_refused_once_it_draws_something_else(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    model = teacher("dit")
    folder = tmp_path / "one"
    export(model, changed(model.denoiser, 700), folder, dtype=dtype)
    stated = json.loads((folder / "emd-distill.json").read_text())
    assert len(stated["self_test"]) == 64
    load_generator(folder)  # as it was written
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: 1.3 * value if value.ndim > 1 else value for name, value in tensors.items()}, weights)
    with pytest.raises(CorruptArtifactError, match="draws other samples than when it was exported"):
        load_generator(folder)
    save_file(tensors, weights)
    for spoiled in (stated["self_test"][1:], ["a"] * 64):
        (folder / "emd-distill.json").write_text(json.dumps({**stated, "self_test": spoiled}))
        with pytest.raises(CorruptArtifactError, match="draws other samples"):
            load_generator(folder)
    (folder / "emd-distill.json").write_text(json.dumps({**stated, "t": 300}))
    with pytest.raises(CorruptArtifactError, match="weights or settings"):
        load_generator(folder)


def test_what_does_not_fit_is_refused(tmp_path):
    model, other = teacher(), teacher("dit")
    with pytest.raises(IncompatibleModelError, match="no UNet2DConditionModel"):
        export(model, changed(other.denoiser, 900), tmp_path / "one")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(model, changed(model.denoiser, 900), tmp_path / "taken")
    with pytest.raises(UserError, match="is no generator"):
        load_generator(tmp_path / "none", model.denoiser)
    with pytest.raises(UserError, match=r"nor emd-distill\.json"):
        load_generator(tmp_path / "taken", model.denoiser)
    path = save_generator(tmp_path / "g.safetensors", changed(other.denoiser, 900), training={"iterations": 3})
    with pytest.raises(UserError, match="do not fit the teacher's UNet2DConditionModel"):
        load_generator(path, model.denoiser)
    assert load_generator(path, other.denoiser).training == {"iterations": 3}
    (tmp_path / "taken" / "emd-distill.json").write_text(json.dumps({"t": "high"}))
    with pytest.raises(UserError, match="no level"):
        load_generator(Path(tmp_path / "taken"), model.denoiser)


def test_a_run_of_train_is_a_generator_that_export_takes(tmp_path: Path):
    teacher = load("zoo:digits8-edm", Runtime(device="cpu"))
    trained = OneStepGenerator(copy.deepcopy(teacher.denoiser), 2.5)
    with torch.no_grad():
        next(trained.parameters()).add_(0.01)
    path, told = tmp_path / "run" / "generator" / "generator", {"loss": {"num_steps": 4}, "steps": 20}
    save_generator(path, trained, model=teacher, source="zoo:digits8-edm", training=told, iterations=20)
    for place in (tmp_path / "run", tmp_path / "run" / "generator"):
        read = load_generator(place)
        assert torch.equal(next(read.generator.parameters()), next(trained.parameters()))
        assert (read.training["num_steps"], read.training["steps"], read.generator.t) == (4, 20, 2.5)
        assert read.training["iterations"] == 20
    bare = save_generator(tmp_path / "bare.safetensors", trained)
    with pytest.raises(UserError, match="which teacher"):
        load_generator(bare)
