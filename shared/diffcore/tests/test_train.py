"""The training room: draws, targets, order, average, resuming, signals, two processes."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from diffcore.denoiser import DiscreteSchedule, EDMSchedule, FlowSchedule, NetworkDenoiser, NoiseSchedule
from diffcore.errors import MachineError
from diffcore.noise import philox_normal
from diffcore.runtime import Runtime
from diffcore.train import (
    EMA,
    DenoisingModule,
    IterationModule,
    JSONLLogger,
    StepData,
    StepSampler,
    fit,
    log_normal_sigmas,
    logit_normal_times,
    uniform_timesteps,
)

CPU = Runtime(device="cpu")
KINDS: list[tuple[str, NoiseSchedule]] = [
    ("epsilon", DiscreteSchedule()),
    ("v_prediction", DiscreteSchedule(betas="scaled_linear")),
    ("sample", DiscreteSchedule(betas="squaredcos_cap_v2")),
    ("flow_prediction", FlowSchedule()),
    ("edm", EDMSchedule()),
]


class Identity(nn.Module):
    """Returns what it is given, so that losses can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + 0 * self.unused


class Points:
    """A data set of fixed Gaussian points."""

    def __init__(self, num_samples: int = 20, shape: tuple[int, ...] = (6,)) -> None:
        self.x0 = torch.randn(num_samples, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x0)

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x0": self.x0[indices], "indices": indices}


def small_module(**options: object) -> DenoisingModule:
    torch.manual_seed(0)
    backbone = TimeBlind()
    denoiser = NetworkDenoiser(backbone, FlowSchedule(), "flow_prediction")
    return DenoisingModule(denoiser, optimizer=partial(torch.optim.Adam, lr=1e-2), **options)  # pyright: ignore


class TimeBlind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("kind", "schedule"), KINDS)
def test_loss_equals_the_one_computed_by_hand_with_the_returned_pairing(kind: str, schedule: NoiseSchedule):
    """Catches targets built from the noise before pairing, pairing after noising, and changed images."""
    denoiser = NetworkDenoiser(Identity(), schedule, kind, sigma_data=0.7)  # pyright: ignore
    seen = {}

    def pair(x0: Tensor, noise: Tensor, batch: dict) -> Tensor:
        seen.update(x0=x0, noise=noise.flip(0), step=batch["step"], rank=batch["rank"], indices=batch["indices"])
        return seen["noise"]

    module = DenoisingModule(denoiser, optimizer=torch.optim.SGD, pair_noise=pair, seed=3)
    module.log = lambda *args, **options: None
    x0 = torch.randn(8, 6)
    batch = {"x0": x0.clone(), "indices": torch.arange(8)}
    loss = module.training_step(batch, 0)

    assert torch.equal(batch["x0"], x0)
    assert seen["step"] == 0
    assert seen["rank"] == 0
    assert torch.equal(seen["indices"], torch.arange(8))
    independent = philox_normal(3, range(8), (6,), step=0, stream=0)
    assert torch.equal(seen["noise"], independent.flip(0))

    t = module._timesteps(x0, 0, 1)
    alpha, sigma = (level[:, None] for level in schedule.alpha_sigma(t))
    noise, x_t = seen["noise"], alpha * x0 + sigma * seen["noise"]
    if kind == "edm":
        total = sigma**2 + 0.7**2
        c_skip, c_out, c_in = 0.7**2 / total, sigma * 0.7 / total.sqrt(), 1 / total.sqrt()
        output, target = c_in * x_t, (x0 - c_skip * x_t) / c_out
    else:
        output = x_t
        targets = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        target = targets.get(kind, noise - x0)
    torch.testing.assert_close(loss, ((output - target) ** 2).mean(), rtol=2e-4, atol=1e-5)


