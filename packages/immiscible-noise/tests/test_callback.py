"""Lightning's callback: the noise of a batch is that of an assignment by hand, a resumed training repeats it."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from diffcore.testing.distributed import run_forked
from immiscible_noise import ImmiscibleCallback, assign_across_ranks, assign_noise

Batch = dict[str, Tensor]
NUM_BATCHES = 3


class Recorder(L.LightningModule):
    """Trains one weight, and keeps each training and validation batch as its step sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Batch] = []
        self.validated: list[Batch] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(batch)
        return (batch["noise"] - self.weight).square().mean()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches_of() -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    return [{"x0": torch.randn(8, 2, 4, generator=g), "class": torch.arange(8) % 2} for _ in range(NUM_BATCHES)]


def loader(batches: list[Any] | None = None) -> Any:
    return torch.utils.data.DataLoader(batches_of() if batches is None else batches, batch_size=None)


def trainer_of(*callbacks: L.Callback) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    keeps = any(isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint) for callback in callbacks)
    return L.Trainer(callbacks=[*callbacks], max_epochs=2, accelerator="cpu", enable_checkpointing=keeps, **quiet)


def fit(module: Recorder, callback: ImmiscibleCallback, batches: list[Any] | None = None) -> None:
    trainer_of(callback).fit(module, loader(batches), val_dataloaders=loader())


def test_noise_is_that_of_an_assignment_by_hand():
    module, labels = Recorder(), batches_of()[0]["class"]
    fit(module, ImmiscibleCallback(labels_key="class", seed=5))
    assert len(module.seen) == 2 * NUM_BATCHES
    for batch in module.seen:
        # Assigned noise is its own assignment, whatever the draw was; unassigned noise is not.
        assert torch.equal(assign_noise(batch["x0"], batch["noise"], labels=labels), batch["noise"])


def test_labels_and_options_reach_the_assignment():
    free, blocks, plain = Recorder(), Recorder(), Recorder()
    fit(free, ImmiscibleCallback(seed=5))
    fit(blocks, ImmiscibleCallback(labels_key="class", seed=5))
    fit(plain, ImmiscibleCallback(seed=5, strength=0.0))
    for a, b, c in zip(free.seen, blocks.seen, plain.seen, strict=True):
        assert torch.equal(a["noise"], assign_noise(a["x0"], c["noise"]))
        assert torch.equal(b["noise"], assign_noise(a["x0"], c["noise"], labels=a["class"]))
    assert any(not torch.equal(a["noise"], b["noise"]) for a, b in zip(free.seen, blocks.seen, strict=True))


def test_names_in_the_batch_are_the_callers():
    data = [{"latents": batch["x0"]} for batch in batches_of()]

    class Renamed(Recorder):
        def training_step(self, batch: Batch, index: int) -> Tensor:
            return super().training_step({"noise": batch["eps"], "x0": batch["latents"]}, index)

    module = Renamed()
    fit(module, ImmiscibleCallback("latents", noise_key="eps", seed=5), data)
    plain = Recorder()
    fit(plain, ImmiscibleCallback(seed=5))
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(module.seen, plain.seen, strict=True))


def test_validation_gets_none():
    module = Recorder()
    fit(module, ImmiscibleCallback())
    assert module.validated
    assert all(set(batch) == {"x0", "class"} for batch in module.validated)


@pytest.mark.parametrize("steps", [2, 3, 4])  # in the first epoch, at its end, in the second
def test_a_resumed_training_repeats_the_noise(steps: int, tmp_path: Path):
    # One batch over and over: Lightning does not tell a plain loader where to go on.
    batches, whole, rest = batches_of()[:1] * NUM_BATCHES, Recorder(), Recorder()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    trainer_of(ImmiscibleCallback(seed=1), keep).fit(whole, loader(batches))
    trainer_of(ImmiscibleCallback(seed=1)).fit(rest, loader(batches), ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert len(rest.seen) == 2 * NUM_BATCHES - steps
    for a, b in zip(whole.seen[steps:], rest.seen, strict=True):
        assert torch.equal(a["noise"], b["noise"])
    every = torch.stack([batch["noise"].flatten().sort().values for batch in whole.seen])
    assert (torch.cdist(every, every) + torch.eye(len(every)) > 1e-3).all()  # and no step repeats another


@pytest.mark.parametrize("failing", [0, 2, 4])
def test_a_step_that_fails_shifts_no_noise(failing: int, tmp_path: Path):
    class Failing(Recorder):
        def training_step(self, batch: Batch, index: int) -> Tensor:
            if len(self.seen) == failing:
                raise OSError("the machine went away")
            return super().training_step(batch, index)

    batches, whole, broken, rest = batches_of()[:1] * NUM_BATCHES, Recorder(), Failing(), Recorder()
    trainer_of(ImmiscibleCallback(seed=1)).fit(whole, loader(batches))
    keep = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(OSError, match="went away"):
        trainer_of(ImmiscibleCallback(seed=1), keep).fit(broken, loader(batches))
    trainer_of(ImmiscibleCallback(seed=1)).fit(rest, loader(batches), ckpt_path=keep.ckpt_path)
    every = [batch["noise"] for batch in broken.seen + rest.seen]
    assert len(every) == 2 * NUM_BATCHES
    for a, b in zip(whole.seen, every, strict=True):
        assert torch.equal(a["noise"], b)


def test_two_ranks_assign_together():
    data = batches_of()[0]

    def work(rank: int) -> Tensor:
        share = slice(0, 4) if rank == 0 else slice(4, None)
        batch = {"x0": data["x0"][share], "class": data["class"][share]}
        callback = ImmiscibleCallback(labels_key="class", across_ranks=True, seed=1, cost="l1")
        callback.on_train_batch_start(L.Trainer(logger=False, accelerator="cpu"), Recorder(), batch, 0)
        return batch["noise"]

    expected = assign_across_ranks(data["x0"], seed=1, step=0, labels=data["class"], cost="l1")
    assert torch.equal(torch.cat(run_forked(work)), expected)
    assert not torch.equal(expected, assign_across_ranks(data["x0"], seed=1, step=0, labels=data["class"]))


def test_options_that_ranks_do_not_know_are_refused():
    with pytest.raises(ValueError, match="across_ranks takes no condition"):
        ImmiscibleCallback(across_ranks=True, condition="ignore")


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(2)], TypeError, "the batch is a list; this callback puts noise into a dict"),
        ({"pixels": torch.zeros(2, 3)}, KeyError, "the batch has no 'x0', only pixels; give its name as `key`"),
        ({"x0": torch.zeros(2, 3)}, KeyError, "the batch has no 'class', only x0; give its name as `labels_key`"),
    ],
    ids=["list", "key", "labels"],
)
def test_batches_that_do_not_fit_are_named(batch: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        fit(Recorder(), ImmiscibleCallback(labels_key="class"), [batch])
