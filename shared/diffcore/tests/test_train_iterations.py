"""Training counts iterations: two optimizers that step unequally often, one average, clipping, no data set."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffcore.errors import MachineError
from diffcore.noise import philox_normal
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing.distributed import RankFailedError, run_forked
from diffcore.train import EMA, IterationModule, SampleGrid, Snapshots, fit, iterations_done, scheduled

CPU = Runtime(device="cpu")
NUM_ITERATIONS = 13
BATCH_SIZE = 8
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


class Alternating(IterationModule):
    """A generator and a critic: the critic steps one to three times an iteration, the generator every other time.

    Args:
        returned: From the module and the generator's loss to the loss that is returned.
        stepped: From the module and the critic's loss to the loss that its optimizer steps on.
    """

    def __init__(
        self,
        *,
        returned: Callable[[IterationModule, Tensor], Tensor] = lambda module, loss: loss,
        stepped: Callable[[IterationModule, Tensor], Tensor] = lambda module, loss: loss,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
        self.returned, self.stepped = returned, stepped

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        assert batch == {}
        for stream in range(1 + self.iteration % 3):
            real = self.draw(stream) + 3
            fake = self.generator(self.draw(10 + stream)).detach()
            loss = (softplus(self.critic(fake)) + softplus(-self.critic(real))).mean()
            self.step_optimizer(1, self.stepped(self, loss))
        loss = softplus(-self.critic(self.generator(self.draw(20)))).mean()
        if self.iteration % 2:
            self.step_optimizer(0, loss)
        self.log("loss", loss)
        return {"loss": self.returned(self, loss)}

    def draw(self, stream: int) -> Tensor:
        share = BATCH_SIZE // self.trainer.world_size
        rows = self.global_rank * share + torch.arange(share)
        return philox_normal(5, rows, (4,), step=self.iteration, stream=stream)

    def configure_optimizers(self) -> Any:
        generator = torch.optim.Adam(self.generator.parameters(), lr=0.05)
        critic = torch.optim.Adam(self.critic.parameters(), lr=0.05)
        return scheduled(generator, lambda iteration: 1 / (1 + iteration)), scheduled(critic, None)


class At(L.Callback):
    """Does something at each step of an optimizer in one iteration."""

    def __init__(self, iteration: int, action: Callable[[], object]) -> None:
        self.iteration, self.action = iteration, action

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: IterationModule, optimizer: object) -> None:
        if pl_module.iteration == self.iteration:
            self.action()


def train_to(folder: Path, steps: int = NUM_ITERATIONS, *callbacks: L.Callback, **options: Any) -> dict[str, Any]:
    """Returns all that the training leaves: weights, average, states of optimizers and schedules."""
    module = options.pop("module", None) or Alternating()
    runtime = options.pop("runtime", CPU)
    ema = EMA(0.9, network="generator")
    everything = {"folder": folder, "checkpoint_every": 4, "log_every": 3, "gradient_clip": 0.2} | options
    fit(module, steps=steps, runtime=runtime, callbacks=[ema, *callbacks], **everything)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("iteration", "state_dict", "optimizer_states", "lr_schedulers", "callbacks")
    return {name: checkpoint[name] for name in kept} | {"average": dict(ema.average.state_dict())}


def on_two_processes(train: Callable[[Runtime], Any]) -> list[Any]:
    """Returns what a training leaves on each of two ranks."""

    def on_rank(rank: int) -> Any:
        os.environ.update(
            {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        )
        return train(Runtime(device="cpu", devices=2, strategy="ddp"))

    return run_forked(on_rank, timeout_seconds=120.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_to(folder)


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    first, second = on_two_processes(lambda runtime: train_to(folder, runtime=runtime))
    assert_equal(first, second)
    return first


def test_iterations_are_counted_and_not_steps_of_optimizers(whole: tuple[Path, dict[str, Any]]):
    folder, kept = whole
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["iteration"] == iterations_done(folder / "checkpoints" / "last.ckpt") == NUM_ITERATIONS
    assert saved["global_step"] == 31, "25 steps of the critic and 6 of the generator"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 5, 8, 11]
    assert [group["last_epoch"] for group in kept["lr_schedulers"]] == [NUM_ITERATIONS]
    rates = [state["param_groups"][0]["lr"] for state in kept["optimizer_states"]]
    assert rates == pytest.approx([0.05 / (1 + NUM_ITERATIONS), 0.05])


def test_a_run_in_parts_equals_one_without_interruption(tmp_path: Path, whole: tuple[Path, dict[str, Any]]):
    for steps in (5, 9, NUM_ITERATIONS, NUM_ITERATIONS):
        parts = train_to(tmp_path, steps)
    assert_equal(parts, whole[1])
    assert (tmp_path / "log.jsonl").read_text() == (whole[0] / "log.jsonl").read_text()


def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, whole: tuple[Path, dict[str, Any]]):
    child = os.fork()
    if child == 0:
        train_to(tmp_path, NUM_ITERATIONS, At(7, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert iterations_done(tmp_path / "checkpoints" / "last.ckpt") == 4
    assert_equal(train_to(tmp_path), whole[1])


def test_a_signal_lets_all_optimizers_finish_the_iteration(tmp_path: Path, whole: tuple[Path, dict[str, Any]]):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        stopped = train_to(tmp_path, NUM_ITERATIONS, At(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert stopped["iteration"] == 6
    assert_equal(train_to(tmp_path), whole[1])


def bad_at(iteration: int, rank: int, module: IterationModule, loss: Tensor) -> Tensor:
    bad = module.iteration == iteration and module.global_rank == rank
    return loss * float("nan") if bad else loss


@pytest.mark.parametrize("where", ["returned", "stepped"])
def test_no_checkpoint_follows_a_bad_loss_of_any_optimizer(tmp_path: Path, where: str):
    """The loss that is stepped on may be bad where the one that is returned is fine, and the other way round."""
    options: dict[str, Any] = {"returned": lambda module, loss: torch.zeros(())}
    options |= {where: partial(bad_at, 5, 0)}
    with pytest.raises(MachineError, match=r"NaN or infinite at or shortly before step 8; .*last good step"):
        train_to(tmp_path, module=Alternating(**options))
    assert iterations_done(tmp_path / "checkpoints" / "last.ckpt") == 4


def test_two_processes_equal_one_at_equal_global_batch(
    whole: tuple[Path, dict[str, Any]], whole_on_two: dict[str, Any]
):
    torch.testing.assert_close(whole_on_two, whole[1], rtol=1e-4, atol=1e-5)


def test_two_killed_processes_continue_to_the_same_weights(tmp_path: Path, whole_on_two: dict[str, Any]):
    kill = At(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RankFailedError):
        on_two_processes(lambda runtime: train_to(tmp_path, NUM_ITERATIONS, kill, runtime=runtime))
    assert iterations_done(tmp_path / "checkpoints" / "last.ckpt") == 4
    for resumed in on_two_processes(lambda runtime: train_to(tmp_path, runtime=runtime)):
        assert_equal(resumed, whole_on_two)


def test_a_bad_loss_of_one_process_stops_all_of_them(tmp_path: Path):
    """The other process has seen good losses only, and would write the checkpoint."""

    def message(runtime: Runtime) -> str:
        with pytest.raises(MachineError) as error:
            train_to(tmp_path, module=Alternating(returned=partial(bad_at, 7, 1)), runtime=runtime)
        return str(error.value)

    for said in on_two_processes(message):
        assert "NaN or infinite at or shortly before step 8" in said
    assert iterations_done(tmp_path / "checkpoints" / "last.ckpt") == 4


class Recorder(L.Callback):
    """Keeps the generator's weights after each iteration."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Alternating, *args: object) -> None:
        self.weights.append(pl_module.generator.weight.detach().clone())


