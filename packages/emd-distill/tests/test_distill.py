"""The whole method on small networks: what is updated, in which order, from which draws, and that it learns."""

import copy
import math
import os

import pytest
import torch
from torch import Tensor, nn

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, GuidedDenoiser, NetworkDenoiser
from diffcore.errors import MachineError, UserError
from diffcore.testing import tiny
from emd_distill.chain import ChainNoise, langevin_eps_z
from emd_distill.distill import Settings, Watch, distill, student_of
from emd_distill.draws import Draws
from emd_distill.generator import OneStepGenerator, level_of
from emd_distill.losses import EMD, GeneratorLoss, diff_instruct
from emd_distill.noise_levels import noise_levels, trained_range

from .conftest import Affine, Modes, drawn, normal


class Score(nn.Module):
    """A small network of sample and noise level."""

    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        self.modes: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.net(torch.cat([x, t[:, None], t[:, None].sin()], 1))


class Latent(nn.Module):
    """A generator of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, z: Tensor, condition: object = None) -> Tensor:
        return self.net(z)


def four_modes() -> Modes:
    from diffcore.denoiser import GaussianMixtureDenoiser

    means = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, torch.full((4,), 0.1), torch.ones(4), EDMSchedule())


def small(seed: int = 0, dropout: float = 0.0) -> tuple[NetworkDenoiser, nn.Module]:
    torch.manual_seed(seed)
    return NetworkDenoiser(Score(dropout=dropout), EDMSchedule(), "edm"), Latent()


SETTINGS = {"batch_size": 64, "learning_rate": 1e-3, "student_learning_rate": 2e-3}


def weights(network: nn.Module) -> Tensor:
    return torch.cat([part.detach().flatten() for part in network.parameters()])


def test_it_learns_all_modes_of_a_teacher():
    teacher = four_modes()
    student, generator = small()
    settings = Settings(loss=EMD(num_steps=4, gamma_z=0.0), steps=250, ema=0.95, **SETTINGS)
    levels = noise_levels(teacher.schedule, "loguniform", low=0.05, high=3.0)
    done = distill(teacher, generator, (2,), settings, student=student, time_sampler=levels)
    with torch.no_grad():
        x = done.generator(torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)))
    shares = [float(((x.sign() * 0.5 - mean).abs().sum(1) < 1e-6).float().mean()) for mean in teacher.means.float()]
    assert min(shares) > 0.1
    assert 0.3 < float(x.std(0).mean()) < 0.7
    assert done.drift.isfinite().all()
    assert int(done.dropped.sum()) == 0


def test_the_result_is_a_function_of_the_seed_and_k_changes_no_other_draw():
    teacher = four_modes()

    def run(**changes) -> Tensor:
        student, generator = small()
        settings = Settings(**{"loss": EMD(num_steps=2, gamma_z=0.01), "steps": 5, **SETTINGS, **changes})
        return weights(distill(teacher, generator, (2,), settings, student=student).generator)

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=1))
    levels = noise_levels(teacher.schedule)
    draws, rows = Draws(0, (2,), levels), torch.arange(8)
    few, many = draws.chain(3, rows, 2, moves=True), draws.chain(3, rows, 5, moves=True)
    assert torch.equal(few.eps, many.eps[:, :2])
    assert torch.equal(few.z, many.z[:, :2])
    whole, half = draws(3, rows), draws(3, rows[4:])
    for name in ("z", "eps", "t"):
        assert torch.equal(getattr(half, name), getattr(whole, name)[4:])
    assert not torch.equal(draws(3, rows, 1).z, whole.z)


def test_each_iteration_updates_the_student_first_and_the_generator_once():
    teacher = four_modes()
    student, generator = small()
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy:
        def __call__(self, s) -> GeneratorLoss:
            seen.append((weights(s.student), weights(s.generator)))
            assert torch.equal(s.z, draws(s.iteration, torch.arange(64)).z)  # of the student's last update
            assert torch.equal(s.x0, s.generator(s.z))  # the online weights (rule 3), which the student has seen
            return diff_instruct()(s)

    first, draws = weights(student), Draws(0, (2,), noise_levels(teacher.schedule))
    settings = Settings(loss=Spy(), steps=3, student_updates=2, **SETTINGS)
    reached: list[int] = []
    distill(
        teacher, generator, (2,), settings, student=student, on_step=lambda step, told, average: reached.append(step)
    )
    assert reached == [0, 1, 2]
    assert not torch.equal(seen[0][0], first)  # phi learns before the E-step uses it
    assert len({tuple(generator.tolist()) for _, generator in seen}) == 3


def test_the_chain_sees_one_network_and_the_students_loss_another():
    """Dropout belongs to the student's own loss."""
    student, generator = small(dropout=0.5)
    settings = Settings(loss=EMD(num_steps=2, gamma_z=0.0), steps=2, **SETTINGS)
    distill(four_modes(), generator, (2,), settings, student=student)
    assert student.backbone.modes == [True, False, False] * 2


