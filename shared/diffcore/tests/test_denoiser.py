from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffcore.denoiser import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    NetworkDenoiser,
)


class Toy(nn.Module):
    """A class-conditional network on flat vectors that sees its timestep."""

    def __init__(self, channels: int = 4, outputs: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 8)
        self.body = nn.Sequential(nn.Linear(channels + 9, 16), nn.SiLU(), nn.Linear(16, outputs))
        self.seen: list[int] = []

    def forward(self, x, t, class_labels=None):
        self.seen.append(len(x))
        labels = torch.zeros(len(x), dtype=torch.long) if class_labels is None else class_labels
        time = (t / 1000).to(x.dtype).unsqueeze(1)
        return self.body(torch.cat([x, time, self.embed(labels)], dim=1))


def rows(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    x_t = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    return x_t, torch.linspace(10, 900, count).round()


@pytest.mark.parametrize(
    "wrap",
    [lambda out: out, lambda out: (out, None), lambda out: SimpleNamespace(sample=out)],
    ids=["tensor", "tuple", "sample"],
)
def test_outputs_of_every_form_are_understood(wrap):
    backbone, (x_t, t) = Toy(), rows()

    def call(network, x, time, cond):
        return wrap(network(x, time, **cond))

    denoiser = NetworkDenoiser(backbone, DiscreteSchedule(), "epsilon", call=call)
    assert torch.equal(denoiser(x_t, t).output, backbone(x_t, t))


def test_conditions_reach_the_backbone_as_keywords():
    backbone, (x_t, t) = Toy(), rows()
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    prediction = NetworkDenoiser(backbone, DiscreteSchedule(), "epsilon")(x_t, t, {"class_labels": labels})
    assert torch.equal(prediction.noise, backbone(x_t, t, class_labels=labels))


def test_twice_the_channels_are_prediction_and_variance():
    backbone, (x_t, t) = Toy(outputs=8), rows()
    prediction = NetworkDenoiser(backbone, DiscreteSchedule(), "epsilon")(x_t, t)
    whole = backbone(x_t, t)
    assert torch.equal(prediction.output, whole[:, :4])
    assert torch.equal(prediction.extra, whole[:, 4:])


def test_outputs_of_another_shape_or_kind_are_refused():
    x_t, t = rows()
    with pytest.raises(ValueError, match=r"\(6, 7\) for x_t of shape \(6, 4\)"):
        NetworkDenoiser(Toy(outputs=7), DiscreteSchedule(), "epsilon")(x_t, t)
    with pytest.raises(TypeError, match="returned dict"):
        NetworkDenoiser(Toy(), DiscreteSchedule(), "epsilon", call=lambda *_: {"out": x_t})(x_t, t)


def test_edm_scales_the_input_and_feeds_the_log_of_sigma():
    seen = {}

    def call(network, x, time, cond):
        seen.update(x=x, t=time)
        return torch.zeros_like(x)

    x_t, sigma = torch.randn(3, 4), torch.tensor([0.0, 0.5, 80.0])
    denoiser = NetworkDenoiser(Toy(), EDMSchedule(), "edm", call=call)
    prediction = denoiser(x_t, sigma)
    c_in = (sigma**2 + 0.25).rsqrt().unsqueeze(1)
    torch.testing.assert_close(seen["x"], c_in * x_t)
    assert torch.isfinite(seen["t"]).all()
    torch.testing.assert_close(seen["t"][1:], sigma[1:].log() / 4)
    torch.testing.assert_close(prediction.x0, 0.25 * c_in**2 * x_t)
    torch.testing.assert_close(prediction.x0[0], x_t[0])


def test_edm_needs_its_schedule_and_epsilon_warns_of_zero_snr():
    with pytest.raises(ValueError, match="EDMSchedule"):
        NetworkDenoiser(Toy(), FlowSchedule(), "edm")
    with pytest.warns(UserWarning, match="zero-SNR"):
        NetworkDenoiser(Toy(), DiscreteSchedule(rescale_betas_zero_snr=True), "epsilon")


def test_a_half_precision_backbone_gets_its_own_precision():
    x_t, t = rows()
    denoiser = NetworkDenoiser(Toy(), DiscreteSchedule(), "v_prediction").bfloat16()
    prediction = denoiser(x_t, t)
    assert prediction.output.dtype == torch.bfloat16
    assert prediction.x0.dtype == prediction.alpha.dtype == torch.float32


def test_a_diffusers_unet_is_called_as_it_wants():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    ).eval()
    x_t, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    with torch.no_grad():
        prediction = NetworkDenoiser(unet, DiscreteSchedule(), "epsilon")(x_t, t, {"class_labels": labels})
        assert torch.equal(prediction.noise, unet(x_t, t, class_labels=labels).sample)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_in_one_pass_equals_two(kind):
    backbone, (x_t, t) = Toy(outputs=8), rows()
    denoiser = NetworkDenoiser(backbone, DiscreteSchedule(), kind)
    cond, uncond = {"class_labels": torch.tensor([0, 1, 2, 3, 0, 1])}, {"class_labels": torch.tensor([4])}
    with torch.no_grad():
        guided = GuidedDenoiser(denoiser, 3.0, uncond)(x_t, t, cond)
        assert backbone.seen == [12]
        with_, without = denoiser(x_t, t, cond), denoiser(x_t, t, {"class_labels": torch.full((6,), 4)})
    torch.testing.assert_close(guided.x0, without.x0 + 3 * (with_.x0 - without.x0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided.noise, without.noise + 3 * (with_.noise - without.noise), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(guided.extra, with_.extra, atol=1e-6, rtol=0)
    assert not torch.allclose(with_.extra, without.extra)


def test_guidance_of_one_runs_b_rows():
    backbone, (x_t, t) = Toy(), rows()
    denoiser = NetworkDenoiser(backbone, DiscreteSchedule(), "epsilon")
    GuidedDenoiser(denoiser, 1.0, None)(x_t, t, {"class_labels": torch.zeros(6, dtype=torch.long)})
    assert backbone.seen == [6]


def test_guidance_names_what_is_missing():
    denoiser = NetworkDenoiser(Toy(), DiscreteSchedule(), "epsilon")
    with pytest.raises(ValueError, match="pass one"):
        GuidedDenoiser(denoiser, 2.0, None)
    x_t, t = rows()
    with pytest.raises(ValueError, match=r"`cond` has \[\], `uncond` has \['class_labels'\]"):
        GuidedDenoiser(denoiser, 2.0, {"class_labels": torch.tensor([4])})(x_t, t, {})


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), FlowSchedule(shift=2.0), EDMSchedule()], ids=repr)
def test_mixture_posterior_equals_numerical_integration(schedule):
    means, stds, weights = torch.tensor([[-1.0], [2.0]]), torch.tensor([0.5, 0.3]), torch.tensor([1.0, 3.0])
    denoiser = GaussianMixtureDenoiser(means, stds, weights, schedule)
    t = schedule.timesteps(9)[2:8]
    x_t = torch.linspace(-3, 3, len(t), dtype=torch.float64).unsqueeze(1)
    grid = torch.linspace(-8, 10, 200_001, dtype=torch.float64)
    density = sum(
        w / s * torch.exp(-0.5 * ((grid - m) / s) ** 2)
        for m, s, w in zip(means.flatten().double(), stds.double(), weights.double(), strict=True)
    )
    alpha, sigma = (level.unsqueeze(1) for level in schedule.alpha_sigma(t))
    log_likelihood = -0.5 * ((x_t - alpha * grid) / sigma) ** 2
    posterior = density * torch.exp(log_likelihood - log_likelihood.amax(1, keepdim=True))
    expected = (posterior * grid).sum(1, keepdim=True) / posterior.sum(1, keepdim=True)
    torch.testing.assert_close(denoiser(x_t, t).x0, expected, rtol=1e-8, atol=1e-8)


def test_mixture_with_full_covariance_is_the_linear_estimator():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    covariance, mean = factor @ factor.T, torch.randn(6, generator=generator, dtype=torch.float64)
    denoiser = GaussianMixtureDenoiser(mean[None], covariance[None], torch.ones(1), EDMSchedule())
    x_t = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)
    gain = covariance @ torch.linalg.inv(covariance + 4 * torch.eye(6))
    expected = mean + (x_t.flatten(1) - mean) @ gain.T
    actual = denoiser(x_t, torch.full((3,), 2.0, dtype=torch.float64)).x0
    torch.testing.assert_close(actual.flatten(1), expected)
