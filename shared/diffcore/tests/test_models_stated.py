"""What a file says about its own parameterisation is followed, or the file is refused with what says so named."""

import json
import shutil

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from diffcore.checkpoint import inspect_model
from diffcore.denoiser import DiscreteSchedule, EDMSchedule, sample
from diffcore.errors import IncompatibleModelError
from diffcore.models import load
from diffcore.models.schedules import schedule_of
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.checkpoints import single_file

CPU = Runtime(device="cpu")
WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 32}
EMPTY = torch.tensor([])
STABLE = DiscreteSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO = DiscreteSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
LINEAR = DiscreteSchedule()


@pytest.fixture(scope="module")
def pipelines():
    return {family: tiny.pipeline(family, width=width) for family, width in WIDTHS.items()}


@pytest.fixture(scope="module")
def like(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("like") / "sdxl"
    pipelines["sdxl"].save_pretrained(folder)
    return folder


@pytest.fixture
def written(pipelines, tmp_path):
    """Writes a single file with tensors and header entries of its own."""

    def write(family="sdxl", metadata=None, **tensors):
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        file = tmp_path / "m.safetensors"
        return single_file(pipelines[family], file, family, change=lambda s: s | named, metadata=metadata)

    return write


def levels(schedule: DiscreteSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    return schedule.alpha_sigma(torch.arange(1000, dtype=torch.float64))


@pytest.mark.parametrize("value", [EMPTY, torch.zeros(0, 3), torch.ones(1), torch.tensor(True), torch.tensor(7)])
@pytest.mark.parametrize("family", WIDTHS)
def test_markers_count_by_their_presence(written, value, family):
    prediction, schedule, known_from = schedule_of(inspect_model(written(family, v_pred=value, ztsnr=value)))
    assert (prediction, known_from) == ("v_prediction", "the tensor v_pred")
    assert schedule.rescale_betas_zero_snr
    assert schedule.timesteps(4)[0] == 999


def test_markers_of_a_backbone_alone_and_of_pickles(tmp_path, written, like):
    state = load_file(written(v_pred=EMPTY, ztsnr=EMPTY))
    prefix = "model.diffusion_model."
    bare = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    save_file(bare | {"v_pred": EMPTY}, tmp_path / "bare.safetensors")
    with pytest.warns(UserWarning, match="not there"):
        assert load(tmp_path / "bare.safetensors", CPU, like=like).denoiser.prediction_type == "v_prediction"
    torch.save({"state_dict": state | {"v_pred": True, "ztsnr": 1, "epoch": 3}}, tmp_path / "m.ckpt")
    model = load(tmp_path / "m.ckpt", CPU, like=like, allow_pickle=True)
    assert model.denoiser.prediction_type == "v_prediction"
    assert model.denoiser.schedule.rescale_betas_zero_snr


def test_markers_count_where_the_named_folder_has_no_scheduler(tmp_path, written, like):
    folder = shutil.copytree(like, tmp_path / "like")
    shutil.rmtree(folder / "scheduler")
    model = load(written(v_pred=EMPTY), CPU, like=folder)
    assert model.denoiser.prediction_type == "v_prediction"
    assert model.denoiser.schedule.betas == "scaled_linear"


@pytest.mark.parametrize(
    ("family", "metadata", "prediction", "where"),
    [
        ("sdxl", {"modelspec.prediction_type": "v"}, "v_prediction", "modelspec.prediction_type"),
        ("sdxl", {"modelspec.prediction_type": "V-Prediction"}, "v_prediction", "modelspec.prediction_type"),
        ("sdxl", {"modelspec.prediction_type": "v_prediction"}, "v_prediction", "modelspec.prediction_type"),
        ("sd21", {"modelspec.prediction_type": "Epsilon prediction"}, "epsilon", "modelspec.prediction_type"),
        ("sd15", {"modelspec.predict_key": "v"}, "v_prediction", "modelspec.predict_key"),
        ("sd15", {"ss_v_parameterization": "True"}, "v_prediction", "ss_v_parameterization"),
        ("sd21", {"ss_v_parameterization": "False"}, "epsilon", "ss_v_parameterization"),
        ("sd21", {"modelspec.predict_key": "epsilon"}, "epsilon", "modelspec.predict_key"),
        ("sd21", {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", "modelspec.architecture"),
        ("sd21", {"modelspec.architecture": "stable-diffusion-v2-768-v/base"}, "v_prediction", "architecture"),
        ("sdxl", {"modelspec.prediction_type": "", "ss_v_parameterization": "None"}, "epsilon", "usual for sdxl"),
    ],
)
def test_the_header_is_heard(written, family, metadata, prediction, where):
    found, _, known_from = schedule_of(inspect_model(written(family, metadata)))
    assert found == prediction
    assert where in known_from


def test_zero_terminal_snr_in_the_header(written):
    metadata = {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}
    assert schedule_of(inspect_model(written("sd15", metadata)))[1].rescale_betas_zero_snr
    metadata["ss_zero_terminal_snr"] = "False"
    assert not schedule_of(inspect_model(written("sd15", metadata)))[1].rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ('model:\n  params:\n    parameterization: "v"  # velocity\n', "v_prediction"),
        ("      parameterization: eps\n", "epsilon"),
        ("    parameterization: x0\n", "sample"),
        ("scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n", "v_prediction"),
        ("scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.EDMScaling\n", None),
        ("parameterization: flow\n", None),
    ],
)
def test_the_yaml_beside_the_file_is_heard(written, text, prediction):
    file = written("sd15")
    file.with_suffix(".yaml").write_text(text)
    if prediction is None:
        with pytest.raises(IncompatibleModelError, match=r"predicts '(EDMScaling|flow)' by m\.yaml, .* not supported"):
            schedule_of(inspect_model(file))
    else:
        assert schedule_of(inspect_model(file))[0] == prediction


def test_what_contradicts_itself_is_refused_until_the_user_decides(written, like):
    file = written("sdxl", {"modelspec.prediction_type": "epsilon"}, v_pred=EMPTY)
    told = r"contradicts itself, it predicts v_prediction by the tensor v_pred and epsilon by the header's modelspec"
    with pytest.raises(IncompatibleModelError, match=told):
        load(file, CPU, like=like)
    assert load(file, CPU, like=like, prediction_type="v_prediction").denoiser.prediction_type == "v_prediction"
    assert schedule_of(inspect_model(file), "epsilon")[::2] == ("epsilon", "`prediction_type`")
    file = written("sdxl", {"modelspec.prediction_type": "rectified flow"})
    with pytest.raises(IncompatibleModelError, match="predicts 'rectified flow' by the header's modelspec"):
        load(file, CPU, like=like)


@pytest.mark.parametrize(
    "names", [("edm_vpred.sigma_max", "edm_vpred.sigma_min"), ("edm_vpred.sigma_max",), ("edm_mean",), ("edm_std",)]
)
def test_mathematics_that_are_not_here_are_refused_by_their_marker(written, names):
    file = written(**{name.replace(".", "__"): torch.tensor(120.0) for name in names})
    with pytest.raises(IncompatibleModelError, match=f"holds {', '.join(names)}: it has the velocity of EDM"):
        inspect_model(file)


def test_latents_scaled_channel_by_channel(written, like, pipelines, tmp_path):
    """Playground v2.5: EDM's preconditioning, and a mean and deviation of each latent channel."""
    mean, std = torch.tensor([-1.5, 2.0, -1.25, 2.5]), torch.tensor([8.0, 6.0, 6.5, 5.0])
    file = written(edm_mean=mean.view(1, 4, 1, 1), edm_std=std.view(1, 4, 1, 1))
    model = load(file, CPU, like=like)
    prediction, schedule, known_from = schedule_of(inspect_model(file))
    assert (prediction, known_from) == ("edm", "the tensors edm_mean and edm_std")
    assert model.denoiser.schedule == schedule == EDMSchedule()
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = x0 * std.view(4, 1, 1) / 0.5 + mean.view(4, 1, 1)
    with torch.no_grad():
        images = (pipelines["sdxl"].vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.codec.decode(x0), images, atol=1e-5, rtol=0)
    own = pipelines["sdxl"].vae.encode(2 * images - 1).latent_dist.mode()
    expected = (own - mean.view(4, 1, 1)) * 0.5 / std.view(4, 1, 1)
    torch.testing.assert_close(model.codec.encode(images), expected, atol=1e-4, rtol=0)
    cond = model.prompts(["a cat", "two dogs"])
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(3)
    state = 80 * x0
    added = {key: cond[key] for key in ("text_embeds", "time_ids")}
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(state, t)
            output = pipelines["sdxl"].unet(seen, t, cond["encoder_hidden_states"], added_cond_kwargs=added).sample
            state = scheduler.step(output, t, state).prev_sample
    ours = sample(model.denoiser, x0, cond, steps=3, solver="euler")
    torch.testing.assert_close(ours, state, atol=1e-4, rtol=1e-4)
    told = {"modelspec.prediction_type": "epsilon"}  # the word for EDM's output too
    assert schedule_of(inspect_model(written("sdxl", told, edm_mean=mean, edm_std=std)))[0] == "edm"
    with pytest.raises(IncompatibleModelError, match="contradicts itself"):
        schedule_of(inspect_model(written("sdxl", {"modelspec.predict_key": "v"}, edm_mean=mean, edm_std=std)))
    file = written(edm_mean=mean.view(1, 4, 1, 1), edm_std=std.view(1, 4, 1, 1))
    with pytest.raises(IncompatibleModelError, match="leave `prediction_type` out"):
        load(file, CPU, like=like, prediction_type="epsilon")
    # As a folder: the scales in the autoencoder's configuration, the schedule in the scheduler's.
    folder = shutil.copytree(like, tmp_path / "folder")
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    config = json.loads((folder / "vae" / "config.json").read_text())
    config |= {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 0.5}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    same = load(folder, CPU)
    assert torch.equal(same.codec.decode(x0), model.codec.decode(x0))
    assert same.denoiser.schedule == schedule
    with pytest.raises(IncompatibleModelError, match="an EDM schedule needs edm"):
        load(folder, CPU, prediction_type="v_prediction")
    EDMEulerScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    with pytest.raises(IncompatibleModelError, match="EDM's preconditioning and predicts v_prediction, as CosXL does"):
        load(folder, CPU)
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"latents_std": [1.0, 0.0, 1.0, 1.0]}))
    with pytest.raises(IncompatibleModelError, match="sets latents_std to numbers that are not positive"):
        load(folder, CPU)