def test_networks_that_come_in_training_mode_are_functions_all_the_same():
    """There is no dropout in teacher and generator, and in the student in its own loss alone."""
    nets = [NetworkDenoiser(Score(dropout=0.5), EDMSchedule(), "edm").train() for _ in range(3)]
    teacher, student, inner = nets
    settings = Settings(loss=EMD(num_steps=2, gamma_z=0.01), steps=2, **SETTINGS)
    distill(teacher, OneStepGenerator(inner, 2.5).train(), (2,), settings, student=student)
    assert set(teacher.backbone.modes) == {False}
    assert set(inner.backbone.modes) == {False}
    assert student.backbone.modes == [True, False, False] * 2


def test_a_teacher_that_is_a_network_gives_the_student_and_stays_as_it_is():
    model = tiny.model("unet2d")
    generator = OneStepGenerator(copy.deepcopy(model.denoiser).requires_grad_(True), 900)
    before = weights(model.denoiser)

    def classes(step: int, rows: Tensor) -> dict[str, Tensor]:
        return {"class_labels": (rows + step) % 10}

    uncond = {"class_labels": torch.tensor([0])}
    guided = GuidedDenoiser(model.denoiser, 2.0, uncond)
    settings = Settings(loss=EMD(num_steps=1), steps=2, batch_size=2)
    done = distill(guided, generator, model.shape, settings, conditions=classes)
    assert torch.equal(weights(model.denoiser), before)
    assert not torch.equal(weights(done.student), before)
    assert done.generator(torch.zeros(3, *model.shape), classes(0, torch.arange(3))).shape == (3, *model.shape)
    with pytest.raises(UserError, match="give `student`"):
        student_of(four_modes())


@pytest.mark.parametrize(
    ("schedule", "kind", "t", "scale"),
    [
        (EDMSchedule(), "edm", 2.5, 2.5),
        (DiscreteSchedule(), "v_prediction", 700, 1.0),
        (FlowSchedule(), "flow_prediction", 1.0, 1.0),
    ],
)
def test_a_generator_is_the_teacher_at_one_level(schedule, kind, t, scale):
    denoiser = NetworkDenoiser(Score(), schedule, kind)
    z = torch.randn(5, 2)
    with torch.no_grad():
        found = OneStepGenerator(denoiser, t)(z)
        torch.testing.assert_close(found, denoiser(scale * z, torch.full((5,), float(t))).x0)
    assert math.isclose(float(schedule.log_snr(torch.tensor([level_of(schedule, -2.0)]))[0]), -2.0, abs_tol=0.02)


def test_a_level_outside_the_schedule_is_refused():
    denoiser = NetworkDenoiser(Score(), DiscreteSchedule(), "epsilon")
    with pytest.raises(ValueError, match="timesteps 0 to 999"):
        OneStepGenerator(denoiser, 1000)
    with pytest.raises(ValueError, match="no noise"):
        OneStepGenerator(NetworkDenoiser(Score(), FlowSchedule(), "flow_prediction"), 0.0)


@pytest.mark.parametrize("name", ["lognormal", "karras", "sid", "uniform", "loguniform"])
@pytest.mark.parametrize("schedule", [EDMSchedule(), DiscreteSchedule(), FlowSchedule()])
def test_levels_stay_in_the_range_and_in_the_schedules_units(name, schedule):
    u = (torch.arange(1000) + 0.5) / 1000
    t = noise_levels(schedule, name, low=0.05, high=5.0)(u)
    alpha, sigma = schedule.alpha_sigma(t)
    ratio = (sigma / alpha).double()
    assert 0.045 < float(ratio.min()) < float(ratio.max()) < 5.1
    assert float((ratio[1:] - ratio[:-1]).min()) >= -1e-6
    low, high = trained_range(schedule)
    assert low < 0.05 < 5.0 < high
    with pytest.raises(ValueError, match="nothing is left"):
        noise_levels(schedule, name, low=5.0, high=1.0)


