"""The chain against closed forms: every expectation of the linear case, its stationary law, its drifts, its ledger."""

import math

import pytest
import torch
from torch import Tensor

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, GaussianMixtureDenoiser
from diffcore.testing import tiny
from emd_distill.chain import ChainNoise, ChainResult, frozen, langevin_eps_z, langevin_x_z

from .conftest import Affine, Modes, drawn, normal

A, B, M, S, SIGMA = 0.6, -0.4, 0.7, 1.3, 0.8
GAMMA = 0.16


def linear(steps: int, gamma_e: float, gamma_z: float, cancel: str, *, rows: int = 25_000, run=langevin_eps_z, seed=0):
    """The chain in one dimension whose moments are known, and its residual per row."""
    z, eps, noise = drawn(rows, steps, seed)
    t = torch.full((rows,), SIGMA, dtype=torch.float64)
    settings = {"gamma_e": gamma_e, "gamma_z": gamma_z, "noise_cancel": cancel, "noise": noise}
    return run(Affine(A, B), normal(M, S), normal(B, A), z, eps, t, **settings)


def gradients(end: ChainResult, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """The expected gradients for a and b with four standard errors each: the tables have some hundred entries."""
    rows = torch.cat([end.z * end.residual, end.residual], 1) / SIGMA / scale
    return rows.mean(0).tolist(), (4 * rows.std(0) / len(rows) ** 0.5).tolist()


TABLE = [
    # steps, gamma_e, gamma_z, none and last, complete (normalised), stein
    (1, 0.16, 0.0, (0.0548, 0.0755), (0.3425, 0.4721), (0.3625, 0.4997)),
    (1, 0.16, 0.05, (0.0691, 0.0755), (0.3418, 0.4721), (0.3821, 0.5045)),
    (4, 0.16, 0.05, (0.2525, 0.2636), (0.4080, 0.5249), (0.4931, 0.5882)),
    (16, 0.16, 0.0, (0.4424, 0.6098), (0.4713, 0.6497), (0.5041, 0.6949)),
    (16, 0.16, 0.001, (0.4498, 0.6112), (0.4770, 0.6512), (0.5124, 0.6974)),
    (16, 0.16, 0.05, (0.7386, 0.6713), (0.6882, 0.7153), (0.8355, 0.7948)),
    (16, 0.16, 0.16, (1.0441, 0.7476), (0.8732, 0.7965), (1.1799, 0.8988)),
    (64, 0.16, 0.16, (1.5062, 1.0884), (1.2764, 1.0884), (1.5404, 1.0934)),
    (400, 0.02, 0.02, (1.4777, 1.0650), (1.2394, 1.0653), (1.4911, 1.0800)),
]


@pytest.mark.parametrize(("steps", "gamma_e", "gamma_z", "none", "complete", "stein"), TABLE)
def test_gradients_are_those_of_the_linear_case(steps, gamma_e, gamma_z, none, complete, stein):
    """T1: between the gradients of reverse (.3425, .4721) and forward KL divergence (1.524, 1.1)."""
    collected = 1 - (1 - gamma_e) ** steps
    for cancel, wanted, scale in (
        ("none", none, 1.0),
        ("last", none, 1.0),
        ("complete", complete, collected),
        ("stein", stein, 1.0),
    ):
        found, error = gradients(linear(steps, gamma_e, gamma_z, cancel), scale)
        for value, truth, margin in zip(found, wanted, error, strict=True):
            assert abs(value - truth) < margin + 1e-4, (cancel, found, wanted)


def test_residuals_vary_from_row_to_row_as_they_should():
    """T1, the variances at K = 64, in which the ways of cancellation differ."""
    for cancel, wanted in (
        ("none", (9.62, 3.02)), ("last", (8.69, 2.52)), ("complete", (4.07, 0.56)), ("stein", (5.30, 0.79)),
    ):  # fmt: skip
        end = linear(64, GAMMA, 0.16, cancel)
        scale = 1 - (1 - GAMMA) ** 64 if cancel == "complete" else 1.0
        found = (torch.cat([end.z * end.residual, end.residual], 1) / SIGMA / scale).var(0).tolist()
        assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("steps", "gamma_z", "none", "complete"),
    [(16, 0.05, (0.5272, 0.5686), (0.3168, 0.6058)), (64, 0.16, (1.2777, 0.9989), (0.7774, 0.9989))],
)
def test_the_chain_in_x_lags_behind(steps, gamma_z, none, complete):
    """T1, the second table."""
    for cancel, wanted, scale in (("none", none, 1.0), ("complete", complete, 1 - (1 - GAMMA) ** steps)):
        found, error = gradients(linear(steps, GAMMA, gamma_z, cancel, run=langevin_x_z), scale)
        for value, truth, margin in zip(found, wanted, error, strict=True):
            assert abs(value - truth) < margin + 1e-4, (cancel, found, wanted)


