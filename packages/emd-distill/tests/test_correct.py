"""Long chains that repair samples: that they end at the teacher's, segment by segment as in one go."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from diffcore.cli import main
from diffcore.denoiser import Denoiser, EDMSchedule
from diffcore.run import Run
from emd_distill.app.cli import app
from emd_distill.chain import ChainNoise, langevin_eps_z
from emd_distill.correct import correct, fit_student
from emd_distill.digits import SHAPE, digit_classes, load_teacher
from emd_distill.draws import Draws
from emd_distill.files.generators import save_generator
from emd_distill.generator import OneStepGenerator

from .conftest import Affine, normal


def test_samples_of_a_wrong_generator_end_at_the_teachers():
    """Exact scores: g(z) ~ N(-1, .5^2), teacher N(1, 1); x at sigma = .8 must become N(1, 1 + .64)."""
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher, student = normal(1.0, 1.0), normal(-1.0, 0.5)
    done = correct(
        Affine(0.5, -1.0), teacher, student, z, t=0.8, steps=400, gamma_e=0.05, gamma_z=0.05, kappa=0.0, seed=1
    )
    assert float(done.before.mean()) == pytest.approx(-1.0, abs=0.05)
    x = done.moved  # g(z) of the joint chain's z: E[g(z) | x] with x ~ q, so that its mean is between the two
    assert float(x.mean()) > -0.5
    assert float(done.after.mean()) == pytest.approx(1.0, abs=0.12)
    assert bool(done.finite.all())
    assert done.path_steps[0] == 0
    assert done.path_steps[-1] == 400
    assert torch.equal(done.path[0], done.before)
    assert torch.equal(done.path[-1], done.after)


@pytest.mark.parametrize("gamma_z", [0.0, 0.02])
def test_segments_are_one_chain(gamma_z):
    """u over 60 steps in segments of 25 is u of one chain with the same noise."""
    z = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher, student, generator = normal(1.0, 1.0), normal(-1.0, 0.5), Affine(0.5, -1.0)
    done = correct(generator, teacher, student, z, t=0.8, steps=60, gamma_e=0.05, gamma_z=gamma_z, kappa=0.25, seed=2)
    draws, rows = Draws(2, (1,), lambda u: u), torch.arange(6)
    parts = [draws.chain(1 + start, rows, count, moves=True) for start, count in ((0, 25), (25, 25), (50, 10))]
    n_e, n_z = (torch.cat([getattr(part, name) for part in parts], 1).double() for name in ("eps", "z"))
    t = torch.full((6,), 0.8)
    whole = langevin_eps_z(
        generator, teacher, student, z, draws(0, rows).eps.double(), t,
        gamma_e=0.05, gamma_z=gamma_z, kappa=0.25, noise=ChainNoise(n_e, n_z),
    )  # fmt: skip
    torch.testing.assert_close(done.after, generator(whole.z).detach() + whole.u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma_z", [0.0, 0.02])
def test_a_chain_goes_on_from_any_segment_bit_for_bit(gamma_z):
    z = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = []

    def run(**more):
        return correct(
            Affine(0.5, -1.0), normal(1.0, 1.0), normal(-1.0, 0.5), z, t=0.8, steps=60, gamma_e=0.05, gamma_z=gamma_z,
            seed=2, **more,
        )  # fmt: skip

    whole = run(on_segment=kept.append)
    assert [segment.done for segment in kept] == [25, 50, 60]
    for count in (1, 2, 3):
        seen = []
        again = run(begun=kept[:count], on_segment=seen.append)
        assert [segment.done for segment in seen] == [25, 50, 60][count:]
        for name in ("before", "after", "moved", "z", "path", "drift", "finite"):
            assert torch.equal(getattr(again, name), getattr(whole, name)), name
        assert again.path_steps == whole.path_steps


def test_the_same_command_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from emd_distill.app import correcting

    few = ["--steps", "60", "--student-steps", "2", "--student-batch", "8", "--count", "20", "--threads", "1"]
    command = ["correct", "digits", *few, "--out"]
    assert main(app, [*command, str(tmp_path / "whole")]) == 0
    child = os.fork()
    if child == 0:
        save = Run.save

        def once(self, key, *args, **options):
            path = save(self, key, *args, **options)
            if key == "segment-000050":
                os.kill(os.getpid(), signal.SIGKILL)
            return path

        monkeypatch.setattr(Run, "save", once)
        main(app, [*command, str(tmp_path / "killed")])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    steps = []
    chain = correcting.correct
    monkeypatch.setattr(
        correcting,
        "correct",
        lambda *a, begun, **k: steps.append([s.done for s in begun]) or chain(*a, begun=begun, **k),
    )
    monkeypatch.setattr(correcting, "fit_student", lambda *args, **options: pytest.fail("the score is known already"))
    assert main(app, [*command, str(tmp_path / "killed")]) == 0
    assert steps == [[25, 50]]
    told = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert told[0] == told[1]
    with Run.reopen(tmp_path / "whole") as one, Run.reopen(tmp_path / "killed") as other:
        for key in ("correction", "path"):
            assert torch.equal(one.load(key).tensors["pictures"], other.load(key).tensors["pictures"])
        assert one.load("movement").fields == other.load("movement").fields


def test_a_chain_that_is_lost_leaves_its_sample_as_it_was():
    class Sick(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.inner = normal(1.0, 1.0)
            self.schedule = EDMSchedule()

        def forward(self, x_t, t, cond=None):
            found = self.inner(x_t, t)
            spoiled = found.x0.clone()
            spoiled[0] = math.nan
            return type(found)(spoiled, x_t, found.alpha, found.sigma, "sample")

    z = torch.randn(3, 1, dtype=torch.float64)
    sick = Sick()
    done = correct(Affine(0.5, -1.0), sick, normal(-1.0, 0.5), z, t=0.8, steps=40, gamma_z=0.01)
    assert done.finite.tolist() == [False, True, True]
    assert torch.equal(done.after[0], done.before[0])
    assert bool(done.after.isfinite().all())
    assert not torch.equal(done.after[1:], done.before[1:])


def test_a_chain_that_was_lost_once_stays_lost():
    """Though it goes on from where it was: what it has left in eps is not whole."""
    calls = []

    class SickAtFirst(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.schedule = normal(1.0, 1.0), EDMSchedule()

        def forward(self, x_t, t, cond=None):
            calls.append(bool(x_t.isfinite().all()))
            found = self.inner(x_t, t)
            spoiled = found.x0.clone()
            spoiled[0] = math.nan if len(calls) == 3 else spoiled[0]
            return type(found)(spoiled, x_t, found.alpha, found.sigma, "sample")

    z = torch.randn(3, 1, dtype=torch.float64)
    done = correct(Affine(0.5, -1.0), SickAtFirst(), normal(-1.0, 0.5), z, t=0.8, steps=60, gamma_z=0.01)
    assert done.finite.tolist() == [False, True, True]
    assert torch.equal(done.after[0], done.before[0])
    assert all(calls[25:])  # the second segment starts from numbers again
    assert bool(done.drift.isfinite().all())


def test_a_score_is_an_average_over_steps():
    """After two steps that of the two: (1 - 1/2) first + 1/2 second."""
    teacher = load_teacher()
    generator, found = OneStepGenerator(teacher, 2.5), []
    for steps in (1, 2):
        student = fit_student(
            teacher, generator, SHAPE, lambda u: 0.3 + u, conditions=digit_classes, steps=steps, learning_rate=0.1
        )
        found.append(torch.cat([p.flatten() for p in student.parameters()]))
        assert not any(p.requires_grad for p in student.parameters())
    start = torch.cat([p.detach().flatten() for p in teacher.parameters()])
    first, second = (float((part - start).norm()) for part in found)
    # Adam's first step has one size; a second of that size alone would double the way, the average does not.
    assert float((found[1] - found[0]).norm()) < 0.75 * first
    assert second < 1.6 * first


def test_the_score_of_a_generator_is_learned_from_its_samples():
    teacher = load_teacher()
    generator = OneStepGenerator(teacher, 2.5)
    student = fit_student(teacher, generator, SHAPE, lambda u: 0.3 + u, conditions=digit_classes, steps=60)
    rows = torch.arange(256)
    z, given = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(1)), digit_classes(0, rows)
    with torch.no_grad():
        x0 = generator(z, given)
        noisy, t = x0 + 0.8 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)), torch.full((256,), 0.8)
        errors = [float((network(noisy, t, given).x0 - x0).square().mean()) for network in (teacher, student)]
    assert errors[1] < 0.8 * errors[0]
    with pytest.raises(ValueError, match="`steps` is 0"):
        fit_student(teacher, generator, SHAPE, lambda u: u, steps=0)


FEW = ["--steps", "4", "--student-steps", "2", "--student-batch", "8", "--count", "20", "--threads", "1"]


def test_the_command_writes_pictures_and_figures(tmp_path: Path, capsys):
    assert main(app, ["correct", "digits", "--out", str(tmp_path / "run"), "--json", *FEW]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["lost_chains"] == 0
    assert told["quality"]["corrected"]["distance"] != told["quality"]["before"]["distance"]
    page = (tmp_path / "run" / "report.html").read_text()
    for heading in ("Before and after", "Along the chain", "How near to the real digits"):
        assert heading in page
    first = (tmp_path / "run" / "report.html").read_bytes()
    assert main(app, ["correct", "digits", "--out", str(tmp_path / "run"), *FEW]) == 0  # finished: only read
    assert main(app, ["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == first


def test_the_command_takes_a_trained_generator_and_a_zoo_model(tmp_path: Path, capsys):
    path = save_generator(tmp_path / "g.safetensors", OneStepGenerator(load_teacher(), 1.5))
    assert main(app, ["correct", "digits", str(path), "--out", str(tmp_path / "run"), *FEW]) == 0
    few = ["--steps", "1", "--student-steps", "1", "--student-batch", "2", "--count", "2", "--threads", "1"]
    assert main(app, ["correct", "zoo:digits8-edm", "--out", str(tmp_path / "zoo"), *few]) == 0
    capsys.readouterr()
    for words, said in (
        (["digits", str(tmp_path / "none")], "is no generator"),
        (["digits", "--gamma-e", "1"], "--gamma-e is 1"),
        (["digits", "--level", "0"], "--level is 0"),
        (["digits", str(path), "--call-level", "2"], "--call-level is for the teacher alone"),
        (["digits", "--call-level", "0"], "--call-level is 0"),
        (["digits", "--prompts", "a"], "--prompts were given"),
        (["digits", "--count", "1"], "--count is 1"),
    ):
        assert main(app, ["correct", *words, "--out", str(tmp_path / "bad")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "bad").exists()
    assert main(app, ["correct", "digits", "--out", str(tmp_path / "dry"), "--dry-run", *FEW]) == 0
    assert not (tmp_path / "dry").exists()


def test_export_on_the_command_line(tmp_path: Path, capsys):
    from diffcore.models import load
    from diffcore.runtime import Runtime

    model = load("zoo:digits8-edm", Runtime(device="cpu"))
    path = save_generator(tmp_path / "g.safetensors", OneStepGenerator(model.denoiser, 2.5), training={"num_steps": 4})
    words = ["export", "zoo:digits8-edm", str(path), "--out", str(tmp_path / "one")]
    assert main(app, [*words, "--dry-run"]) == 0
    assert not (tmp_path / "one").exists()
    capsys.readouterr()
    assert main(app, [*words, "--json", "--licence", "apache-2.0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["error"] < 1e-5
    assert "| num steps | 4 |" in (tmp_path / "one" / "README.md").read_text()
    assert main(app, words) == 2
    assert "is there already" in capsys.readouterr().err