@pytest.fixture(scope="module")
def saved_backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny.backbone("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def folder_with(saved_backbone, tmp_path):
    """Writes a backbone's folder with tensors and header entries of its own, under a scheduler's settings."""

    def write(tensors, metadata=None, **settings):
        folder = shutil.copytree(saved_backbone, tmp_path / "b", dirs_exist_ok=True)
        weights = folder / "diffusion_pytorch_model.safetensors"
        save_file(load_file(weights) | tensors, weights, metadata=metadata)
        EulerDiscreteScheduler(**settings).save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"v_pred": EMPTY}, None),
        ({"v_pred": torch.ones(1)}, None),
        ({}, {"modelspec.predict_key": "v"}),
        ({}, {"ss_v_parameterization": "True"}),
    ],
)
def test_a_folder_that_contradicts_its_scheduler_is_refused(folder_with, tensors, metadata):
    told = next(iter(tensors or metadata))
    for read in (lambda path, **how: load(path, CPU, **how).denoiser.prediction_type, predicted):
        folder = folder_with(tensors, metadata)
        with pytest.raises(IncompatibleModelError, match=f"v_prediction by the .*{told}, and its scheduler says eps"):
            read(folder)
        assert read(folder, prediction_type="epsilon") == "epsilon"
        assert read(folder_with(tensors, metadata, prediction_type="v_prediction")) == "v_prediction"


