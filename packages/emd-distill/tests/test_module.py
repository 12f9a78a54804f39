"""Training with Lightning: the same iteration as `distill`, resumable, on one process or two."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from diffcore.denoiser import Denoiser, EDMSchedule, NetworkDenoiser, Prediction
from diffcore.errors import MachineError, UserError
from diffcore.runtime import Runtime
from diffcore.testing.distributed import run_forked
from diffcore.train import EMA, fit, iterations_done
from diffcore.train.iteration import Descent
from emd_distill.distill import Settings, distill
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD, GeneratorLoss, SiD, diff_instruct
from emd_distill.module import DistillModule, means
from emd_distill.noise_levels import noise_levels

from .test_distill import Latent, Score, four_modes, weights

CPU = Runtime(device="cpu")
LOSS = EMD(num_steps={0: 0, 3: 2}, gamma_z=0.01)
STEPS = 8
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def settings(**changes: Any) -> Settings:
    return Settings(
        **{"loss": LOSS, "steps": STEPS, "batch_size": 16, "learning_rate": 1e-2, "student_learning_rate": 5e-3}
        | {"student_updates": 2, "ema": 0.9}
        | changes
    )


def networks() -> tuple[NetworkDenoiser, torch.nn.Module]:
    torch.manual_seed(0)
    return NetworkDenoiser(Score(dropout=0.0), EDMSchedule(), "edm"), Latent()


def module_of(told: Settings, teacher: Denoiser | None = None) -> DistillModule:
    student, generator = networks()
    teacher = teacher or four_modes()
    levels = noise_levels(teacher.schedule, low=0.05, high=5.0)
    return DistillModule(teacher, generator, (2,), told, student=student, time_sampler=levels)


def train_to(folder: Path, *callbacks: L.Callback, runtime: Runtime = CPU, **changes: Any) -> dict[str, Tensor]:
    """Returns all weights that the training leaves."""
    told = settings(**changes)
    module, ema = module_of(told), EMA(told.ema, network="generator")
    fit(
        module, steps=told.steps, folder=folder, runtime=runtime, callbacks=[ema, *callbacks],
        checkpoint_every=3, log_every=4, gradient_clip=told.clip,
    )  # fmt: skip
    parts = {"student": module.student, "generator": module.generator, "average": ema.average}
    return {name: weights(part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_to(folder)


def test_it_is_distill_bit_for_bit(whole: tuple[Path, dict[str, Tensor]]):
    student, generator = networks()
    teacher = four_modes()
    levels = noise_levels(teacher.schedule, low=0.05, high=5.0)
    seen: list[float] = []
    done = distill(
        teacher, generator, (2,), settings(), student=student, time_sampler=levels,
        on_step=lambda step, told, average: seen.append(float(told.drift.square().mean().sqrt())),
    )  # fmt: skip
    parts = {"student": student, "generator": generator, "average": done.generator}
    assert_equal(whole[1], {name: weights(part) for name, part in parts.items()})
    lines = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 7]
    for line, part in zip(lines, (seen[:4], seen[4:]), strict=True):
        assert line["drift"] == pytest.approx((sum(value**2 for value in part) / 4) ** 0.5, rel=1e-5)
        assert line["finite"] == 1.0
        assert line["loss_g"] > 0
        assert line["loss_phi"] > 0
        assert all(line[f"drift_{place}"] > 0 for place in range(1, 6))
    assert lines[0]["z_move"] < lines[1]["z_move"]  # without a chain latents do not move


def test_so_many_iterations_are_so_many_updates_of_the_generator(tmp_path: Path):
    updates = {"student": 0, "generator": 0}

    class Count(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            own = optimizer.param_groups[0]["params"][0] is next(iter(pl_module.generator.parameters()))
            updates["generator" if own else "student"] += 1

    train_to(tmp_path, Count())
    assert updates == {"student": 2 * STEPS, "generator": STEPS}
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["iteration"] == STEPS
    assert not [name for name in kept["state_dict"] if "teacher" in name]


def at(iteration: int, act: Callable[[], object]) -> L.Callback:
    class At(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: object) -> None:
            if module.iteration == iteration:
                act()

    return At()


def test_a_killed_training_goes_on_to_the_same_weights_and_log(tmp_path: Path, whole: tuple[Path, dict[str, Tensor]]):
    child = os.fork()
    if child == 0:
        train_to(tmp_path, at(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert iterations_done(tmp_path / "checkpoints" / "last.ckpt") == 3
    assert_equal(train_to(tmp_path), whole[1])
    assert (tmp_path / "log.jsonl").read_text() == (whole[0] / "log.jsonl").read_text()


def test_ctrl_c_finishes_the_iteration_and_the_same_call_goes_on(tmp_path: Path, whole: tuple[Path, dict[str, Tensor]]):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train_to(tmp_path, at(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert iterations_done(tmp_path / "checkpoints" / "last.ckpt") == 5
    assert_equal(train_to(tmp_path), whole[1])


class Gradients(L.Callback):
    """Keeps the first gradient of each network."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        parts: list[Any] = optimizer.param_groups[0]["params"]
        own = parts[0] is next(iter(pl_module.generator.parameters()))
        self.kept.setdefault("generator" if own else "student", torch.cat([p.grad.flatten() for p in parts]))


