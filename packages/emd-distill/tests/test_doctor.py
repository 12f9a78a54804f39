"""Checks before training find what is wrong, and are content with what is right."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from diffcore.cli import main
from diffcore.denoiser import DiscreteSchedule, EDMSchedule, NetworkDenoiser
from diffcore.testing import tiny
from diffcore.zoo.digits.data import load_digits
from emd_distill.app.cli import app
from emd_distill.digits import SHAPE, digit_classes, load_teacher
from emd_distill.doctor import (
    check_prediction_type,
    jacobian_norm,
    largest_steps,
    memory_estimate,
    schedule_problems,
    starts,
)
from emd_distill.generator import OneStepGenerator


class Ideal(nn.Module):
    """The best prediction of one type for data that are N(0, .5^2)."""

    def __init__(self, kind: str, schedule: DiscreteSchedule) -> None:
        super().__init__()
        self.kind, self.schedule = kind, schedule
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (level.view(-1, 1) for level in self.schedule.alpha_sigma(t))
        x0 = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * x
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[self.kind]


def test_a_wrong_prediction_type_is_found_from_denoised_data():
    schedule, x0 = DiscreteSchedule(), 0.5 * torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    for kind in ("epsilon", "sample", "v_prediction"):
        for stated in ("epsilon", "sample", "v_prediction"):
            found = check_prediction_type(NetworkDenoiser(Ideal(kind, schedule), schedule, stated), x0)
            assert found.best == kind
            assert found.matches == (stated == kind)
    images, labels = load_digits()
    assert check_prediction_type(load_teacher(), 2 * images[:64] - 1, {"class_labels": labels[:64]}).matches


def test_the_start_loses_its_spread_as_lambda_falls():
    found = starts(load_teacher(), SHAPE, {"class_labels": torch.full((8,), 3)}, lambdas=(0.0, -2.0, -4.0, -6.0))
    assert [round(start.log_snr) for start in found][:3] == [0, -2, -4]
    assert all(one.spread > other.spread for one, other in pairwise(found))
    model = tiny.model("dit")
    few = starts(
        model.denoiser, model.shape, {"class_labels": torch.zeros(8, dtype=torch.long)}, lambdas=(-50.0, -60.0)
    )
    assert [start.t for start in few] == [999.0]  # both beyond the schedule: its end, once
    given = {"class_labels": torch.zeros(8, dtype=torch.long)}
    few = starts(load_teacher(), SHAPE, given, lambdas=(-12.0, -14.0))
    assert [round(start.t, 3) for start in few] == [80.0]  # where EDM's training ends


def test_problems_of_schedules_are_told():
    zero = DiscreteSchedule(rescale_betas_zero_snr=True)
    assert schedule_problems(DiscreteSchedule(), "epsilon", t=999) == ()
    assert schedule_problems(EDMSchedule(), "edm", t=2.5) == ()
    said = schedule_problems(zero, "epsilon", t=999)
    assert "pure noise" in said[0]
    assert "alpha = 0" in said[1]
    assert any("explode" in line for line in schedule_problems(zero, "v_prediction", t=900))
    assert schedule_problems(zero, "v_prediction", t=900, weighting="eps") == ()
    assert schedule_problems(zero, "v_prediction", t=900, high=50.0) == ()  # where training stops before
    assert any("more signal than noise" in line for line in schedule_problems(DiscreteSchedule(), "epsilon", t=50))


def test_the_jacobian_of_a_linear_generator_is_its_largest_singular_value():
    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    norm = float(torch.linalg.svdvals(matrix)[0])
    assert abs(jacobian_norm(lambda z, c: z @ matrix.T, z, iterations=100) / norm - 1) < 1e-3
    low, high = largest_steps(lambda z, c: z @ matrix.T, EDMSchedule(), z, ratios=[0.05, 5.0], iterations=100)
    assert abs(low.constant / (2 / (1 + norm**2 / 0.05**2)) - 1) < 1e-2
    assert low.constant < high.constant
    assert low.levelled > 10 * low.constant  # the level-dependent step makes low noise safe
    digits = OneStepGenerator(load_teacher(), 2.5)
    assert 0 < jacobian_norm(digits, torch.randn(2, *SHAPE), digit_classes(0, torch.arange(2)), iterations=5) < 100


def test_a_z_chain_is_stable_below_the_limit_and_not_above():
    """The prior and a far teacher: z' = z - gamma (1 + a^2 / ratio^2) z."""
    limit = largest_steps(lambda z, c: 2 * z, EDMSchedule(), torch.randn(2, 3), ratios=[0.5])[0].constant
    for share, stable in ((0.9, True), (1.1, False)):
        z = 1.0
        for _ in range(400):
            z = z - share * limit * (1 + 4 / 0.25) * z
        assert (abs(z) < 1) == stable