def test_noise_that_the_batch_carries_is_used_as_it_is():
    def never(x0: Tensor, noise: Tensor, batch: dict) -> Tensor:
        raise AssertionError("paired noise that was already chosen")

    module = DenoisingModule(
        NetworkDenoiser(Identity(), FlowSchedule(), "flow_prediction"), optimizer=torch.optim.SGD, pair_noise=never
    )
    module.log = lambda *args, **options: None
    x0, noise = torch.randn(4, 6), torch.randn(4, 6)
    loss = module.training_step({"x0": x0, "noise": noise}, 0)
    t = module._timesteps(x0, 0, 1)[:, None]
    expected = (((1 - t) * x0 + t * noise) - (noise - x0)).square().mean()
    torch.testing.assert_close(loss, expected)


def test_weighting_and_time_sampler_are_obeyed():
    module = DenoisingModule(
        NetworkDenoiser(Identity(), FlowSchedule(), "flow_prediction"),
        optimizer=torch.optim.SGD,
        time_sampler=lambda u: torch.full_like(u, 0.25),
        weighting=lambda t: 8 * t,
    )
    x0, noise = torch.randn(4, 6), torch.randn(4, 6)
    t = module.time_sampler(torch.rand(4))
    weighted = module.loss(x0, noise, t, {})
    expected = 2 * ((0.75 * x0 + 0.25 * noise) - (noise - x0)).square().mean()
    torch.testing.assert_close(weighted, expected)


def test_time_samplers_are_inverse_distribution_functions():
    u = (torch.arange(10_000) + 0.5) / 10_000
    indices = uniform_timesteps(1000)(u)
    assert torch.equal(indices.long().bincount(), torch.full((1000,), 10))
    sigmas = log_normal_sigmas(-1.2, 1.2)(u).log()
    torch.testing.assert_close(torch.stack([sigmas.mean(), sigmas.std()]), torch.tensor([-1.2, 1.2]), atol=2e-3, rtol=0)
    times = torch.logit(logit_normal_times(0.5, 2.0)(u.double()))
    expected = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([times.mean(), times.std()]), expected, atol=2e-3, rtol=0)


def taken(sampler: StepSampler, steps: int) -> list[list[int]]:
    return [batch.tolist() for batch, _ in zip(sampler, range(steps), strict=False)]


def test_order_covers_every_sample_once_a_pass_and_can_be_entered_anywhere():
    whole = taken(StepSampler(20, 8, seed=1), 10)
    flat = [i for batch in whole for i in batch]
    for start in range(0, 80, 20):
        assert sorted(flat[start : start + 20]) == list(range(20))
    assert flat[:20] != flat[20:40]
    assert taken(StepSampler(20, 8, seed=1, first_step=lambda: 4), 6) == whole[4:]
    assert taken(StepSampler(20, 8, seed=2), 10) != whole


def test_shares_of_the_ranks_make_the_batch_of_one_process():
    whole = taken(StepSampler(7, 6, seed=0), 5)
    shares = [taken(StepSampler(7, 6, seed=0, rank=rank, world_size=3), 5) for rank in range(3)]
    assert [[i for share in shares for i in share[step]] for step in range(5)] == whole
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 4 processes"):
        StepSampler(7, 6, seed=0, world_size=4)
    with pytest.raises(ValueError, match="from 0 samples"):
        StepSampler(0, 6, seed=0)


def train_to(folder: Path, steps: int, *, callbacks: tuple[L.Callback, ...] = (), **options: object) -> EMA:
    ema = EMA(0.9)
    module = small_module(seed=5)
    data = StepData(Points(), batch_size=8, seed=5)
    settings = {"log_every": 5, "checkpoint_every": 10, "runtime": CPU} | options
    assert fit(module, data, steps=steps, folder=folder, callbacks=(ema, *callbacks), **settings)  # pyright: ignore
    return ema


def averaged(ema: EMA) -> dict[str, Tensor]:
    return weights(ema.average)


def test_a_run_in_two_parts_equals_one_without_interruption(tmp_path: Path):
    whole = train_to(tmp_path / "whole", 40)
    train_to(tmp_path / "parts", 10)
    train_to(tmp_path / "parts", 25)
    parts = train_to(tmp_path / "parts", 40)
    assert_same(averaged(parts), averaged(whole))
    assert (tmp_path / "parts" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) == 8


class KillAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: IterationModule, *args: object) -> None:
        if pl_module.iteration == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", [7, 10, 23])
def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, step: int):
    whole = train_to(tmp_path / "whole", 30)
    child = os.fork()
    if child == 0:
        train_to(tmp_path / "killed", 30, callbacks=(KillAt(step),))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert_same(averaged(train_to(tmp_path / "killed", 30)), averaged(whole))


class SignalAt(L.Callback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: IterationModule, *args: object) -> None:
        if pl_module.iteration == self.step:
            os.kill(os.getpid(), self.number)


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_then_interrupts(tmp_path: Path):
    whole = train_to(tmp_path / "whole", 20)
    # Shells start what they run in the background deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_to(tmp_path / "cut", 20, callbacks=(SignalAt(6, signal.SIGINT),))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["iteration"] == 7
    assert_same(averaged(train_to(tmp_path / "cut", 20)), averaged(whole))


def test_sigterm_does_the_same_and_then_reaches_the_handler_that_was_there(tmp_path: Path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        train_to(tmp_path / "cut", 20, callbacks=(SignalAt(6, signal.SIGTERM),))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["iteration"] == 7


class Poison(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: IterationModule, *args: object) -> None:
        if pl_module.iteration == 15:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))


def test_a_bad_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    with pytest.raises(MachineError, match=r"NaN or infinite at or shortly before step 20; .*last good step"):
        train_to(tmp_path, 40, callbacks=(Poison(),))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["iteration"] == 10
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: IterationModule, *args: object) -> None:
        self.weights.append(next(pl_module.parameters()).detach().clone())


def test_the_average_follows_its_formula(tmp_path: Path):
    recorder = Recorder()
    ema = train_to(tmp_path, 12, callbacks=(recorder,))
    expected = next(small_module().parameters()).detach().clone()
    for step, value in enumerate(recorder.weights, start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(next(ema.average.parameters()), expected)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        EMA(1.0)


def test_bfloat16_trains_in_mixed_precision_and_keeps_float32_weights(tmp_path: Path):
    ema = train_to(tmp_path, 10, runtime=Runtime(device="cpu", dtype="bfloat16"))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in averaged(ema).values())
    assert any(
        not torch.equal(value, other)
        for value, other in zip(averaged(ema).values(), averaged(train_to(tmp_path / "b", 10)).values(), strict=True)
    )


class WriteAverage(L.Callback):
    def __init__(self, path: Path, ema: EMA) -> None:
        self.path, self.ema = path, ema

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(self.ema.average.state_dict(), self.path)


def test_two_processes_equal_one_at_equal_global_batch(tmp_path: Path):
    one = train_to(tmp_path / "one", 20)
    ema = EMA(0.9)
    fit(
        small_module(seed=5),
        StepData(Points(), batch_size=8, seed=5),
        steps=20,
        folder=tmp_path / "two",
        runtime=Runtime(device="cpu", devices=2, strategy="ddp_fork"),
        callbacks=(ema, WriteAverage(tmp_path / "two.pt", ema)),
    )
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, value in averaged(one).items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def test_the_log_drops_half_lines_and_steps_to_be_taken_again(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo')
    log = JSONLLogger(path, first_step=2)
    log.log_metrics({"loss": float("nan"), "epoch": 0.0}, step=2)
    log.finalize("finished")
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path):
    """A shell that starts a job in the background tells it to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train_to(tmp_path / "run", 12, callbacks=(SignalAt(6, signal.SIGINT),))
    finally:
        signal.signal(signal.SIGINT, before)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["iteration"] == 12


def test_stratified_timesteps_fill_every_slice_of_the_global_batch():
    module = small_module(stratified=True, time_sampler=lambda u: u)
    module._trainer = SimpleNamespace(global_rank=1, world_size=2)  # pyright: ignore[reportAttributeAccessIssue]
    drawn = module._timesteps(torch.zeros(8, 6), step=3, stream=1)
    assert torch.equal((drawn * 16).long(), torch.arange(8, 16)), "rank 1 of 2 holds the upper half"