@pytest.mark.parametrize("loss", [EMD(num_steps=2, gamma_z=0.01), SiD()])
def test_two_processes_equal_one_at_the_whole_batch(tmp_path: Path, loss: Any):
    changes: dict[str, Any] = {"loss": loss, "clip": None, "steps": 3}

    def on_rank(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        os.environ.update(
            {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        )
        kept = Gradients()
        runtime = Runtime(device="cpu", devices=2, strategy="ddp")
        return train_to(tmp_path / "two", kept, runtime=runtime, **changes), kept.kept

    alone = Gradients()
    one = train_to(tmp_path / "one", alone, **changes)
    first, second = run_forked(on_rank, timeout_seconds=120.0)
    assert_equal(first, second)
    torch.testing.assert_close(first[1], alone.kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[0], one, rtol=1e-3, atol=1e-4)  # Adam divides small gradients by their size


def test_networks_that_come_in_training_mode_are_functions_all_the_same(tmp_path: Path):
    """A chain sees the same networks at each step, whatever the trainer does to the modes of its modules."""
    nets = [NetworkDenoiser(Score(dropout=0.5), EDMSchedule(), "edm").train() for _ in range(3)]
    teacher, student, inner = nets
    told = settings(steps=2, loss=EMD(num_steps=2, gamma_z=0.01), student_updates=1)
    module = DistillModule(teacher, OneStepGenerator(inner, 2.5).train(), (2,), told, student=student)
    fit(module, steps=2, folder=tmp_path, runtime=CPU)
    assert set(teacher.backbone.modes) == {False}
    assert set(inner.backbone.modes) == {False}
    assert student.backbone.modes == [True, False, False] * 2


def test_float16_is_refused_and_bfloat16_keeps_chains_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    states: list[torch.dtype] = []

    class Spy:
        def __call__(self, s: Any) -> Any:
            told = LOSS(s)
            states.extend((s.x0.dtype, s.eps.dtype, told.drift.dtype, told.loss.dtype))
            return told

    train_to(tmp_path / "half", runtime=Runtime(device="cpu", dtype="bfloat16"), loss=Spy(), steps=4)
    assert set(states) == {torch.float32}
    module = module_of(settings())
    module._trainer = type("Half", (), {"precision": "16-mixed", "world_size": 1})()  # pyright: ignore
    with pytest.raises(UserError, match="float16"):
        module.setup("fit")


def test_a_batch_that_does_not_divide_is_refused():
    module = module_of(settings(batch_size=15))
    module._trainer = type("Two", (), {"precision": "32-true", "world_size": 2})()  # pyright: ignore
    with pytest.raises(UserError, match="does not divide over 2"):
        module.setup("fit")


def test_a_row_that_is_lost_costs_that_row_alone_and_many_end_the_training(tmp_path: Path):
    class Broken(Denoiser):
        """Rows whose first number is large become NaN."""

        def __init__(self, above: float) -> None:
            super().__init__()
            self.modes, self.above = four_modes(), above
            self.schedule = self.modes.schedule

        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Prediction:
            told = self.modes(x_t, t, cond)
            return replace(told, output=told.output + torch.where(x_t[:, :1] > self.above, torch.nan, 0.0))

    def run(above: float, steps: int) -> DistillModule:
        told = settings(steps=steps, loss=diff_instruct(), student_updates=1)
        module = module_of(told, Broken(above))
        fit(module, steps=steps, folder=tmp_path / str(above), runtime=CPU, log_every=10, gradient_clip=1.0)
        return module

    kept = run(1.5, 20)
    assert all(p.isfinite().all() for p in kept.generator.parameters())
    line = json.loads((tmp_path / "1.5" / "log.jsonl").read_text().splitlines()[-1])
    assert 0.8 < line["finite"] < 1.0
    assert line["drift"] is not None
    with pytest.raises(MachineError, match="did not stay finite"):
        run(0.0, 100)


def test_a_row_that_is_lost_along_its_chain_enters_no_sum():
    module = module_of(settings())
    module._trainer = type("Quiet", (), {"log_every_n_steps": 1000})()  # pyright: ignore
    finite, drift = torch.tensor([True, False]), torch.tensor([[1.0, 1.0], [100.0, 100.0]])
    told = GeneratorLoss(torch.tensor(0.5), finite, drift, torch.tensor([0.25, 50.0]))
    step = Descent(torch.tensor(0.5), torch.tensor(2.0))
    found, share = module._note(told, [step, step], torch.tensor([0.1, 0.1]))
    assert (float(found), float(share)) == (1.0, 0.5)
    logged = means(module._window)
    assert (float(logged["drift"]), float(logged["z_move"])) == (1.0, 0.25)


def test_drift_is_told_in_bins_of_equal_shares():
    module = module_of(settings())
    t = torch.sort(module.draws.time_sampler(torch.rand(1000, generator=torch.Generator().manual_seed(0)))).values
    squares, counts = module._binned(t.square(), torch.ones(1000, dtype=torch.bool), t)
    assert counts.sum() == 1000
    assert counts.min() > 150
    told = means(torch.cat([torch.ones(7), squares, counts]).double())
    drifts = [float(told[f"drift_{place}"]) for place in range(1, 6)]
    assert drifts == sorted(drifts)
    assert drifts[0] <= module.edges[0] <= drifts[1] <= module.edges[1]
