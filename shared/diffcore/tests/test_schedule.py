import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, bridge, schedule_from
from diffcore.errors import IncompatibleModelError

KINDS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
CONTINUOUS = [FlowSchedule(), FlowSchedule(shift=3.0), EDMSchedule()]
EVERY = [*CONTINUOUS, DiscreteSchedule(), DiscreteSchedule(betas="squaredcos_cap_v2")]


def times_of(schedule) -> torch.Tensor:
    """Times from nearly clean to nearly pure noise, in float64."""
    ends = {FlowSchedule: (0.01, 0.99), EDMSchedule: (0.002, 80), DiscreteSchedule: (0, 999)}[type(schedule)]
    return torch.linspace(*ends, 37, dtype=torch.float64).round(decimals=3 if ends[1] < 100 else 0)


@pytest.mark.parametrize("betas", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_tables_equal_diffusers(betas, zero_snr):
    theirs = DDIMScheduler(beta_schedule=betas, rescale_betas_zero_snr=zero_snr)
    ours = schedule_from(theirs)
    alpha, sigma = ours.alpha_sigma(torch.arange(1000, dtype=torch.float64))
    # float32 tables: 4.7e-7 off at most; rescaling squares and divides once more.
    torch.testing.assert_close(alpha.square(), theirs.alphas_cumprod.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000).double(), atol=1e-15, rtol=0)
    assert bool(alpha[-1] == 0) == zero_snr


@pytest.mark.parametrize("betas", KINDS)
def test_add_noise_equals_diffusers(betas):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 250, 700, 999])
    theirs = DDPMScheduler(beta_schedule=betas)
    torch.testing.assert_close(
        schedule_from(theirs).add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-5, rtol=0
    )
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(5)
    torch.testing.assert_close(
        FlowSchedule().add_noise(x0, noise, flow.sigmas[:5]),
        flow.scale_noise(x0, flow.timesteps, noise),
        atol=1e-6,
        rtol=0,
    )


def test_defaults_are_those_of_ddpm():
    assert schedule_from(DDPMScheduler()) == DiscreteSchedule(clip_x0=1.0)
    assert schedule_from(EDMEulerScheduler()) == EDMSchedule()


def test_trained_betas_are_taken_as_they_are():
    betas = torch.linspace(1e-3, 0.2, 20, dtype=torch.float64).tolist()
    schedule = schedule_from(DDPMScheduler(num_train_timesteps=20, trained_betas=betas))
    expected = math.prod(1 - beta for beta in betas[:8])
    assert float(schedule.alpha_sigma(torch.tensor(7.0).double())[0]) ** 2 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 5, 50, 1000])
def test_solver_grid_equals_diffusers(spacing, steps):
    theirs = DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    ours = schedule_from(theirs)
    assert ours.timesteps(steps).tolist() == theirs.timesteps.tolist()
    if spacing == "linspace":  # the library puts a single step at index 0, where there is nothing to denoise
        own = DiscreteSchedule(spacing="linspace").timesteps(steps).tolist()
        assert own == ([999] if steps == 1 else theirs.timesteps.tolist())
    alpha, _ = ours.clean_alpha_sigma()
    assert alpha**2 == pytest.approx(float(theirs.final_alpha_cumprod), abs=1e-6)


def test_flow_and_edm_grids_equal_diffusers():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(28)
    torch.testing.assert_close(schedule_from(flow).timesteps(28).float(), flow.sigmas[:-1], atol=1e-6, rtol=0)
    edm = EDMEulerScheduler()
    edm.set_timesteps(18)
    torch.testing.assert_close(schedule_from(edm).timesteps(18).float(), edm.sigmas[:-1], atol=1e-6, rtol=2e-6)


def test_flow_grid_runs_evenly_from_one_to_zero():
    assert FlowSchedule().timesteps(4).tolist() == [1, 0.75, 0.5, 0.25]
    assert FlowSchedule(shift=3.0).timesteps(2).tolist() == pytest.approx([1, 0.75])


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_log_snr_falls_and_finds_its_way_back(schedule):
    t = times_of(schedule)
    alpha, sigma = schedule.alpha_sigma(t)
    log_snr = schedule.log_snr(t)
    torch.testing.assert_close(log_snr, 2 * (alpha / sigma).log(), rtol=1e-9, atol=1e-12)
    assert bool((log_snr.diff() < 0).all())
    torch.testing.assert_close(schedule.timestep_at(log_snr), t, rtol=1e-6, atol=0)


