"""The times of every scheduler class of the installed diffusers library, and what a solver does at them."""

import inspect

import diffusers
import pytest
import torch

from diffcore.checkpoint import catalog
from diffcore.denoiser import DiscreteSchedule, FlowSchedule, schedule_from
from diffcore.denoiser.scheduler import EDM, FLOW, OTHERS, SCHEDULERS
from diffcore.errors import IncompatibleModelError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's, of numpy

CLASSES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and name not in SCHEDULERS and inspect.isclass(getattr(diffusers, name))
)
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def visited(scheduler, steps: int) -> list[float]:
    """Returns the times at which steps of the library's own loop begin."""
    scheduler.set_timesteps(steps)
    times = (scheduler.sigmas[:-1] if type(scheduler).__name__ in (*EDM, *FLOW) else scheduler.timesteps).tolist()
    if type(scheduler).__name__.startswith("KDPM2"):
        return times[::2]  # every second time lies inside a step
    return [time for index, time in enumerate(times) if index == 0 or time != times[index - 1]]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_are_those_of_the_class(name, spacing):
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    settings = STABLE | {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    settings |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    theirs = kind(**{key: value for key, value in settings.items() if key in known})
    ours = schedule_from(theirs)
    for steps in (1, 4, 20, 50):
        times = ours.timesteps(steps)
        assert len(times) == steps
        assert times.tolist() == pytest.approx(visited(theirs, steps), rel=2e-6, abs=1e-6)
        alpha, sigma = ours.alpha_sigma(times)
        if name in OTHERS and getattr(theirs, "sigmas", None) is not None and theirs.order == 1:
            # Their levels at their times: the ratio of sigma and alpha.
            assert (sigma / alpha).tolist() == pytest.approx(theirs.sigmas[:steps].tolist(), rel=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_other_classes_are_refused_by_name(name):
    with pytest.raises(IncompatibleModelError, match=name):
        schedule_from({"_class_name": name, "beta_schedule": "linear"})


def test_model_folders_may_name_what_can_be_read_and_nothing_else():
    assert set(catalog.SCHEDULERS) == set(SCHEDULERS)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_noise_levels_of_a_class_are_its_steps(name, option):
    theirs = getattr(diffusers, name)(**STABLE, **{option: True})
    ours = schedule_from(theirs)
    theirs.set_timesteps(7)
    times = ours.timesteps(7)
    assert times.tolist() == pytest.approx(theirs.timesteps.tolist())
    if name == "EulerDiscreteScheduler":  # the others round their times, and keep the levels of those they rounded
        alpha, sigma = ours.alpha_sigma(times)
        assert (sigma / alpha).tolist() == pytest.approx(theirs.sigmas[:7].tolist(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("DDIMScheduler", True),
        ("PNDMScheduler", False),
        ("EulerDiscreteScheduler", True),
        ("DEISMultistepScheduler", False),
        ("DPMSolverMultistepScheduler", True),
    ],
)
def test_the_last_step_ends_where_the_class_ends(name, clean):
    assert schedule_from({"_class_name": name, "beta_schedule": "linear"}).set_alpha_to_one == clean
    # What a class does not know is left in files by others and means nothing to it.
    left = schedule_from(
        {"_class_name": "EulerDiscreteScheduler", **STABLE, "set_alpha_to_one": False, "clip_sample": True}
    )
    assert left.set_alpha_to_one
    assert left.clip_x0 is None


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        ({"_class_name": "DDPMScheduler"}, 1.0),
        ({"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 2.5}, 2.5),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, 1.0),
        ({"_class_name": "LCMScheduler", "clip_sample": False}, None),
        ({"_class_name": "PNDMScheduler", "clip_sample": True}, None),
    ],
)
def test_the_bound_of_x0_is_the_classes(config, bound):
    assert schedule_from({"beta_schedule": "linear", **config}).clip_x0 == bound


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("DDIMScheduler", "thresholding", True),
        ("DPMSolverMultistepScheduler", "thresholding", True),
        ("LCMScheduler", "thresholding", True),
        ("UniPCMultistepScheduler", "use_flow_sigmas", True),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EDMDPMSolverMultistepScheduler", "final_sigmas_type", "sigma_min"),
    ],
)
def test_settings_without_a_counterpart_are_refused_by_name(name, setting, value):
    with pytest.raises(IncompatibleModelError, match=f"{name} has {setting} = {value}"):
        schedule_from({"_class_name": name, "beta_schedule": "linear", setting: value})


def test_a_class_without_such_a_grid_says_so():
    with pytest.raises(ValueError, match="`steps` is 60; LCMScheduler has no such grid"):
        schedule_from(diffusers.LCMScheduler()).timesteps(60)
    with pytest.raises(ValueError, match="`clip_x0` is 0"):
        DiscreteSchedule(clip_x0=0.0)


@pytest.mark.parametrize(
    ("name", "spacing", "steps", "told"),
    [
        ("EulerDiscreteScheduler", "linspace", 1001, "there are 1000 timesteps"),
        ("PNDMScheduler", "linspace", 2000, "there are 1000 timesteps"),
        ("HeunDiscreteScheduler", "leading", 1000, "`steps_offset` 1; there are 1000 timesteps"),
        ("DPMSolverMultistepScheduler", "leading", 999, "`steps_offset` 1; there are 1000 timesteps"),
        ("UniPCMultistepScheduler", "leading", 1000, "UniPCMultistepScheduler puts them all at t = 1"),
    ],
)
def test_more_steps_than_there_are_timesteps_are_refused(name, spacing, steps, told):
    settings = {"_class_name": name, **STABLE, "timestep_spacing": spacing, "steps_offset": 1}
    with pytest.raises(ValueError, match=f"`steps` is {steps}.*{told}"):
        schedule_from(settings).timesteps(steps)


def test_levels_between_two_indices_lie_between_theirs():
    schedule = DiscreteSchedule(rescale_betas_zero_snr=True)
    t = torch.tensor([10.0, 10.25, 11.0, 998.0, 998.5, 999.0], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    ratio = sigma / alpha
    assert float(ratio[1]) == pytest.approx(0.75 * float(ratio[0]) + 0.25 * float(ratio[2]), rel=1e-12)
    assert (alpha**2 + sigma**2).tolist() == pytest.approx([1] * 6)
    assert alpha[4:].tolist() == [0, 0]
    whole = torch.tensor([10, 11, 998, 999])
    assert torch.equal(schedule.alpha_sigma(whole)[0], schedule.alpha_sigma(whole.float())[0])


def test_grids_are_values():
    config = {"_class_name": "EulerDiscreteScheduler", **STABLE}
    assert schedule_from(config) == schedule_from(config)
    assert schedule_from(config) != schedule_from(config | {"use_karras_sigmas": True})
    assert "use_karras_sigmas" not in repr(schedule_from(config))
    assert hash(schedule_from(config)) == hash(schedule_from(config))
    assert isinstance(schedule_from({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}), FlowSchedule)