def predicted(path, **how):
    return schedule_of(inspect_model(path), **how)[0]


def test_a_folder_that_ends_in_pure_noise_says_so_twice(folder_with):
    tensors, settings = {"v_pred": EMPTY, "ztsnr": EMPTY}, {"prediction_type": "v_prediction"}
    with pytest.raises(IncompatibleModelError, match="pure noise by the tensor ztsnr, and its scheduler does not"):
        load(folder_with(tensors, **settings), CPU)
    model = load(folder_with(tensors, **settings, rescale_betas_zero_snr=True), CPU)
    assert model.denoiser.schedule.rescale_betas_zero_snr


@pytest.mark.parametrize("name", ["v_pred", "model.diffusion_model.v_pred"])
def test_a_marker_is_heard_wherever_a_tool_moved_it(written, like, name):
    file = written(**{name.replace(".", "__"): EMPTY})
    assert load(file, CPU, like=like).denoiser.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("alphas_cumprod", levels(ZERO)[0] ** 2),
        ("alphas_cumprod", (levels(LINEAR)[0] ** 2).half()),
        ("betas", torch.linspace(1e-4, 0.02, 1000)),
        ("denoiser__sigmas", (levels(LINEAR)[1] / levels(LINEAR)[0]).float()),
        ("sqrt_one_minus_alphas_cumprod", levels(ZERO)[1].float()),
        ("betas", torch.ones(4)),
        ("scale_factor", torch.tensor(0.5)),
    ],
)
def test_tables_of_another_schedule_are_refused_by_name(written, name, table):
    file = written("sd15", **{name: table})
    with pytest.raises(IncompatibleModelError, match=f"its {name.replace('__', '.')} is not the usual one"):
        schedule_of(inspect_model(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_of_the_same_schedule_are_no_obstacle(written, like, dtype, zero):
    alpha, sigma = levels(ZERO if zero else STABLE)
    ratio = (levels(STABLE)[1] / levels(STABLE)[0]).to(dtype)
    tables = {"alphas_cumprod": (alpha**2).to(dtype), "sqrt_one_minus_alphas_cumprod": sigma.to(dtype)}
    tables |= {"denoiser__sigmas": ratio, "sigmas": torch.cat([ratio.flip(0), ratio[:1] * 0])}
    markers = {"v_pred": EMPTY, "ztsnr": EMPTY} if zero else {}
    file = written(**tables, **markers, scale_factor=torch.tensor(0.13025, dtype=dtype))
    assert schedule_of(inspect_model(file))[1].rescale_betas_zero_snr == zero
    if dtype == torch.float32:
        with pytest.raises(IncompatibleModelError, match="its scale_factor is not the usual one"):
            load(file, CPU, like=like)  # whose own scale is another
        load(written(**tables, **markers), CPU, like=like)


def test_what_is_not_followed_is_told(written, like):
    metadata = {"modelspec.encoder_layer": "2", "modelspec.timestep_range": "0,200", "modelspec.title": "x"}
    file = written("sdxl", metadata)
    told = inspect_model(file).warnings
    assert len(told) == 2
    assert "modelspec.encoder_layer is 2 (clip skip)" in told[0]
    assert "modelspec.timestep_range is 0,200" in told[1]
    with pytest.warns(UserWarning, match="clip skip"):
        load(file, CPU, like=like)
    assert inspect_model(written("sdxl", {"modelspec.encoder_layer": "1"})).warnings == ()


def test_info_says_from_where_the_prediction_type_is_known(tmp_path, like):
    assert schedule_of(inspect_model(like))[2] == "prediction_type in scheduler/scheduler_config.json"
    tiny.backbone("sd15").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no scheduler"):
        assert schedule_of(inspect_model(tmp_path))[2] == "what is usual for UNet2DConditionModel"
    EulerDiscreteScheduler().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    del config["prediction_type"]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    known_from = schedule_of(inspect_model(tmp_path))[2]
    assert known_from == "EulerDiscreteScheduler, which predicts it where nothing is said"
    (tmp_path / "denoiser.json").write_text('{"prediction_type": "edm"}')
    assert schedule_of(inspect_model(tmp_path))[2] == "denoiser.json"
