"""The digits: the teacher that ships, its measures, its recipe, the demo in short, and the benchmark's agreement."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffcore.cli import main
from emd_distill.app import demo
from emd_distill.app.bench import cases
from emd_distill.app.cli import app
from emd_distill.digits import (
    GENERATOR_SIGMA,
    evaluated_latents,
    load_judge,
    load_teacher,
    measure,
    teacher_samples,
    train_teacher,
)
from emd_distill.generator import OneStepGenerator


def test_the_teacher_draws_all_digits_in_many_steps_and_few_in_one():
    teacher, judge = load_teacher(), load_judge()
    z, condition = evaluated_latents()
    labels = condition["class_labels"]
    many = measure(teacher_samples(teacher, z, condition), labels, judge)
    with torch.no_grad():
        one = measure(OneStepGenerator(teacher, GENERATOR_SIGMA)(z, condition), labels, judge)
    assert many.distance < 0.2
    assert min(many.recall, many.accuracy, many.coverage, many.worst_spread) > 0.85
    assert one.distance > 2
    assert one.recall < 0.1
    assert one.accuracy > 0.95  # each is a good digit, and all of a class are alike
    assert one.worst_spread < 0.6


def test_the_measures_see_a_lost_class():
    z, condition = evaluated_latents()
    teacher, judge, labels = load_teacher(), load_judge(), condition["class_labels"]
    x = teacher_samples(teacher, z, condition)
    whole = measure(x, labels, judge)
    lost = x.clone()
    lost[labels == 3] = x[labels == 3][:1]
    less = measure(lost, labels, judge)
    assert less.worst_spread == pytest.approx(0, abs=1e-6)
    assert less.recall < whole.recall - 0.02
    swapped = measure(x.roll(1, 0), labels, judge)
    assert swapped.accuracy < 0.2


def test_the_recipe_learns():
    images, few = evaluated_latents(200)[0], train_teacher(steps=60)
    untrained = train_teacher(steps=1)
    t, condition = torch.full((200,), 0.1), evaluated_latents(200)[1]
    clean = 2 * load_real()[:200] - 1
    with torch.no_grad():
        errors = [
            float((net(clean + 0.1 * images, t, condition).x0 - clean).square().mean()) for net in (few, untrained)
        ]
    assert errors[0] < 0.9 * errors[1]


def load_real() -> torch.Tensor:
    from diffcore.zoo.digits.data import load_digits

    return load_digits()[0]


def test_the_demo_trains_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    arms = tuple(replace(arm, steps=6 * bool(arm.steps)) for arm in demo.ARMS)
    monkeypatch.setattr(demo, "ARMS", arms)
    monkeypatch.setattr(demo, "_LOOKS", 1)
    trained = []
    train = demo._train

    def once(run, place, arm, steps):
        if place == 1 and len(trained) == 1:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(arm.name)
        train(run, place, arm, steps)

    monkeypatch.setattr(demo, "_train", once)
    words = ["demo", "--out", str(tmp_path / "demo"), "--json"]
    assert main(app, words) == 130
    assert main(app, words) == 1  # six iterations do not reach the gate, which the exit code tells
    assert trained == [demo.ARMS[0].name, "stopped", demo.ARMS[1].name]
    told = json.loads(capsys.readouterr().out)
    assert set(told["quality"]) == {"teacher, 18 steps", "teacher, 1 step", *(arm.name for arm in demo.ARMS[:2])}
    assert told["held"] is False
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "While it trains" in page
    assert "worst spread" in page
    assert main(app, ["report", str(tmp_path / "demo")]) == 0


def test_the_benchmark_compares_equals():
    for case in cases(smoke=True):
        assert case.agree(case.ours(), case.reference()), case.name