def test_timestep_at_is_the_nearest_index_and_the_lower_of_two():
    schedule = DiscreteSchedule(num_timesteps=50)
    table = schedule.log_snr(torch.arange(50, dtype=torch.float64))
    query = torch.linspace(20, -20, 400, dtype=torch.float64)
    nearest = (query[:, None] - table).abs().argmin(1)
    assert torch.equal(schedule.timestep_at(query), nearest.double())
    assert float(schedule.timestep_at((table[3] + table[4]) / 2)) == 3


def test_zero_snr_skips_the_last_index():
    schedule = DiscreteSchedule(rescale_betas_zero_snr=True)
    t = schedule.timestep_at(torch.tensor([-1e9, -math.inf], dtype=torch.float64))
    assert t.tolist() == [998, 999]


@pytest.mark.parametrize("source", EVERY, ids=repr)
@pytest.mark.parametrize("target", CONTINUOUS, ids=repr)
def test_bridges_carry_the_same_sample(source, target):
    t = times_of(source)
    x0, noise = torch.randn(2, len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_t = source.add_noise(x0, noise, t)
    carried, there = bridge(x_t, t, source, target)
    torch.testing.assert_close(carried, target.add_noise(x0, noise, there), rtol=1e-6, atol=1e-9)
    back, again = bridge(carried, there, target, source)
    torch.testing.assert_close(again, t, rtol=1e-6, atol=0)
    torch.testing.assert_close(back, x_t, rtol=1e-6, atol=1e-9)


def test_bridge_is_defined_at_pure_noise():
    source = DiscreteSchedule(rescale_betas_zero_snr=True)
    noise = torch.randn(1, 4)
    x_t, t = bridge(noise, torch.tensor([999.0]), source, FlowSchedule())
    assert float(t) == 1
    torch.testing.assert_close(x_t, noise)


def test_levels_have_the_precision_of_t_and_never_less_than_float32():
    for schedule in EVERY:
        for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32)):
            assert schedule.alpha_sigma(torch.ones(2, dtype=dtype))[1].dtype == expected
        assert schedule.log_snr(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_schedules_survive_half_precision_and_compare_by_value():
    schedule = DiscreteSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
    t = torch.arange(1000)
    module = torch.nn.Module()
    module.schedule = schedule
    before = schedule.alpha_sigma(t)[0]
    module.half()
    assert torch.equal(schedule.alpha_sigma(t)[0], before)
    assert schedule == DiscreteSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = sigmoid"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "sigma_schedule = exponential"),
    ],
)
def test_unknown_schedulers_are_refused_by_name(config, named):
    with pytest.raises(IncompatibleModelError, match=named):
        schedule_from(config)


def test_a_saved_configuration_gives_the_same_schedule(tmp_path):
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    scheduler.save_config(tmp_path)
    assert schedule_from(EulerDiscreteScheduler.load_config(tmp_path)) == schedule_from(scheduler)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscreteSchedule(num_timesteps=0),
        lambda: DiscreteSchedule(betas=(0.1, 0.2)),
        lambda: DiscreteSchedule(num_timesteps=2, betas=(0.1, 1.2)),
        lambda: FlowSchedule(shift=0.0),
        lambda: FlowSchedule(last_time=1.0),
        lambda: EDMSchedule(sigma_min=0.0),
        lambda: EDMSchedule(sigma_data=0.0),
        lambda: DiscreteSchedule().timesteps(0),
        lambda: DiscreteSchedule().timesteps(1001),
        lambda: DiscreteSchedule(steps_offset=1).timesteps(1000),
        lambda: DiscreteSchedule().alpha_sigma(torch.tensor([1000])),
        lambda: DiscreteSchedule().alpha_sigma(torch.tensor([-1])),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"\d"):
        make()