def test_memory_counts_parameters_and_grows_with_the_batch_and_with_k():
    teacher, given = load_teacher(), digit_classes(0, torch.arange(4))
    count = sum(part.numel() for part in teacher.parameters())
    one = memory_estimate(teacher, SHAPE, given, num_steps=4, batch_size=1)
    assert one.trained == 32 * count
    assert one.weights == 4 * count
    ten = memory_estimate(teacher, SHAPE, given, num_steps=4, batch_size=10)
    assert ten.total - one.total == 9 * (one.activations_per_row + one.chain_per_row)
    assert one.activations_per_row > 4 * 224 * 3  # at least the hidden units of three blocks
    more = memory_estimate(teacher, SHAPE, given, num_steps=16, batch_size=1)
    assert more.total - one.total == 12 * 2 * 4 * 64


def told(capsys, *words: str) -> tuple[int, dict]:
    code = main(app, ["doctor", *words, "--json", "--threads", "1"])
    return code, json.loads(capsys.readouterr().out or "{}")


def test_the_command_passes_a_good_teacher_and_names_what_is_wrong(tmp_path: Path, capsys):
    code, good = told(capsys, "digits", "--out", str(tmp_path / "good"), "--high", "20")
    assert (code, good["problems"]) == (0, [])
    assert good["prediction_type"] == "edm"
    page = (tmp_path / "good" / "report.html").read_text()
    for heading in ("Samples before any training", "What the network predicts", "Memory of a training"):
        assert heading in page
    # Steps that shrink at low noise may be larger than constant ones; their own limit counts.
    for share, name in ((0.9, "below"), (1.1, "above")):
        words = ["--high", "20", "--gamma-z", str(share * good["largest_gamma_z"])]
        assert told(capsys, "digits", "--out", str(tmp_path / name), *words)[0] == (name == "above")
    words = ["--high", "20", "--gamma-z", "50", "--memory", "0.001", "--timestep", "0.5"]
    code, bad = told(capsys, "digits", "--out", str(tmp_path / "bad"), *words)
    assert code == 1
    said = " ".join(bad["problems"])
    for part in ("gamma_z = 50 is above", "GiB", "more signal than noise"):
        assert part in said
    assert "In need of repair" in (tmp_path / "bad" / "report.html").read_text()
    # A finished run is only read, and fails again.
    assert told(capsys, "digits", "--out", str(tmp_path / "bad"), *words)[0] == 1
    assert main(app, ["doctor", "digits", "--out", str(tmp_path / "bad"), "--threads", "1", *words]) == 1
    printed = capsys.readouterr().out
    assert all(problem in printed for problem in bad["problems"])


def test_the_command_finds_a_model_that_is_loaded_as_another_type(tmp_path: Path, capsys):
    images, _ = load_digits()
    (tmp_path / "data").mkdir()
    for place in range(20):
        save_image(images[place], tmp_path / "data" / f"{place}.png")
    few = ["--data", str(tmp_path / "data"), "--high", "20", "--gamma-z", "0"]
    code, found = told(capsys, "zoo:digits8-edm", "--out", str(tmp_path / "zoo"), *few)
    assert (code, found["prediction_type"]) == (0, "edm")
    capsys.readouterr()
    for words, part in (
        (["digits", "--data", str(tmp_path)], "--data was given"),
        (["digits", "--memory", "0"], "--memory is 0"),
        (["digits", "--num-langevin-steps", "-1"], "--num-langevin-steps"),
        (["digits", "--timestep", "0"], "--timestep is 0"),
        (["digits", "--low", "5", "--high", "1"], "nothing is left"),
    ):
        assert main(app, ["doctor", *words, "--out", str(tmp_path / "none")]) == 2
        assert part in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()


def save_image(x: torch.Tensor, path: Path) -> None:
    Image.fromarray((x[0] * 255).round().byte().numpy()).save(path)
