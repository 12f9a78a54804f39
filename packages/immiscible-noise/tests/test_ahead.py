"""Assignment ahead of the step: the same noise as in line, errors with their batch, an end that does not hang."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from immiscible_noise import AssignedAhead, accumulate, assign_accumulated, assign_noise
from immiscible_noise.batch import mixed_seed


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
        assert torch.equal(found["noise"], ahead.noises(index, [batch])[0])
        labels, drawn = None if labels_key is None else batch["label"], plain.noises(index, [batch])[0]
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


@pytest.mark.parametrize(("accumulate", "resumed_at"), [(1, 3), (2, 4)])
def test_every_epoch_meets_noise_of_its_own(accumulate: int, resumed_at: int):
    """Three batches an epoch; with two to a step, the second step of an epoch has one and counts as full."""
    ahead = AssignedAhead(batches(3), seed=1, accumulate=accumulate)
    first, second = ([batch["noise"] for batch in ahead] for _ in range(2))
    assert not torch.isin(torch.cat(first), torch.cat(second)).any()
    resumed = AssignedAhead(batches(3), seed=1, accumulate=accumulate, first_batch=resumed_at)
    assert all(torch.equal(a, batch["noise"]) for a, batch in zip(second, resumed, strict=True))
    left = AssignedAhead(batches(3), seed=1)
    next(iter(left))  # an epoch that is left goes on with the next index
    assert torch.equal(next(iter(left))["noise"], left.noises(1, batches(1))[0])


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

    monkeypatch.setattr(accumulate, "assign_noise", recorded)
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


@pytest.mark.parametrize("count", [8, 7, 5, 3], ids=str)
@pytest.mark.parametrize("labels_key", [None, "label", "caption"])
def test_the_batches_of_one_optimizer_step_are_assigned_as_one(count: int, labels_key: str | None):
    given = batches(count)
    given[1] = {name: value if name == "id" else value[:4] for name, value in given[1].items()}  # of another size
    for batch in given:
        batch["caption"] = ["a cat" if label else "a dog" for label in batch["label"].tolist()]
    found = list(AssignedAhead(given, labels_key=labels_key, seed=3, accumulate=4))
    plain = list(AssignedAhead(given, seed=3, accumulate=1, strength=0.0))
    assert [batch["id"] for batch in found] == list(range(count))
    for step in (slice(0, 4), slice(4, 8)):
        if not (group := given[step]):
            continue
        x = torch.cat([batch["pixel_values"] for batch in group])
        drawn = torch.cat([batch["noise"] for batch in plain[step]])
        labels = None if labels_key is None else torch.cat([batch["label"] for batch in group])
        assert torch.equal(torch.cat([batch["noise"] for batch in found[step]]), assign_noise(x, drawn, labels=labels))
        assert [len(batch["noise"]) for batch in found[step]] == [len(batch["pixel_values"]) for batch in group]


def test_a_step_is_resumed_where_it_begins():
    whole = [batch["noise"] for batch in AssignedAhead(batches(6), seed=1, accumulate=2)]
    rest = [batch["noise"] for batch in AssignedAhead(batches(6)[4:], seed=1, accumulate=2, first_batch=4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    with pytest.raises(ValueError, match=r"first_batch is 3, inside an optimizer step of 2 batches; .* at 2"):
        AssignedAhead(batches(), accumulate=2, first_batch=3)
    with pytest.raises(ValueError, match="accumulate is 0"):
        AssignedAhead(batches(), accumulate=0)


def test_an_error_names_the_batches_of_its_step():
    wrong = batches(5)
    wrong[3]["pixel_values"][1, 0, 0, 0] = torch.nan
    found = iter(AssignedAhead(wrong, accumulate=2))
    assert [next(found)["id"], next(found)["id"]] == [0, 1]
    with pytest.raises(ValueError, match=r"x\[7\] holds NaN") as raised:
        next(found)
    assert raised.value.__notes__ == ["the noise of batches 2 to 3 could not be assigned"]


def test_a_loader_that_fails_inside_a_step_loses_nothing_before_it():
    def loader() -> Iterator[torch.Tensor]:
        yield from torch.randn(3, 4, 3)
        raise OSError("the disk is gone")

    found = iter(AssignedAhead(loader(), accumulate=2))
    assert [len(next(found)[0]) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_micro_batches_are_assigned_as_one_batch():
    g = torch.Generator().manual_seed(0)
    images, noises = ([torch.randn(size, 2, 3, generator=g) for size in (3, 0, 5)] for _ in range(2))
    labels = torch.arange(8) % 3
    for options in ({}, {"labels": labels}, {"cost": "l2"}, {"strength": 0.5}):
        seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
        found = assign_accumulated(images, noises, generator=seeded[0], **options)
        together = assign_noise(torch.cat(images), torch.cat(noises), generator=seeded[1], **options)
        assert [len(noise) for noise in found] == [3, 0, 5]
        assert torch.equal(torch.cat(found), together)
    assert assign_accumulated([], []) == []


@pytest.mark.parametrize(
    ("noises", "message", "note"),
    [
        ([(2, 3)], "there are 2 micro-batches but 1 noises", None),
        ([(2, 3), (3, 3)], r"x has shape \[2, 3\] but noise has shape \[3, 3\]", "in micro-batch 1"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_micro_batches_that_do_not_fit(noises: list[tuple[int, int]], message: str, note: str | None):
    with pytest.raises(ValueError, match=message) as raised:
        assign_accumulated([torch.zeros(2, 3), torch.zeros(2, 3)], [torch.zeros(shape) for shape in noises])
    assert getattr(raised.value, "__notes__", [None]) == [note]
    with pytest.raises(ValueError, match=r"micro-batch 1 has rows of shape \[4\], the first of \[3\]"):
        assign_accumulated([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2, 3), torch.zeros(2, 4)])


def test_each_list_of_numbers_has_its_own_seed():
    lists = [*itertools.product(range(-2, 12), range(12), range(3)), *((i, j) for i in range(5) for j in range(5))]
    seeds = {mixed_seed(*numbers) for numbers in lists}
    assert len(seeds) == len(lists)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(3, 5) == 7322129600662897111  # a resumed training repeats it with a later version