def test_the_distributions_are_those_of_their_papers():
    edm, u = EDMSchedule(), (torch.arange(20_000) + 0.5) / 20_000
    logs = noise_levels(edm)(u).double().log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.01)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.01)
    times = noise_levels(DiscreteSchedule(), "uniform")(u)
    assert (float(times.min()), float(times.max())) == (20.0, 979.0)
    karras = noise_levels(edm, "karras")(torch.tensor([0.5]))
    assert float(karras) == pytest.approx(((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7, rel=1e-3)


def test_levels_without_signal_are_refused_under_weights_that_they_explode():
    schedule = DiscreteSchedule(rescale_betas_zero_snr=True)
    teacher = NetworkDenoiser(Score(), schedule, "v_prediction")
    settings = Settings(loss=diff_instruct(), steps=1, **SETTINGS)
    with pytest.raises(UserError, match="weighting 'eps'"):
        distill(teacher, Latent(), (2,), settings, time_sampler=lambda u: torch.full_like(u, 998.0))


def test_a_training_that_loses_its_chains_ends_and_says_where():
    watch = Watch()
    finite, t = torch.tensor([True, True, False]), torch.tensor([1.0, 2.0, 0.25])
    for step in range(99):
        watch(step, finite, t)
    with pytest.raises(MachineError, match=r"33%.*t = 0\.25.*gamma_z"):
        watch(99, finite, t)
    for step in range(100, 200):
        watch(step, torch.tensor([True] * 3), t)


CHAINS = {
    # steps, gamma_z, noise_cancel
    "no chain": (0, 0.0, "complete"),
    "eps alone": (16, 0.0, "complete"),
    "complete": (16, 0.1, "complete"),
    "stein": (16, 0.1, "stein"),
    "none": (16, 0.1, "none"),
}
STARTS = {
    # range of sigma, a and b at the start
    "narrow": (0.1, 0.5, 0.5, 0.0),
    "narrow, wrong mode": (0.1, 0.5, 0.3, 0.5),
    "wide": (0.1, 2.0, 0.3, 0.5),
    "one level": (0.5, 0.5, 0.3, 0.5),
}
ENDS = {
    "narrow": ((0.111, -0.993), (0.818, -0.269), (1.204, -0.152), (0.937, -0.196), (1.020, -0.170)),
    "narrow, wrong mode": ((0.123, 0.983), (0.852, 0.089), (1.217, 0.102), (0.962, 0.068), (1.040, 0.086)),
    "wide": ((0.795, -0.401), (0.833, -0.378), (1.026, -0.367), (0.906, -0.381), (0.938, -0.373)),
    "one level": ((0.810, -0.392), (0.862, -0.359), (1.078, -0.330), (0.891, -0.368), (0.937, -0.349)),
}


WHOLE = os.environ.get("RELIABILITY") == "long"  # six minutes; else the two ends that matter most


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("start", STARTS if WHOLE else ["narrow"])
@pytest.mark.parametrize("chain", CHAINS if WHOLE else ["no chain", "complete"])
def test_an_affine_generator_covers_both_modes_only_with_a_chain(start: str, chain: str):
    """The teacher is 0.7 N(-1, .01) + 0.3 N(1, .01) with exact scores; K = 0 ends on one mode at low noise."""
    teacher = Modes(*(torch.tensor(part) for part in ([-1.0, 1.0], [0.1, 0.1], [0.7, 0.3])))
    (steps, gamma_z, cancel), (low, high, a, b) = CHAINS[chain], STARTS[start]
    generator, g = Affine(a, b, torch.float32), torch.Generator().manual_seed(0)
    rate, count, rows, ends = 3e-3 * (3 if steps else 10), 2500, 1024, []
    for iteration in range(count):
        sigma = (math.log(low) + torch.rand(rows, generator=g) * math.log(high / low)).exp()
        z, eps = torch.randn(2, rows, 1, generator=g)
        noise = ChainNoise(*torch.randn(2, rows, steps, 1, generator=g)) if steps else None
        a_now, b_now = float(generator.a.detach()), float(generator.b.detach())
        student = Modes(*(torch.tensor([v]) for v in (b_now, a_now, 1.0)))
        end = langevin_eps_z(
            generator, teacher, student, z, eps, sigma, gamma_e=0.16, gamma_z=gamma_z, kappa=0.25,
            noise_cancel=cancel, noise=noise,
        )  # fmt: skip
        with torch.no_grad():
            generator.a += rate * (end.z * end.u).mean()
            generator.b += rate * end.u.mean()
        if iteration > 0.8 * count:
            ends.append((float(generator.a.detach()), float(generator.b.detach())))
    found = [sum(part) / len(ends) for part in zip(*ends, strict=True)]
    wanted = ENDS[start][list(CHAINS).index(chain)]
    assert found == pytest.approx(wanted, abs=0.04)
    if start == "wide" and chain == "stein":
        assert found[0] == pytest.approx(0.922, rel=0.05)  # the exact fixed point: moments that match


def test_exact_student_of_an_affine_generator_is_used_as_given():
    """Teachers and students need no weights."""
    z, eps, noise = drawn(3, 2)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    end = langevin_eps_z(
        Affine(0.5, 0.0), normal(0.0, 1.0), normal(0.0, 0.5), z, eps, t, gamma_e=0.1, gamma_z=0.0, noise=noise
    )
    assert end.finite.all()
