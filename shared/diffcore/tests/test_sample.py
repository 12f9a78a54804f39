import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from diffcore.denoiser import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    GaussianMixtureDenoiser,
    NetworkDenoiser,
    Prediction,
    sample,
    schedule_from,
)
from diffcore.noise import philox_normal

SHAPE = (4, 4, 8, 8)


def gaussian(schedule, dim: int = 256, std: float = 1.2) -> GaussianMixtureDenoiser:
    mean = torch.randn(1, dim, generator=torch.Generator().manual_seed(9))
    return GaussianMixtureDenoiser(mean, torch.tensor([std]), torch.ones(1), schedule)


def noise_of(shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def batch(t: float) -> torch.Tensor:
    return torch.full((SHAPE[0],), float(t))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_equals_diffusers(spacing, eta, clip):
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
        set_alpha_to_one=False,
        clip_sample=clip is not None,
    )
    theirs.set_timesteps(50)
    denoiser, seeds = gaussian(schedule_from(theirs)), torch.tensor([5, 6, 7, 8])
    x = noise_of()
    for index, t in enumerate(theirs.timesteps):
        output = denoiser(x, batch(t)).noise
        fresh = philox_normal(0, seeds, SHAPE[1:], step=index, stream=int.from_bytes(b"eta"))
        options = {"eta": eta, "variance_noise": fresh if eta else None, "use_clipped_model_output": clip is not None}
        x = theirs.step(output, int(t), x, **options).prev_sample
    ours = sample(denoiser, noise_of(), steps=50, eta=eta, seeds=seeds, clip_x0=clip)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("solver", "scheduler", "steps"), [("euler", EulerDiscreteScheduler, 50), ("heun", HeunDiscreteScheduler, 10)]
)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_and_heun_equal_diffusers(solver, scheduler, steps, spacing):
    theirs = scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    denoiser = gaussian(schedule_from(theirs))
    # From the same state: theirs lives in x / alpha.
    alpha = denoiser.schedule.alpha_sigma(theirs.timesteps[:1])[0]
    x = noise_of() / alpha
    for t in theirs.timesteps:
        output = denoiser(theirs.scale_model_input(x, t), batch(t)).noise
        x = theirs.step(output, t, x).prev_sample
    torch.testing.assert_close(sample(denoiser, noise_of(), steps=steps, solver=solver), x, atol=1e-5, rtol=1e-5)


def test_flow_euler_equals_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(28)
    denoiser, x = gaussian(schedule_from(theirs)), noise_of()
    for t, sigma in zip(theirs.timesteps, theirs.sigmas[:-1], strict=True):
        x = theirs.step(denoiser(x, batch(sigma)).flow, t, x).prev_sample
    torch.testing.assert_close(sample(denoiser, noise_of(), steps=28, solver="euler"), x, atol=1e-5, rtol=1e-5)


