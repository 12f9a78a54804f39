"""Noise assigned over windows of a training: what the batch size and the processes do not change."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from diffcore.train import StepSampler
from immiscible_noise import Coupling, assign_noise
from immiscible_noise.study.digits import load_digits
from immiscible_noise.study.pairing import WindowNoise, pair_noise_of
from immiscible_noise.study.recipe import PixelScale
from immiscible_noise.study.settings import TrainSettings
from immiscible_noise.study.train import Batches

DATA = Batches(load_digits(), PixelScale(), class_conditional=True)
COUPLING = Coupling("assignment", window=24)


def visits(batch_size: int, ranks: int = 1, coupling: Coupling = COUPLING) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields sample, image and noise of the first 48 visits of a training with batches of a size over some ranks."""
    settings = TrainSettings(batch_size=batch_size, steps=1000)
    hooks = [pair_noise_of(coupling, 5, settings, DATA) for _ in range(ranks)]
    share = batch_size // ranks
    for step in range(48 // batch_size):
        for rank, hook in enumerate(hooks):
            start = step * batch_size + rank * share
            indices = StepSampler(len(DATA), batch_size, 5).samples(start, start + share)
            batch = DATA.__getitems__(indices)
            noise = hook(batch["x0"], torch.zeros_like(batch["x0"]), {**batch, "step": step, "rank": rank})
            yield from zip(indices.tolist(), batch["x0"], noise, strict=True)


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (16, 1), (8, 2), (48, 1)], ids=str)
def test_pairs_depend_neither_on_the_batch_size_nor_on_the_ranks(batch_size: int, ranks: int):
    for found, expected in zip(visits(batch_size, ranks), visits(12), strict=True):
        assert found[0] == expected[0]
        assert torch.equal(found[2], expected[2])


def test_a_window_is_assigned_as_a_batch_inside_labels():
    found = list(visits(1))
    plain = list(visits(1, coupling=Coupling("assignment", window=24, strength=0.0)))
    for start in (0, 24):
        part = found[start : start + 24]
        x = torch.stack([image for _, image, _ in part])
        drawn = torch.stack([noise for _, _, noise in plain[start : start + 24]])
        labels = DATA.labels[[sample for sample, _, _ in part]]
        assert torch.equal(torch.stack([noise for _, _, noise in part]), assign_noise(x, drawn, labels=labels))
        assert not torch.equal(torch.stack([noise for _, _, noise in part]), drawn)


def test_noises_of_different_visits_differ():
    drawn = torch.stack([noise.flatten() for _, _, noise in visits(1)])
    assert (torch.cdist(drawn, drawn) + 100 * torch.eye(48) > 1).all()


def test_a_window_is_built_once(monkeypatch: pytest.MonkeyPatch):
    hook = WindowNoise(COUPLING, DATA, 4, 5)
    built: list[int] = []
    real = DATA.__class__.__getitems__
    monkeypatch.setattr(DATA.__class__, "__getitems__", lambda self, rows: built.append(len(rows)) or real(self, rows))
    x0 = torch.zeros(4, 1, 8, 8)
    for step in range(12):
        hook(x0, x0, {"step": step, "rank": 0})
    assert built == [24, 24]


@pytest.mark.parametrize("options", [{"window": -1}, {"method": "knn", "window": 8}], ids=str)
def test_windows_that_make_no_sense(options: dict):
    with pytest.raises(ValueError, match="`window` is"):
        Coupling(**options)
