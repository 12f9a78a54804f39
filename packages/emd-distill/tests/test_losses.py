"""Losses of the generator: their gradients against plain formulas, and what must not enter them."""

import pytest
import torch
from torch import Tensor, nn

from diffcore.denoiser import EDMSchedule, GaussianMixtureDenoiser, NetworkDenoiser
from emd_distill.chain import ChainNoise, langevin_eps_z, levels
from emd_distill.distill import student_loss
from emd_distill.draws import Drawn
from emd_distill.losses import EMD, SiD, Situation, diff_instruct, dmd, mean_over, omega

from .conftest import Affine, Modes, drawn, normal

ROWS = 6


class Linear(nn.Module):
    """A backbone that is linear in its scaled input."""

    def __init__(self, seed: int, dim: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in self.layer.parameters():
                part.copy_(torch.randn(part.shape, generator=g) * 0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) + t[:, None] * 0.1


class Net(nn.Module):
    """A generator of some numbers that notes whether its weights were constants when it was called."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 8), nn.SiLU(), nn.Linear(8, dim)).double()
        self.learned: list[bool] = []

    def forward(self, z: Tensor, condition: object = None) -> Tensor:
        self.learned.append(self.net[0].weight.requires_grad)
        return self.net(z)


def networks(kind: str = "edm") -> tuple[NetworkDenoiser, NetworkDenoiser]:
    made = [NetworkDenoiser(Linear(seed).double(), EDMSchedule(), "edm") for seed in (0, 1)]
    return made[0], made[1]


def situation(seed: int = 0, *, rows: int = ROWS, draw=None) -> tuple[Situation, Net]:
    torch.manual_seed(seed)
    generator = Net()
    teacher, student = networks()
    z, eps, _ = drawn(rows, 1, seed, dim=3)
    t = torch.linspace(0.3, 3.0, rows, dtype=torch.float64)
    with torch.no_grad():
        x0 = generator(z)
    generator.learned.clear()

    def noise(count: int, moves: bool) -> ChainNoise:
        made = drawn(rows, count, seed + 1, dim=3)[2]
        return made if moves else ChainNoise(made.eps)

    return Situation(generator, teacher, student, z, x0, eps, t, None, draw or noise), generator


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])


def pulled(s: Situation, generator: Net, z: Tensor, direction: Tensor) -> Tensor:
    """The gradient of mean over all numbers of -direction . g(z)."""
    return gradient(-(generator(z) * direction).mean(), generator)


@pytest.mark.parametrize("cancel", ["none", "last", "complete", "stein"])
@pytest.mark.parametrize("weighting", ["x0", "eps", "likelihood", "snr_cap", "dmd"])
def test_the_gradient_is_that_of_the_displacement(cancel, weighting):
    """The end of the chain, target and weight are constants of the M-step."""
    s, generator = situation()
    loss = EMD(num_steps=3, gamma_z=0.05, noise_cancel=cancel, weighting=weighting)
    told = loss(s)
    found = gradient(told.loss, generator)
    settings = {"gamma_e": 0.16, "gamma_z": 0.05, "kappa": 0.25, "noise_cancel": cancel, "noise": s.draw(3, True)}
    end = langevin_eps_z(generator, s.teacher, s.student, s.z, s.eps, s.t, **settings)
    alpha, sigma = levels(s.teacher, s.t, s.eps)
    ratio = alpha / sigma
    weight = {
        "x0": torch.ones_like(ratio),
        "eps": ratio,
        "likelihood": ratio.square().clamp(max=5.0),
        "snr_cap": ratio.clamp(max=5.0),
        "dmd": 1 / (s.x0 - s.teacher(s.x0 + sigma * s.eps, s.t).x0).detach().abs().mean(1, keepdim=True),
    }[weighting]
    torch.testing.assert_close(found, pulled(s, generator, end.z, weight * end.u), rtol=1e-6, atol=1e-9)
    assert float(told.loss) == pytest.approx(float(0.5 * (weight * end.u).square().mean()))


def test_one_step_of_eps_gives_gamma_times_diff_instruct():
    """T2 for the gradient of all parameters."""
    s, generator = situation()
    one = gradient(EMD(num_steps=1, gamma_z=0.0)(s).loss, generator)
    plain = gradient(diff_instruct()(s).loss, generator)
    torch.testing.assert_close(one, 0.16 * plain, rtol=1e-9, atol=1e-12)
    same = gradient(EMD(num_steps=1, gamma_z=0.0, normalize=True)(s).loss, generator)
    torch.testing.assert_close(same, plain, rtol=1e-9, atol=1e-12)


def test_dmd_divides_by_the_distance_from_the_teacher():
    s, generator = situation()
    found = gradient(dmd()(s).loss, generator)
    sigma = s.t[:, None]
    with torch.no_grad():
        theirs, ours = (network(s.x0 + sigma * s.eps, s.t).x0 for network in (s.teacher, s.student))
        direction = (theirs - ours) / (s.x0 - theirs).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, pulled(s, generator, s.z, direction), rtol=1e-6, atol=1e-9)


def test_sid_differentiates_through_both_scores_and_trains_the_generator_alone():
    s, generator = situation()
    told = SiD(a=1.2)(s)
    found = gradient(told.loss, generator)
    x = generator(s.z)
    y = x + s.t[:, None] * s.eps
    theirs, ours = (network(y, s.t).x0 for network in (s.teacher, s.student))
    rows = ((theirs - ours) * ((theirs - x) - 1.2 * (theirs - ours))).mean(1)
    plain = (rows / (x - theirs).detach().abs().mean(1)).mean()
    assert float(told.loss) == pytest.approx(float(plain), rel=1e-6)
    torch.testing.assert_close(found, gradient(plain, generator), rtol=1e-5, atol=1e-9)
    told = SiD()(s)
    told.loss.backward()
    assert all(p.grad is None for network in (s.teacher, s.student) for p in network.parameters())


def test_the_chain_sees_constant_weights_and_the_m_step_learns():
    """Weights are constants inside a chain, and learn again after it."""
    s, generator = situation()
    EMD(num_steps=4, gamma_z=0.05)(s)
    assert generator.learned == [False] * 4 + [True]


def test_nothing_reaches_teacher_or_student():
    s, _ = situation()
    EMD(num_steps=2, gamma_z=0.05, noise_cancel="stein")(s).loss.backward()
    assert all(p.grad is None for network in (s.teacher, s.student) for p in network.parameters())


@pytest.mark.parametrize("loss", [EMD(num_steps=2, gamma_z=0.05), diff_instruct(), dmd(), SiD()])
def test_a_row_that_is_not_finite_costs_itself_alone(loss):
    s, generator = situation()
    sound = gradient(loss(s).loss, generator)
    eps = s.eps.clone()
    eps[2, 0] = torch.nan
    told = loss(Situation(**{**s.__dict__, "eps": eps}))
    assert told.finite.tolist() == [True, True, False, True, True, True]
    found = gradient(told.loss, generator)
    assert found.isfinite().all()
    # The others' mean: removing the row from the sound batch gives the same.
    rest = [0, 1, 3, 4, 5]

    def noise(count: int, moves: bool) -> ChainNoise:
        whole = s.draw(count, moves)
        return ChainNoise(whole.eps[rest], None if whole.z is None else whole.z[rest])

    few = {name: getattr(s, name)[rest] for name in ("z", "x0", "eps", "t")}
    other = gradient(loss(Situation(**{**s.__dict__, **few, "draw": noise})).loss, generator)
    torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found, sound)


def test_more_steps_bring_the_gradient_nearer_to_forward_kl():
    """What K is for: an affine generator on one of two modes is pulled to the other by the chain alone."""
    means, stds, weights = (torch.tensor(part, dtype=torch.float64) for part in ([-1.0, 1.0], [0.1, 0.1], [0.7, 0.3]))
    generator, teacher = Affine(0.3, 0.5), Modes(means, stds, weights)
    z, eps, _ = drawn(20_000, 1)
    t = torch.full((20_000,), 0.4, dtype=torch.float64)

    def noise(count: int, moves: bool) -> ChainNoise:
        return drawn(20_000, count, 5)[2]

    def pull(loss: EMD) -> float:
        s = Situation(generator, teacher, normal(0.5, 0.3), z, generator(z).detach(), eps, t, None, noise)
        return -float(torch.autograd.grad(loss(s).loss, generator.b)[0])

    # The exact forward direction is towards the mean, -.4; Diff-Instruct stays with the near mode at 1.
    assert pull(diff_instruct()) > 0
    assert pull(EMD(num_steps=32, gamma_z=0.1, normalize=True)) < 0


def test_the_student_learns_the_score_of_the_samples():
    """T9: the least-squares optimum of a linear denoiser of a z + b."""
    a, b, sigma = 0.6, -0.4, 0.8

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1).double()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x)

    student = NetworkDenoiser(Line(), EDMSchedule(), "sample")
    optimizer = torch.optim.LBFGS(student.parameters(), line_search_fn="strong_wolfe")
    z, eps, _ = drawn(200_000, 1)
    made = Drawn(z, eps, torch.full((200_000,), sigma, dtype=torch.float64), None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = student_loss(student, a * z + b, made)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    layer = student.backbone.layer
    total = a**2 + sigma**2
    assert float(layer.weight) == pytest.approx(a**2 / total, rel=0.02)
    assert float(layer.bias) == pytest.approx(sigma**2 * b / total, rel=0.02)


def test_guidance_of_the_teacher_is_not_the_students():
    """A guided teacher and a plain student differ in kind of call, not in the difference that is taken."""
    means = torch.tensor([[0.0]], dtype=torch.float64)
    one = GaussianMixtureDenoiser(means, torch.tensor([0.5]), torch.ones(1), EDMSchedule())
    assert (
        one(torch.zeros(2, 1).double(), torch.ones(2))
        .noise_minus(one(torch.zeros(2, 1).double(), torch.ones(2)))
        .abs()
        .max()
        == 0
    )


def test_rows_that_do_not_count_are_left_out_of_a_mean():
    values = torch.tensor([[1.0, 3.0], [torch.nan, 1.0], [4.0, 4.0]])
    assert float(mean_over(torch.tensor([True, False, True]), values)) == 3.0
    assert float(mean_over(torch.tensor([False, False, False]), values)) == 0.0


def test_weights_stay_finite_where_the_teacher_agrees():
    ones = torch.ones(2, 1)
    assert omega("dmd", ones, ones, torch.zeros(2, 3), torch.zeros(2, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gamma_e": 0.0}, "gamma_e"),
        ({"gamma_e": 1.0}, "gamma_e"),
        ({"gamma_z": -1.0}, "gamma_z"),
        ({"num_steps": -1}, "num_steps"),
        ({"num_steps": {10: 4}}, "iteration 0"),
        ({"num_steps": 0, "noise_cancel": "last"}, "no step"),
        ({"num_steps": {0: 0, 5: 2}, "noise_cancel": "last"}, "no step"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        EMD(**words)