def test_average_snapshots_and_grids_follow_iterations(tmp_path: Path):
    recorder, module, ema = Recorder(), Alternating(), EMA(0.9, network="generator")
    average = module.generator.weight.detach().clone()
    seen: list[Tensor] = []

    def generate(network: nn.Linear, device: torch.device) -> Tensor:
        seen.append(network.weight.clone())
        return torch.zeros(4, 1, 8, 8, device=device)

    with Run.open(tmp_path, command="test", config={}) as run:
        callbacks = [ema, recorder, Snapshots(run, ema, [6], BATCH_SIZE), SampleGrid(run, ema, generate, every=6)]
        fit(module, steps=NUM_ITERATIONS, folder=tmp_path, runtime=CPU, callbacks=callbacks)
        snapshot = run.load("snapshot-00000006")
    expected = {}
    for iteration, value in enumerate(recorder.weights, start=1):
        decay = min(0.9, (1 + iteration) / (10 + iteration))
        average = decay * average + (1 - decay) * value
        expected[iteration] = average
    torch.testing.assert_close(snapshot.tensors["weight"], expected[6])
    assert snapshot.fields["samples_seen"] == 6 * BATCH_SIZE
    torch.testing.assert_close(seen, [expected[6], expected[12], expected[NUM_ITERATIONS]])