def test_one_step_of_eps_is_diff_instruct():
    """T2 on a real U-Net: to rounding, u is gamma_e times the difference of the two denoisers."""
    teacher, student = tiny.denoiser("unet2d"), tiny.denoiser("unet2d", seed=1)
    g = torch.Generator().manual_seed(0)
    shape = tiny.model("unet2d").shape
    z, eps, n = (torch.randn(3, *shape, generator=g) for _ in range(3))
    t, condition = torch.tensor([5.0, 300.0, 900.0]), {"class_labels": torch.tensor([0, 1, 2])}

    def generator(z: Tensor, condition: object) -> Tensor:
        return 0.3 * z

    def run(noise: ChainNoise | None) -> Tensor:
        chain = langevin_eps_z(
            generator, teacher, student, z, eps, t, condition, gamma_e=GAMMA, gamma_z=0.0, noise=noise
        )
        return chain.u

    one, plain = run(ChainNoise(n[:, None])), run(None)
    assert float((one - GAMMA * plain).norm() / plain.norm()) < 1e-6
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in teacher.schedule.alpha_sigma(t))
    x_t = alpha * 0.3 * z + sigma * eps
    with torch.no_grad():
        truth = teacher(x_t, t, condition).x0 - student(x_t, t, condition).x0
    torch.testing.assert_close(plain, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kappa", [0.0, 0.25])
def test_the_drifts_are_gradients_of_the_log_density(kappa):
    """T7: rho(eps, z) is q(x) / p(x) times two normals, up to a constant."""
    teacher = Modes(*(torch.tensor(part, dtype=torch.float64) for part in ([-1.0, 1.0], [0.4, 0.2], [0.7, 0.3])))
    z, eps, _ = drawn(50, 1)
    t = torch.linspace(0.2, 1.5, 50, dtype=torch.float64)

    def log_density(eps: Tensor, z: Tensor) -> Tensor:
        x, noise = A * z + B + t[:, None] * eps, t[:, None].square()
        parts = teacher.variances + noise
        q = (teacher.logs - 0.5 * ((x - teacher.means).square() / parts + parts.log())).logsumexp(1, keepdim=True)
        own = A**2 + noise
        return q + 0.5 * ((x - B).square() / own + own.log()) - 0.5 * (eps.square() + z.square())

    gamma_e, gamma_z, h = 0.1, 0.01, 1e-5
    zero = torch.zeros(50, 1, 1, dtype=torch.float64)
    end = langevin_eps_z(
        Affine(A, B), teacher, normal(B, A), z, eps, t, gamma_e=gamma_e, gamma_z=gamma_z, kappa=kappa,
        noise=ChainNoise(zero, zero),
    )  # fmt: skip
    along_eps = (log_density(eps + h, z) - log_density(eps - h, z)) / (2 * h)
    along_z = (log_density(eps, z + h) - log_density(eps, z - h)) / (2 * h)
    step_z = gamma_z * t[:, None].square() / (t[:, None].square() + kappa)
    torch.testing.assert_close((end.eps - eps) / gamma_e, along_eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((end.z - z) / step_z, along_z, atol=1e-5, rtol=1e-5)


def test_a_long_chain_has_the_teachers_marginal():
    """T4: whatever the generator, x = g(z) + sigma eps ends as the teacher's noised samples."""
    means, stds, weights = (torch.tensor(part, dtype=torch.float64) for part in ([-1.0, 1.0], [0.3, 0.3], [0.7, 0.3]))
    teacher, rows, sigma = Modes(means, stds, weights), 4000, 0.8
    z, eps, _ = drawn(rows, 1)
    t = torch.full((rows,), sigma, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        noise = ChainNoise(*torch.randn(2, rows, 100, 1, generator=g, dtype=torch.float64))
        end = langevin_eps_z(
            Affine(A, B), teacher, Modes(*(torch.tensor([v]).double() for v in (B, A, 1.0))), z, eps, t,
            gamma_e=0.05, gamma_z=0.05, noise=noise,
        )  # fmt: skip
        z, eps = end.z, end.eps
    x = A * z + B + sigma * eps
    mean, variance = float((weights * means).sum()), float((weights * (stds**2 + means**2)).sum())
    variance += sigma**2 - mean**2
    assert float(x.mean()) == pytest.approx(mean, abs=3 * math.sqrt(variance / rows) + 0.02)
    assert float(x.var()) == pytest.approx(variance, rel=0.08)
    limit = torch.tensor(0.0, dtype=torch.float64)
    spread = (stds.square() + sigma**2).sqrt()
    left = float((weights * torch.special.ndtr((limit - means) / spread)).sum())
    assert float((x < 0).double().mean()) == pytest.approx(left, abs=0.03)


@pytest.mark.parametrize("run", [langevin_eps_z, langevin_x_z])
def test_the_ledger_holds_all_noise_and_nothing_else(run):
    """T5: what is left is the drifts, with the weights of their age."""
    z, eps, noise = drawn(2000, 7)
    t = torch.full((2000,), SIGMA, dtype=torch.float64)
    settings = {"gamma_e": GAMMA, "gamma_z": 0.0 if run is langevin_x_z else 0.05, "noise": noise, "trace": True}
    end = run(Affine(A, B), normal(M, S), normal(B, A), z, eps, t, **settings)
    decay = [(1 - GAMMA) ** (6 - step) for step in range(7)]
    drifts = sum(weight * drift for weight, drift in zip(decay, end.trace.drift, strict=True))
    torch.testing.assert_close(end.residual, GAMMA * drifts, atol=1e-6, rtol=1e-6)
    ledger = end.eps - end.residual
    kept = (1 - GAMMA) ** 14
    assert float(ledger.var()) == pytest.approx(kept + 2 * GAMMA * (1 - kept) / (1 - (1 - GAMMA) ** 2), rel=0.1)
    assert len(end.trace.eps) == 8


def test_nothing_is_learned_where_student_and_teacher_agree():
    """T6: exactly nothing for two residuals; the others are noise of a known size."""
    z, eps, noise = drawn(40_000, 5)
    t = torch.full((40_000,), SIGMA, dtype=torch.float64)

    def residual(cancel: str) -> Tensor:
        settings = {"gamma_e": GAMMA, "gamma_z": 0.05, "noise_cancel": cancel, "noise": noise}
        return langevin_eps_z(Affine(A, B), normal(M, S), normal(M, S), z, eps, t, **settings).residual

    assert residual("complete").abs().max() < 1e-12
    assert residual("stein").abs().max() == 0
    kept = (1 - GAMMA) ** 10
    variance = kept + 2 * GAMMA * (1 - kept) / (1 - (1 - GAMMA) ** 2)
    none = residual("none")
    assert float(none.mean()) == pytest.approx(0, abs=3 * math.sqrt(variance / 40_000))
    assert float(none.var()) == pytest.approx(variance, rel=0.03)


def test_all_schedules_give_the_same_chain():
    """T8: variance-preserving, EDM and flow forms of one teacher, at levels of equal signal-to-noise ratio."""
    discrete, g = DiscreteSchedule(), torch.Generator().manual_seed(0)
    t = torch.tensor([50.0, 200.0, 400.0, 600.0], dtype=torch.float64)
    ratio = (-discrete.log_snr(t) / 2).exp()
    z, eps, noise = drawn(4, 6, dim=2)
    means, teacher_std, student_std = torch.randn(3, 2, generator=g).double(), torch.full((3,), 0.3).double(), 0.8

    def run(schedule, times, chain) -> ChainResult:
        teacher = GaussianMixtureDenoiser(means, teacher_std, torch.ones(3), schedule)
        student = GaussianMixtureDenoiser(torch.zeros(1, 2), torch.tensor([student_std]), torch.ones(1), schedule)
        settings = {"gamma_e": GAMMA, "gamma_z": 0.01, "kappa": 0.25, "noise": noise}
        return chain(Affine(0.7, 0.1), teacher, student, z, eps, times, **settings)

    for chain in (langevin_eps_z, langevin_x_z):
        one = run(discrete, t, chain)
        for schedule, times in ((EDMSchedule(), ratio), (FlowSchedule(), ratio / (1 + ratio))):
            other = run(schedule, times, chain)
            for name in ("z", "eps", "u"):
                torch.testing.assert_close(getattr(other, name), getattr(one, name), atol=1e-5, rtol=1e-5)


def test_a_row_that_diverges_costs_itself_alone():
    z, eps, noise = drawn(5, 3)
    t = torch.full((5,), SIGMA, dtype=torch.float64)
    broken = ChainNoise(noise.eps.clone(), noise.z)
    broken.eps[2, 1] = torch.nan
    settings = {"gamma_e": GAMMA, "gamma_z": 0.05}
    networks = Affine(A, B), normal(M, S), normal(B, A), z, eps, t
    sound, end = (langevin_eps_z(*networks, noise=part, **settings) for part in (noise, broken))
    assert end.finite.tolist() == [True, True, False, True, True]
    kept = end.finite
    assert torch.equal(end.u[kept], sound.u[kept])
    assert end.u[2] == 0
    assert torch.equal(end.z[2], z[2])


def test_without_a_step_of_z_the_generator_is_never_differentiated():
    """T11: K = 0 and chains of eps alone call no vector-Jacobian product, and the generator once."""
    calls = []

    def generator(z: Tensor, condition: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return A * z + B

    z, eps, noise = drawn(4, 5)
    t = torch.full((4,), SIGMA, dtype=torch.float64)
    for part in (None, ChainNoise(noise.eps)):
        calls.clear()
        langevin_eps_z(generator, normal(M, S), normal(B, A), z, eps, t, gamma_e=GAMMA, gamma_z=0.0, noise=part)
        assert calls == [False]
    calls.clear()
    langevin_eps_z(generator, normal(M, S), normal(B, A), z, eps, t, gamma_e=GAMMA, gamma_z=0.1, noise=noise)
    assert calls == [True] * 5


def test_parameters_get_no_gradient_from_a_chain():
    """What a chain returns is constant, and weights are constants in it."""
    generator, (z, eps, noise) = Affine(A, B), drawn(4, 3)
    t = torch.full((4,), SIGMA, dtype=torch.float64)
    for run in (langevin_eps_z, langevin_x_z):
        end = run(generator, normal(M, S), normal(B, A), z, eps, t, gamma_e=GAMMA, gamma_z=0.05, noise=noise)
        assert not any(part.requires_grad for part in (end.z, end.eps, end.u, end.residual))
    assert generator.a.grad is None
    assert generator.a.requires_grad  # it learns again


def test_a_generator_is_constant_inside_a_chain_alone_even_after_an_error():
    generator = Affine(A, B)
    with frozen(generator) as call:
        assert not call(torch.ones(1, 1, dtype=torch.float64)).requires_grad
    with pytest.raises(RuntimeError, match="stop"), frozen(generator):
        raise RuntimeError("stop")
    assert all(part.requires_grad for part in generator.parameters())


def test_neither_score_is_differentiated():
    """What a chain returns hangs on no weight of teacher and student."""
    teacher, student = tiny.denoiser("unet2d"), tiny.denoiser("unet2d", seed=1).requires_grad_(True)
    z, eps, n_e, n_z = torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, given = torch.tensor([300.0]), {"class_labels": torch.tensor([0])}
    noise = ChainNoise(n_e[:, None], n_z[:, None])
    for run in (langevin_eps_z, langevin_x_z):
        end = run(
            lambda z, condition: 0.3 * z, teacher, student, z, eps, t, given, gamma_e=GAMMA, gamma_z=0.05, noise=noise
        )
        for part in (end.z, end.eps, end.u, end.teacher_x0, end.first_drift):
            assert not part.requires_grad


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gamma_e": 0.0, "gamma_z": 0.0}, "gamma_e"),
        ({"gamma_e": 1.0, "gamma_z": 0.0}, "gamma_e"),
        ({"gamma_e": 0.1, "gamma_z": -0.1}, "gamma_z"),
        ({"gamma_e": 0.1, "gamma_z": 0.1, "noise": ChainNoise(torch.zeros(2, 1, 1))}, "no part for z"),
        ({"gamma_e": 0.1, "gamma_z": 0.0, "noise_cancel": "last", "noise": None}, "no step"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    z, eps, noise = drawn(2, 1)
    t = torch.full((2,), SIGMA, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        langevin_eps_z(Affine(A, B), normal(M, S), normal(B, A), z, eps, t, **{"noise": noise, **words})
