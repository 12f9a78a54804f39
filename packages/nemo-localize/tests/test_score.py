import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, Prediction
from diffcore.denoiser.prediction import mixture
from nemo_localize.score import consistency, noise_difference, num_scales, published_similarity, similarity, stretched


def pictures(count: int, side: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.rand(2, count, 4, side, side, generator=torch.Generator().manual_seed(seed))
    return a, 0.6 * a + 0.4 * b


@pytest.mark.parametrize(("side", "scales"), [(64, 3), (44, 3), (43, 2), (16, 2), (12, 2), (11, 1), (6, 1)])
def test_as_many_scales_as_fit(side, scales):
    assert num_scales(side) == scales


def test_too_small_latents_are_refused():
    with pytest.raises(ValueError, match="side of 5"):
        num_scales(5)


@pytest.mark.parametrize("side", [64, 43, 16])
def test_similarity_is_torchmetrics_per_pair(side):
    a, b = pictures(3, side)
    betas = (0.33,) * num_scales(side)
    for value, x, y in zip(similarity(a, b), a, b, strict=True):
        expected = ms_ssim(x[None], y[None], kernel_size=11, betas=betas, reduction="none", data_range=1.0)
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)


def test_one_scale_is_plain_ssim_with_the_same_exponent():
    a, b = pictures(2, 11)
    expected = ssim(a[:1], b[:1], kernel_size=11, data_range=1.0, reduction="none").relu() ** 0.33
    assert similarity(a, b)[0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_identity_and_complement():
    a, _ = pictures(2, 44)
    assert torch.allclose(similarity(a, a), torch.ones(2), atol=1e-6)
    assert torch.equal(similarity(a, 1 - a), torch.zeros(2))


def test_a_pair_does_not_depend_on_its_neighbours():
    a, b = pictures(6, 16)
    b[3:] = b[3:].clamp(0.4, 0.6)
    alone = torch.cat([similarity(x[None], y[None]) for x, y in zip(a, b, strict=True)])
    assert torch.allclose(similarity(a, b), alone, atol=1e-6)
    # The published code's does: that is what its compatible mode reproduces.
    assert (published_similarity(a, b)[:3] - published_similarity(a[:3], b[:3])).abs().max() > 1e-5


# Of torchmetrics 1.3.2, which the published threshold is of: multiscale_structural_similarity_index_measure with
# kernel_size=11, betas=(0.33,) * scales, reduction="none", of `pictures(3, side)`.
PUBLISHED = {
    64: (0.791376, 0.793763, 0.767498),
    44: (0.771890, 0.802499, 0.800841),
    43: (0.852263, 0.851797, 0.861784),
    22: (0.838258, 0.857118, 0.855086),
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_the_published_score_leaves_the_border_of_the_coarsest_scale_out(side):
    a, b = pictures(3, side)
    assert published_similarity(a, b).tolist() == pytest.approx(PUBLISHED[side], abs=2e-6)
    later = ms_ssim(a, b, kernel_size=11, betas=(0.33,) * num_scales(side), reduction="none")
    assert (later - torch.tensor(PUBLISHED[side])).abs().max() > 1e-3


def test_where_the_border_is_all_there_is_it_counts():
    for side in (21, 12, 10):
        a, b = pictures(2, side)
        assert ((published_similarity(a, b) > 0.5) & (published_similarity(a, b) < 1)).all()


def test_nan_is_refused():
    a, b = pictures(2, 16)
    b[1, 2, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 2 rows: 1"):
        similarity(a, b)


def test_consistency_is_the_best_of_the_other_seeds():
    a, b = pictures(3, 16)
    deltas = torch.stack([a[0], a[1], b[1]])[None]  # the last two are alike
    found = consistency(deltas)[0]
    expected = similarity(a[1:2], b[1:2])[0]
    assert found[1] == found[2] == pytest.approx(expected.item(), abs=1e-6)
    assert found[0] == pytest.approx(max(similarity(a[0:1], x[1:2]).item() for x in (a, b)), abs=1e-6)
    assert consistency(deltas, published=True).shape == (1, 3)
    with pytest.raises(ValueError, match="at least 2"):
        consistency(deltas[:, :1])


def test_stretching_ignores_scale_and_level():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    a, b = torch.tensor([0.5, 3, 200]).view(3, 1, 1), torch.tensor([-7, 0, 4.0]).view(3, 1, 1)
    unit, bad = stretched(a * x + b)
    assert torch.allclose(unit, stretched(x)[0], atol=1e-12)
    assert not bad.any()
    assert unit.amin() == 0 and unit.amax() == 1  # noqa: PT018


def test_constant_and_infinite_channels_are_told():
    x = torch.randn(3, 2, 8, 8)
    x[0, 1], x[1, 0, 2, 2], x[2, 1, 0, 0] = 2.0, torch.inf, torch.nan
    unit, bad = stretched(x)
    assert bad.tolist() == [[False, True], [True, False], [False, True]]
    assert torch.isfinite(unit).all()


SCHEDULES = [
    ("epsilon", DiscreteSchedule(), 981.0),
    ("v_prediction", DiscreteSchedule(), 981.0),
    ("sample", DiscreteSchedule(), 981.0),
    ("edm", EDMSchedule(), 80.0),
    ("flow_prediction", FlowSchedule(), 0.9),
]


@pytest.mark.parametrize(("kind", "schedule", "t"), SCHEDULES)
def test_the_noise_difference_is_the_same_whatever_is_predicted(kind, schedule, t):
    generator = torch.Generator().manual_seed(0)
    noise, x0 = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    level = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = (value.view(1, 1, 1, 1) for value in schedule.alpha_sigma(level))
    x_t = noise * float(schedule.initial_scale(level))
    predicted_noise = (x_t - alpha * x0) / sigma
    p, q = mixture(kind, alpha, sigma)
    output = p * x0 + q * predicted_noise
    ones = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    prediction = Prediction(output, x_t, alpha * ones, sigma * ones, kind)
    found = stretched(noise_difference(prediction, noise, schedule, t))[0]
    assert torch.allclose(found, stretched(predicted_noise - noise)[0], atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "schedule", "t"),
    [("v_prediction", DiscreteSchedule(rescale_betas_zero_snr=True), 999.0), ("flow_prediction", FlowSchedule(), 1.0)],
)
def test_at_pure_noise_it_is_the_clean_estimate(kind, schedule, t):
    noise, x0 = torch.randn(2, 1, 4, 8, 8)
    output = -x0 if kind == "v_prediction" else noise - x0
    ones = torch.ones(1, 1, 1, 1)
    prediction = Prediction(output, noise, 0 * ones, ones, kind)
    assert torch.allclose(noise_difference(prediction, noise, schedule, t), -x0, atol=1e-5)
