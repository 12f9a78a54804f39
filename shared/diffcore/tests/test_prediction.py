import itertools

import pytest
import torch

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, Prediction
from diffcore.denoiser.prediction import mixture, unmix

VARIANCE_PRESERVING = DiscreteSchedule()
CASES = [
    *itertools.product(["epsilon", "sample", "v_prediction"], [VARIANCE_PRESERVING, FlowSchedule()]),
    ("flow_prediction", FlowSchedule()),
    ("flow_prediction", VARIANCE_PRESERVING),
    ("epsilon", EDMSchedule()),
    ("sample", EDMSchedule()),
    ("edm", EDMSchedule()),
]
TIMES = {
    DiscreteSchedule: torch.arange(0, 1000, 37),
    FlowSchedule: torch.linspace(0.01, 0.99, 25),
    EDMSchedule: torch.logspace(-2.5, 1.9, 25),
}


def known(schedule, dtype):
    """Clean samples and noise with one row per noise level, and the levels."""
    t = TIMES[type(schedule)].to(dtype)
    x0, noise = torch.randn(2, len(t), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    alpha, sigma = (level.view(-1, 1, 1) for level in schedule.alpha_sigma(t))
    return x0, noise, alpha, sigma


def perfect(kind, schedule, dtype):
    """The prediction of a network that answers exactly."""
    x0, noise, alpha, sigma = known(schedule, dtype)
    x_t = alpha * x0 + sigma * noise
    output = Prediction(x_t, x_t, alpha, sigma, kind).target(x0, noise)
    return Prediction(output, x_t, alpha, sigma, kind), x0, noise


@pytest.mark.parametrize(("kind", "schedule"), CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_views_give_back_what_was_mixed(kind, schedule, dtype, tolerance):
    prediction, x0, noise = perfect(kind, schedule, dtype)
    alpha, sigma = prediction.alpha, prediction.sigma
    views = {
        "x0": x0,
        "noise": noise,
        "velocity": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "score": -noise / sigma,
    }
    # The system's condition: how much a rounding error of x_t grows at this level.
    grown = torch.maximum(sigma / alpha, alpha / sigma).clamp(min=1) * tolerance
    for name, expected in views.items():
        actual = getattr(prediction, name)
        assert actual.dtype == dtype
        error = (actual - expected).abs() / expected.abs().clamp(min=1)
        assert bool((error <= grown).all()), (name, float((error / grown).max()))


@pytest.mark.parametrize(
    ("kind", "schedule", "target"),
    [
        ("epsilon", VARIANCE_PRESERVING, lambda x0, noise, a, s: noise),
        ("sample", VARIANCE_PRESERVING, lambda x0, noise, a, s: x0),
        ("v_prediction", VARIANCE_PRESERVING, lambda x0, noise, a, s: a * noise - s * x0),
        ("flow_prediction", FlowSchedule(), lambda x0, noise, a, s: noise - x0),
        # c_skip and c_out as the EDM paper's table 1 prints them.
        (
            "edm",
            EDMSchedule(),
            lambda x0, noise, a, s: (x0 - 0.25 / (s**2 + 0.25) * (x0 + s * noise)) / (s * 0.5 / (s**2 + 0.25).sqrt()),
        ),
    ],
)
def test_targets_are_the_published_ones(kind, schedule, target):
    x0, noise, alpha, sigma = known(schedule, torch.float64)
    prediction = Prediction(x0, alpha * x0 + sigma * noise, alpha, sigma, kind)
    torch.testing.assert_close(prediction.target(x0, noise), target(x0, noise, alpha, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "schedule", "table"),
    [
        ("epsilon", VARIANCE_PRESERVING, lambda o, x, a, s: ((x - s * o) / a, o)),
        ("sample", VARIANCE_PRESERVING, lambda o, x, a, s: (o, (x - a * o) / s)),
        ("v_prediction", VARIANCE_PRESERVING, lambda o, x, a, s: (a * x - s * o, s * x + a * o)),
        ("flow_prediction", FlowSchedule(), lambda o, x, a, s: (x - s * o, x + (1 - s) * o)),
        (
            "edm",
            EDMSchedule(),
            lambda o, x, a, s: (
                (x0 := 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * o),
                (x - x0) / s,
            ),
        ),
    ],
)
def test_the_general_inverse_equals_the_table(kind, schedule, table):
    output, x_t, alpha, sigma = known(schedule, torch.float64)
    expected = table(output, x_t, alpha, sigma)
    prediction = Prediction(output, x_t, alpha, sigma, kind)
    general = unmix(output, x_t, alpha, sigma, *mixture(kind, alpha, sigma))
    for pair in (general, (prediction.x0, prediction.noise)):
        torch.testing.assert_close(pair[0], expected[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pair[1], expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "level", "view"),
    [
        ("epsilon", "alpha", "x0"),
        ("epsilon", "alpha", "velocity"),
        ("sample", "sigma", "noise"),
        ("edm", "sigma", "noise"),
        ("sample", "sigma", "score"),
        ("v_prediction", "sigma", "score"),
    ],
)
def test_a_view_that_does_not_exist_names_kind_and_row(kind, level, view):
    levels = {"alpha": torch.full((3, 1), 0.5), "sigma": torch.full((3, 1), 0.5)}
    levels[level][2] = 0
    prediction = Prediction(torch.ones(3, 4), torch.ones(3, 4), **levels, kind=kind)
    with pytest.raises(ValueError, match=rf"kind {kind} needs {level} > 0; it is 0 in row 2"):
        getattr(prediction, view)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_pure_noise_is_in_range_of_velocity_and_sample(kind):
    x0, noise = torch.randn(2, 2, 3)
    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    output = Prediction(noise, noise, zero, one, kind).target(x0, noise)
    prediction = Prediction(output, noise, zero, one, kind)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.noise, noise)


def test_edm_returns_its_input_at_sigma_zero():
    x = torch.randn(2, 3)
    prediction = Prediction(torch.randn(2, 3), x, torch.ones(2, 1), torch.zeros(2, 1), "edm")
    torch.testing.assert_close(prediction.x0, x)
    assert torch.isfinite(prediction.target(x, torch.randn(2, 3))).all()


def test_half_precision_outputs_are_converted_in_float32():
    x0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.full((4, 1), 0.068), torch.full((4, 1), 0.9977)
    x_t = alpha * x0 + sigma * noise
    prediction = Prediction(noise.bfloat16(), x_t, alpha, sigma, "epsilon")
    assert prediction.x0.dtype == torch.float32
    torch.testing.assert_close(prediction.x0, (x_t - sigma * noise.bfloat16().float()) / alpha)


def test_an_unknown_kind_is_refused():
    with pytest.raises(Exception, match=r"kind|prediction type"):
        Prediction(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), "noise")  # type: ignore