def test_a_checkpoint_without_a_count_has_the_steps_of_its_one_optimizer(tmp_path: Path):
    """Such are the checkpoints of half-finished runs from before iterations were counted."""

    class One(Alternating):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return softplus(-self.generator(self.draw(0))).mean()

        def configure_optimizers(self) -> Any:
            return scheduled(torch.optim.Adam(self.generator.parameters()), None)

    expected = train_to(tmp_path / "whole", module=One())
    train_to(tmp_path / "old", 6, module=One())
    path = tmp_path / "old" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["iteration"]
    torch.save(checkpoint, path)
    assert iterations_done(path) == 6
    assert_equal(train_to(tmp_path / "old", module=One()), expected)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("automatic", [True, False])
def test_a_step_is_as_long_as_the_clipped_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, automatic: bool
):
    """Under float16 the gradient is divided by the scale of the loss before it is clipped."""

    class Plain(IterationModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.networks = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss = torch.zeros(())
            for index, network in enumerate(self.networks[:1] if automatic else self.networks):
                loss = 30 * network(torch.ones(2, 4)).float().mean()
                if not automatic:
                    self.step_optimizer(index, loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.SGD(network.parameters(), lr=1.0) for network in self.networks]
            return optimizers[0] if automatic else optimizers

    if precision == "float16":
        trainer = L.Trainer

        def half(**options: Any) -> L.Trainer:
            del options["precision"]  # Lightning turns float16 into bfloat16 on a CPU, unless told by a plug-in
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
            return trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)

        monkeypatch.setattr(L, "Trainer", half)
    module = Plain()
    before = [network.weight.detach().clone() for network in module.networks]  # pyright: ignore
    fit(module, steps=1, folder=tmp_path, runtime=CPU, gradient_clip=0.5)
    # Every weight and the bias have the same gradient: four fifths of its square are the weights'.
    moved = [(a - b.weight.detach()).norm() for a, b in zip(before, module.networks, strict=True)]  # pyright: ignore
    expected = torch.tensor([0.5, 0.0 if automatic else 0.5]) * 0.8**0.5
    torch.testing.assert_close(torch.stack(moved), expected, rtol=1e-3, atol=1e-6)


def test_a_training_step_must_return_a_loss(tmp_path: Path):
    class Silent(Alternating):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return {"other": torch.zeros(())}

    with pytest.raises(TypeError, match=r"Silent.training_step must return a loss, or a mapping with 'loss'"):
        train_to(tmp_path, module=Silent())
