"""What one iteration descends: batches that add up to a larger one, and a student score that is guided in chains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcore.denoiser import EDMSchedule, GuidedDenoiser, NetworkDenoiser
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from diffcore.train import fit
from emd_distill.chain import drift_at
from emd_distill.cost import passes
from emd_distill.distill import Settings, distill, guided_student, student_loss
from emd_distill.draws import Draws
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD, SiD, diff_instruct
from emd_distill.module import DistillModule
from emd_distill.noise_levels import noise_levels

NULL = 4
LEVELS = noise_levels(EDMSchedule(), low=0.05, high=5.0)


class Conditional(nn.Module):
    """A small network of sample, level and class that notes how it was called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(7, 32), nn.SiLU(), nn.Linear(32, 2))
            self.table = nn.Embedding(NULL + 1, 4)
        self.calls: list[tuple[bool, list[int]]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.calls.append((self.training, label.tolist()))
        return self.net(torch.cat([x, t[:, None], self.table(label)], 1))


def network(seed: int) -> NetworkDenoiser:
    return NetworkDenoiser(Conditional(seed), EDMSchedule(), "edm")


def classes(step: int, rows: Tensor) -> dict[str, Tensor]:
    return {"label": (rows + step) % NULL}


def uncond() -> dict[str, Tensor]:
    return {"label": torch.tensor([NULL])}


def one_iteration(**changes: Any) -> tuple[Tensor, Tensor, Any]:
    """Gradients of student score and generator after one iteration, and what was told."""
    rates = {"learning_rate": 1e-3, "student_learning_rate": 1e-9}  # Adam divides rounding by itself: let phi stay
    told = Settings(**{"loss": EMD(num_steps=2, gamma_z=0.01), "steps": 1, "clip": None, **rates} | changes)
    student, generator, seen = network(1), OneStepGenerator(network(2), 2.5), []
    distill(
        network(0), generator, (2,), told, student=student, time_sampler=LEVELS, conditions=classes,
        on_step=lambda step, told, average: seen.append(told),
    )  # fmt: skip
    parts = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (student, generator))
    return *parts, seen[0]


@pytest.mark.parametrize("loss", [EMD(num_steps=2, gamma_z=0.01), diff_instruct("dmd"), SiD()])
def test_batches_add_up_to_the_gradients_of_a_larger_one(loss: Any):
    whole = one_iteration(loss=loss, batch_size=12)
    for batch, count in ((3, 4), (6, 2)):
        found = one_iteration(loss=loss, batch_size=batch, gradient_accumulation_steps=count)
        for one, other in zip(found[:2], whole[:2], strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5
        assert float(found[2].loss.detach()) == pytest.approx(float(whole[2].loss), rel=1e-5)
        torch.testing.assert_close(found[2].drift, whole[2].drift, rtol=1e-4, atol=1e-5)
        assert len(found[2].finite) == 12
    assert float((one_iteration(loss=loss, batch_size=3)[1] - whole[1]).norm() / whole[1].norm()) > 0.05


@pytest.mark.parametrize(("own", "students"), [(3, 1), (1, 3)])
def test_both_networks_add_up_batches_of_their_own(own: int, students: int):
    found = one_iteration(batch_size=4, gradient_accumulation_steps=own, student_accumulation_steps=students)
    for place, count in ((0, students), (1, own)):
        alone = one_iteration(batch_size=4 * count)
        assert float((found[place] - alone[place]).norm() / alone[place].norm()) < 1e-5
    assert len(found[2].finite) == 4 * own


def test_the_students_batches_come_first_and_samples_are_shared():
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.inner, self.name = Conditional(3), name

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            order.append(self.name if torch.is_grad_enabled() else self.name.lower())
            return self.inner(x, t, label)

    nets = {name: NetworkDenoiser(Noted(name), EDMSchedule(), "edm") for name in ("T", "S", "G")}
    told = Settings(
        loss=diff_instruct(), steps=1, batch_size=2, gradient_accumulation_steps=3, student_accumulation_steps=2
    )
    distill(
        nets["T"], OneStepGenerator(nets["G"], 2.5), (2,), told, student=nets["S"], time_sampler=LEVELS,
        conditions=classes,
    )  # fmt: skip
    # two losses of phi on fresh samples; then three of g, of which the last needs samples of its own
    assert order == [*"gSgS", *"tsG", *"tsG", *"gtsG"]
    made = passes(told.loss, accumulation=told.accumulation)
    assert (made.teacher, made.student, made.generator) == tuple(
        sum(one.lower() == name for one in order) for name in "tsg"
    )


def test_a_guided_student_is_one_call_and_equals_two():
    teacher, student = network(0), network(1)
    guided, given = guided_student(student, GuidedDenoiser(teacher, 3.0, uncond()), 1.5)
    assert given is not None
    assert given["label"].tolist() == [NULL]
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 1.0, 3.0])
    label, null = {"label": torch.tensor([0, 1, 2])}, {"label": torch.full((3,), NULL)}
    student.backbone.calls.clear()
    drift, _ = drift_at(GuidedDenoiser(teacher, 3.0, uncond()), guided, x, t, label)
    assert [len(labels) for _, labels in student.backbone.calls] == [6]
    with torch.no_grad():
        parts = [[net(x, t, under).noise for under in (label, null)] for net in (teacher, student)]
    theirs, ours = (plain[1] + scale * (plain[0] - plain[1]) for plain, scale in zip(parts, (3.0, 1.5), strict=True))
    torch.testing.assert_close(drift, ours - theirs, rtol=1e-4, atol=1e-5)
    assert guided_student(student, teacher, 1.0) == (student, None)
    with pytest.raises(UserError, match="`student_guidance` is 2"):
        guided_student(student, teacher, 2.0)


