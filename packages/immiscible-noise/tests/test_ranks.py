"""One assignment over all ranks: two processes find what one does, with uneven and empty shares, and fail together."""

import pytest
import torch
from torch import Tensor

from diffcore.bench import peak_megabytes
from diffcore.testing.distributed import run_forked
from immiscible_noise import assign_across_ranks, assign_noise
from immiscible_noise.batch import choose_rows
from immiscible_noise.ranks import _AT_A_TIME, _WITH_ONE_SEED, _GlobalNoise, assign_drawn_across_ranks

X = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([7, 1, 7, 1, 1, 7, 7, 1])
TOO_FEW = "labels has 3 rows, x has 4; give one label for each image"


def global_noise(step: int, count: int = 8) -> Tensor:
    return _GlobalNoise(X, 0, step).rows(torch.arange(count))


@pytest.mark.parametrize("sizes", [(5, 3), (8, 0), (0, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("labels", [None, LABELS], ids=["free", "labels"])
def test_two_ranks_assign_as_one_process_does(sizes: tuple[int, int], labels: Tensor | None):
    def work(rank: int) -> list[Tensor]:
        share = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        told = None if labels is None else labels[share]
        return [assign_across_ranks(X[share], seed=0, step=step, labels=told) for step in range(2)]

    parts = run_forked(work)
    for step in range(2):
        together = torch.cat([part[step] for part in parts])
        assert torch.equal(together, assign_across_ranks(X, seed=0, step=step, labels=labels))
        assert torch.equal(together, assign_noise(X, global_noise(step), labels=labels))
        assert not torch.equal(together, global_noise(step))


@pytest.mark.parametrize("sizes", [(5, 3), (0, 8)], ids=str)
@pytest.mark.parametrize("labels", [None, LABELS], ids=["free", "labels"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75])
def test_a_share_of_the_rows_of_all_ranks_is_assigned(sizes: tuple[int, int], labels: Tensor | None, strength: float):
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))

    def work(rank: int) -> Tensor:
        share = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        told, generator = None if labels is None else labels[share], torch.Generator().manual_seed(5)
        return assign_drawn_across_ranks(
            X[share], lambda rows: noise[rows], labels=told, strength=strength, generator=generator
        )

    whole = assign_noise(X, noise, labels=labels, strength=strength, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(run_forked(work)), whole)
    kept = (whole == noise).flatten(1).all(1).sum()
    assert kept >= round((1 - strength) * len(X))


def test_a_bad_image_is_named_by_its_place_among_all():
    x = X.clone()
    x[5] = torch.nan
    for seed in range(20):
        generator, chosen = (torch.Generator().manual_seed(seed) for _ in range(2))
        if 5 in choose_rows(8, 0.5, chosen):
            with pytest.raises(ValueError, match="the costs of image 5 hold NaN"):
                assign_drawn_across_ranks(x, lambda rows: X[rows], strength=0.5, generator=generator)
            return
    raise AssertionError("no seed chose the image")


def test_three_ranks_take_their_own_rows():
    def work(rank: int) -> Tensor:
        return assign_across_ranks(X[[slice(0, 2), slice(2, 5), slice(5, 8)][rank]], seed=0, step=0)

    assert torch.equal(torch.cat(run_forked(work, ranks=3)), assign_across_ranks(X, seed=0, step=0))


def test_steps_and_seeds_have_noise_of_their_own():
    seen = {(seed, step): assign_across_ranks(X, seed=seed, step=step) for seed in range(3) for step in range(3)}
    flat = torch.stack([noise.flatten().sort().values for noise in seen.values()])
    assert (torch.cdist(flat, flat) + torch.eye(9) > 1e-3).all()


def test_what_is_wrong_on_one_rank_is_raised_on_both():
    def work(rank: int) -> str:
        x = X[:4].clone()
        if rank == 1:
            x[2, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN") as raised:
            assign_across_ranks(x, seed=0, step=0)
        return str(raised.value)

    assert run_forked(work) == ["the costs of image 6 hold NaN or infinite values; look at the images"] * 2


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:3], "labels has 3 rows, x has 8"),
        (LABELS / 10, r"labels is torch.float32 of shape \[8\]"),
        (LABELS[:, None], r"labels is torch.int64 of shape \[8, 1\]"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        assign_across_ranks(X, seed=0, step=0, labels=labels)


@pytest.mark.parametrize(
    ("second", "messages"),
    [
        (
            LABELS[:3],
            ["labels of rank 1 do not fit its images", TOO_FEW],
        ),
        (None, ["labels are given on rank 0, not on rank 1; give them on all, or on none"] * 2),
    ],
    ids=["too few", "none"],
)
@pytest.mark.usefixtures("as_shipped")
def test_labels_that_do_not_fit_on_one_rank_are_told_on_both(second: Tensor | None, messages: list[str]):
    def work(rank: int) -> str:
        with pytest.raises(ValueError, match="label") as raised:
            assign_across_ranks(X[:4], seed=0, step=0, labels=LABELS[:4] if rank == 0 else second)
        return str(raised.value)

    assert run_forked(work, timeout_seconds=60) == messages


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("options", [{"cost": "l3"}, {"precision": "float16"}, {"solver": "best"}], ids=str)
def test_options_that_are_unknown(options: dict):
    with pytest.raises(ValueError, match="choose from"):
        assign_across_ranks(X, seed=0, step=0, **options)


def test_costs_and_type_are_the_callers():
    x = (X * torch.linspace(0.1, 20, 8).view(-1, 1, 1, 1)).half()
    plain, squared = (assign_across_ranks(x, seed=0, step=1, cost=cost) for cost in ("l2", "sq"))
    assert plain.dtype == torch.float16
    assert torch.equal(plain, assign_noise(x, global_noise(1).half(), cost="l2"))
    assert not torch.equal(plain, squared)


@pytest.mark.parametrize("count", [_AT_A_TIME, _AT_A_TIME + _WITH_ONE_SEED + 3])
def test_more_rows_than_are_drawn_at_a_time(count: int):
    x = torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    found = assign_across_ranks(x, seed=0, step=4)
    assert torch.equal(found, assign_noise(x, global_noise(4, count)))


@pytest.mark.usefixtures("as_shipped")  # checks of types hold tensors longer
def test_a_rank_holds_its_rows_and_one_cost_matrix():
    count, pixels = 512, 4096
    x = torch.randn(count, pixels, generator=torch.Generator().manual_seed(1))

    def work(rank: int) -> float:
        share = x[: count // 2] if rank == 0 else x[count // 2 :]
        assign_across_ranks(share, seed=0, step=0)
        # Gloo's thread drops the costs a moment after it has sent them; where other work delays it, that is too late.
        return min(peak_megabytes(lambda: assign_across_ranks(share, seed=0, step=0)) for _ in range(5))

    rows, costs = 4e-6 * (count // 2) * pixels, 4e-6 * count**2
    for peak in run_forked(work):
        assert rows <= peak <= rows + costs + 0.02  # and a few numbers for each row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_noise_are_the_same_whatever_else_is_asked_for(dtype: torch.dtype):
    count = 2 * _WITH_ONE_SEED + 5
    noise = _GlobalNoise(torch.empty(1, 3, dtype=dtype), 7, 2)
    whole = noise.rows(torch.arange(count))
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert whole.dtype == dtype
    for asked in (shuffled[:50], shuffled):
        assert torch.equal(noise.rows(asked), whole[asked])
    assert noise.rows(shuffled[:0]).shape == (0, 3)
    assert len(whole.float().unique()) > count * 2  # no two groups are alike
    assert abs(float(whole.double().mean())) < 0.2
    assert abs(float(whole.double().std()) - 1) < 0.1
