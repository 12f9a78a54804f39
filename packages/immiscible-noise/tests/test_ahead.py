"""Assignment ahead of the step: the same noise as in line, errors with their batch, an end that does not hang."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from immiscible_noise import AssignedAhead, assign_noise
from immiscible_noise import ahead as module


def batches(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(6, 2, 3, 3, generator=generator), "label": torch.arange(6) % 2, "id": i}
        for i in range(count)
    ]


@pytest.mark.parametrize("labels_key", [None, "label"])
def test_what_comes_equals_assigning_in_line(labels_key: str | None):
    ahead = AssignedAhead(batches(), labels_key=labels_key, seed=3)
    plain = AssignedAhead(batches(), labels_key=labels_key, seed=3, strength=0.0)
    for index, (found, batch) in enumerate(zip(ahead, batches(), strict=True)):
        assert found["id"] == batch["id"] == index
        assert torch.equal(found["pixel_values"], batch["pixel_values"])
        assert torch.equal(found["noise"], ahead.noise(index, batch))
        labels, drawn = None if labels_key is None else batch["label"], plain.noise(index, batch)
        assert torch.equal(found["noise"], assign_noise(batch["pixel_values"], drawn, labels=labels))
        assert not torch.equal(found["noise"], drawn)
    assert len(ahead) == 4


def test_a_resumed_training_meets_the_same_noise():
    whole = [batch["noise"] for batch in AssignedAhead(batches(), seed=1)]
    rest = [batch["noise"] for batch in AssignedAhead(batches()[2:], seed=1, first_batch=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    same = [batches()[0]] * 2
    first, second = (batch["noise"] for batch in AssignedAhead(same, seed=1))
    other = next(iter(AssignedAhead(same, seed=2)))["noise"]
    assert not torch.isin(first, second).any()
    assert not torch.isin(first, other).any()


def test_tensors_come_with_their_noise():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ((images, noise),) = AssignedAhead([x], seed=0)
    assert images is x
    assert noise.shape == x.shape


def test_the_next_batch_is_assigned_while_this_one_trains(monkeypatch: pytest.MonkeyPatch):
    started, trained, threads = threading.Event(), threading.Event(), set()

    def recorded(x: torch.Tensor, noise: torch.Tensor, **options: Any) -> torch.Tensor:
        threads.add(threading.current_thread())
        if len(x) == 5:  # the second batch
            started.set()
            assert trained.wait(60)  # the loop has its first batch while this one is not done
        return assign_noise(x, noise, **options)

    monkeypatch.setattr(module, "assign_noise", recorded)
    found = iter(AssignedAhead([torch.randn(4, 3), torch.randn(5, 3), torch.randn(6, 3)]))
    next(found)
    assert started.wait(60)  # although the second has not been asked for
    trained.set()
    assert threading.main_thread() not in threads
    assert [len(x) for x, _ in found] == [5, 6]


def test_an_error_names_its_batch_and_those_before_it_come():
    wrong = batches()
    wrong[2]["pixel_values"][1, 0, 0, 0] = torch.nan
    found = iter(AssignedAhead(wrong, first_batch=10))
    assert [next(found)["id"], next(found)["id"]] == [0, 1]
    with pytest.raises(ValueError, match=r"x\[1\] holds NaN") as raised:
        next(found)
    assert raised.value.__notes__ == ["the noise of batch 12 could not be assigned"]


def test_an_error_of_the_loader_is_its_own():
    def loader() -> Iterator[torch.Tensor]:
        yield torch.randn(4, 3)
        raise OSError("the disk is gone")

    found = iter(AssignedAhead(loader()))
    assert len(next(found)[0]) == 4  # what came before it is not lost
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_a_loop_that_is_left_early_ends_with_the_interpreter():
    code = "import torch\nfrom immiscible_noise import AssignedAhead\nx = [torch.randn(64, 8) for _ in range(5)]\n"
    code += "found = iter(AssignedAhead(x))\nnext(found)\nprint('left')\n"
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert ended.stdout == "left\n", (ended.stderr, time.monotonic() - start)