def test_a_guided_student_learns_without_conditions_too_and_nothing_else_does():
    teacher, student, inner = network(0), network(1), network(2)
    told = Settings(loss=EMD(num_steps=2, gamma_z=0.0), steps=3, batch_size=40, student_guidance=1.5, null_share=0.25)
    distill(
        GuidedDenoiser(teacher, 3.0, uncond()), OneStepGenerator(inner, 2.5), (2,), told, student=student,
        time_sampler=LEVELS, conditions=classes,
    )  # fmt: skip
    learned = [labels for training, labels in student.backbone.calls if training]
    assert len(learned) == 3
    share = sum(label == NULL for labels in learned for label in labels) / 120
    assert 0.1 < share < 0.4
    assert len({tuple(label == NULL for label in labels) for labels in learned}) == 3  # other rows each time
    kept = [(one, (row + step) % NULL) for step, labels in enumerate(learned) for row, one in enumerate(labels)]
    assert all(one == true for one, true in kept if one != NULL)
    assert not any(NULL in labels for _, labels in inner.backbone.calls)
    chains = [labels for training, labels in student.backbone.calls if not training]
    assert [len(labels) for labels in chains] == [80] * 6
    assert all(labels[:40] == [NULL] * 40 and NULL not in labels[40:] for labels in chains)
    made = passes(told.loss, guided=True, student_guided=True)
    assert (made.teacher, made.student) == (4, 5)  # of 40 rows each


def test_rows_without_a_condition_are_of_all_noise_levels():
    draws = Draws(0, (2,), LEVELS, classes, uncond=uncond(), null_share=0.25)
    drawn, others = draws(0, torch.arange(2000)), draws(0, torch.arange(2000), 1)
    assert drawn.nulls is not None
    assert float(drawn.nulls.float().mean()) == pytest.approx(0.25, abs=0.04)
    low = drawn.t < drawn.t.median()
    assert float(low[drawn.nulls].float().mean()) == pytest.approx(0.5, abs=0.08)
    assert not torch.equal(drawn.nulls, others.nulls)


def test_without_guidance_no_row_loses_its_condition():
    draws = Draws(0, (2,), LEVELS, classes, null_share=0.9)
    drawn = draws(0, torch.arange(8))
    assert drawn.student_condition is drawn.condition
    student = network(1)
    student_loss(student, torch.zeros(8, 2), drawn)
    assert student.backbone.calls[-1][1] == [0, 1, 2, 3] * 2


def test_the_module_adds_up_guides_and_logs_norms_as_distill_does(tmp_path: Path):
    told = Settings(
        loss=EMD(num_steps=1, gamma_z=0.01), steps=2, batch_size=4, learning_rate=1e-3, student_learning_rate=1e-3,
        gradient_accumulation_steps=2, student_accumulation_steps=3, student_guidance=1.5, clip=1e-3,
    )  # fmt: skip

    def parts() -> tuple[Any, Any, Any]:
        return GuidedDenoiser(network(0), 3.0, uncond()), OneStepGenerator(network(2), 2.5), network(1)

    teacher, generator, student = parts()
    norms: list[tuple[float, float]] = []

    def note(step: int, told: Any, average: Any) -> None:
        grads = [[p.grad for p in net.parameters()] for net in (generator, student)]
        norms.append(tuple(float(torch.nn.utils.get_total_norm(one)) for one in grads))  # pyright: ignore

    distill(teacher, generator, (2,), told, student=student, time_sampler=LEVELS, conditions=classes, on_step=note)
    module = DistillModule(*parts()[:2], (2,), told, student=network(1), time_sampler=LEVELS, conditions=classes)
    fit(module, steps=2, folder=tmp_path, runtime=Runtime(device="cpu"), log_every=1, gradient_clip=told.clip)
    for one, other in ((module.generator, generator), (module.student, student)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for pair in norms:  # what was clipped
        assert pair == pytest.approx((1e-3, 1e-3), rel=1e-3)
    # Logged is what it was before: the same first iteration without clipping.
    free = DistillModule(*parts()[:2], (2,), told, student=network(1), time_sampler=LEVELS, conditions=classes)
    fit(free, steps=1, folder=tmp_path / "free", runtime=Runtime(device="cpu"), log_every=1)
    for name, net in (("grad_norm_g", free.generator), ("grad_norm_phi", free.student)):
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]))
        assert lines[0][name] == pytest.approx(norm, rel=1e-5)
        assert norm > 3e-3  # more than what it is clipped to


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"student_accumulation_steps": 0}, "student_accumulation_steps"),
        ({"student_guidance": float("nan")}, "student_guidance"),
        ({"null_share": 1.0}, "null_share"),
    ],
)
def test_what_cannot_be_is_refused(words: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**words)