def test_edm_euler_equals_diffusers():
    theirs = EDMEulerScheduler()
    theirs.set_timesteps(18)
    denoiser, x = gaussian(schedule_from(theirs)), 80 * noise_of()
    for t, sigma in zip(theirs.timesteps, theirs.sigmas[:-1], strict=True):
        theirs.scale_model_input(x, t)
        seen = denoiser(x, batch(sigma))
        output = Prediction(x, x, seen.alpha, seen.sigma, "edm").target(seen.x0, seen.noise)
        x = theirs.step(output, t, x).prev_sample
    torch.testing.assert_close(sample(denoiser, noise_of(), steps=18, solver="euler"), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("schedule", [FlowSchedule(), EDMSchedule(sigma_max=10.0)], ids=["flow", "edm"])
def test_error_falls_with_the_order_of_the_solver(solver, order, schedule):
    std, count = 0.7, (32, 64, 128)
    denoiser = gaussian(schedule, dim=8, std=std)
    start = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in count:
        times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        times = times if isinstance(schedule, FlowSchedule) else 10 * times
        alpha, sigma = (float(level) for level in schedule.alpha_sigma(times[0]))
        # The probability flow carries quantiles: x0 - m is proportional to x_t - alpha m.
        exact = denoiser.means + std * (sigma * start - alpha * denoiser.means) / math.hypot(alpha * std, sigma)
        errors.append(float((sample(denoiser, start, timesteps=times, solver=solver) - exact).norm()))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize(
    "schedule",
    [
        FlowSchedule(),
        FlowSchedule(shift=3.0),
        EDMSchedule(),
        DiscreteSchedule(spacing="trailing"),
        DiscreteSchedule(rescale_betas_zero_snr=True, spacing="trailing"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("solver", "eta", "steps"), [("ddim", 0.0, 100), ("ddim", 1.0, 200), ("heun", 0.0, 30)])
def test_every_schedule_samples_the_same_distribution(schedule, solver, eta, steps):
    means, stds = torch.tensor([[-1.0], [1.5]]), torch.tensor([0.3, 0.5])
    denoiser = GaussianMixtureDenoiser(means, stds, torch.tensor([0.25, 0.75]), schedule)
    # Evenly spread quantiles instead of draws: what is left is the solver's error.
    quantiles = torch.special.ndtri((torch.arange(4000) + 0.5).double() / 4000).unsqueeze(1)
    x = sample(denoiser, quantiles, steps=steps, solver=solver, eta=eta, seeds=torch.arange(4000))
    variance = 0.25 * 0.09 + 0.75 * 0.25 + 0.25 * 0.75 * 2.5**2
    assert float(x.mean()) == pytest.approx(0.875, abs=0.05)
    assert float(x.var()) == pytest.approx(variance, rel=0.05)
    assert float((x < 0.2).double().mean()) == pytest.approx(0.25, abs=0.025)


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 7), ("euler", 7), ("heun", 13)])
def test_calls_per_solver(solver, calls):
    class Counting(GaussianMixtureDenoiser):
        count = 0

        def forward(self, x_t, t, cond=None):
            self.count += 1
            return super().forward(x_t, t, cond)

    denoiser = Counting(torch.zeros(1, 2), torch.ones(1), torch.ones(1), FlowSchedule())
    steps = []
    sample(denoiser, torch.randn(3, 2), steps=7, solver=solver, on_step=lambda index, _: steps.append(index))
    assert denoiser.count == calls
    assert steps == list(range(7))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_row_depends_on_its_own_seed_alone(eta):
    denoiser, noise, seeds = gaussian(FlowSchedule()), noise_of(), torch.tensor([11, 12, 13, 14])
    together = sample(denoiser, noise, steps=6, eta=eta, seeds=seeds)
    apart = torch.cat([sample(denoiser, noise[i : i + 1], steps=6, eta=eta, seeds=seeds[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    if eta:
        other = sample(denoiser, noise, steps=6, eta=eta, seeds=seeds + 1)
        assert not torch.allclose(other, together, atol=1e-2)


def test_zero_snr_needs_more_than_epsilon():
    class Zero(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    schedule = DiscreteSchedule(rescale_betas_zero_snr=True, spacing="trailing")
    with pytest.warns(UserWarning, match="zero-SNR"):
        epsilon = NetworkDenoiser(Zero(), schedule, "epsilon")
    with pytest.raises(ValueError, match="epsilon says nothing about x0 at t = 999"):
        sample(epsilon, torch.randn(2, 3), steps=4)
    for solver in ("ddim", "heun"):
        x = sample(NetworkDenoiser(Zero(), schedule, "v_prediction"), torch.randn(2, 3), steps=4, solver=solver)
        assert torch.isfinite(x).all()


def test_no_rows_give_no_samples_and_nothing_is_differentiated():
    denoiser = gaussian(FlowSchedule(), dim=3)
    assert sample(denoiser, torch.randn(0, 3), steps=2).shape == (0, 3)
    assert not sample(denoiser, torch.randn(2, 3, requires_grad=True), steps=2).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.5}, "without `seeds`"),
        ({"eta": 1.5}, r"lie in \[0, 1\]"),
        ({"eta": 0.5, "solver": "heun"}, "only ddim"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian(FlowSchedule(), dim=3), torch.randn(2, 3), **options)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        (DiscreteSchedule(), "epsilon"),
        (DiscreteSchedule(), "sample"),
        (DiscreteSchedule(rescale_betas_zero_snr=True, spacing="trailing"), "v_prediction"),
        (FlowSchedule(), "flow_prediction"),
        (EDMSchedule(), "edm"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("heun", 0.0)])
def test_the_loop_asks_the_device_nothing(schedule, kind, solver, eta):
    class Backbone(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x) + t[:, None]

    # Tensors on the meta device have no values: whoever asks for one fails.
    denoiser = NetworkDenoiser(Backbone(4, 4, device="meta"), schedule, kind)
    noise, seeds = torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    views = []
    x = sample(
        denoiser,
        noise,
        steps=3,
        solver=solver,
        eta=eta,
        seeds=seeds,
        clip_x0=1.0,
        on_step=lambda _, prediction: views.append((prediction.x0, prediction.score)),
    )
    assert x.shape == (3, 4)
    assert x.device.type == "meta"
    assert len(views) == 3
