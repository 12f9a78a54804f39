"""Plans: pairs do not depend on the network batch, noises stay those that were drawn, buckets and labels keep apart."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from immiscible_noise import NoisePlan, assign_noise, read_plan, write_plan
from immiscible_noise.plan import noise_of

LATENTS = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))
ORDER = torch.cat([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(2)])


def pairs(plan: NoisePlan, batch: int, first: int = 0) -> list[tuple[int, Tensor]]:
    """Returns what a loader of batches of a size gives: the sample and the noise of each visit."""
    found = []
    for visits in torch.arange(first, len(plan)).split(batch):
        x = LATENTS[plan.order[visits]]
        found += list(zip(plan.order[visits].tolist(), plan.noise(visits, like=x), strict=True))
    return found


def test_network_batches_of_1_and_32_meet_the_same_pairs_and_a_training_resumes_inside_a_window():
    plan = NoisePlan.build(LATENTS, ORDER, window=24)
    whole = pairs(plan, 32)
    for other in (pairs(plan, 1), pairs(NoisePlan.build(LATENTS, ORDER, window=24), 32)):
        assert [i for i, _ in whole] == [i for i, _ in other]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, other, strict=True))
    resumed = pairs(plan, 7, first=29)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole[29:], resumed, strict=True))


def test_each_window_holds_the_noises_that_were_drawn_assigned_as_a_batch():
    plan, vanilla = (NoisePlan.build(LATENTS, ORDER, window=24, strength=s) for s in (1.0, 0.0))
    for places in torch.arange(80).split(24):
        x, drawn = LATENTS[ORDER[places]], noise_of(vanilla.seeds[places], (4, 4, 4))
        assert torch.equal(plan.noise(places, like=x), assign_noise(x, drawn))
        assert sorted(plan.seeds[places].tolist()) == sorted(vanilla.seeds[places].tolist())
    assert len(set(plan.seeds.tolist())) == 80
    assert len(set(noise_of(plan.seeds, (1,)).flatten().tolist())) == 80


def test_a_longer_training_begins_as_a_shorter_one():
    short = NoisePlan.build(LATENTS, ORDER[:48], window=24, seed=3)
    assert torch.equal(NoisePlan.build(LATENTS, ORDER, window=24, seed=3).seeds[:48], short.seeds)
    assert not torch.equal(NoisePlan.build(LATENTS, ORDER[:48], window=24, seed=4).seeds, short.seeds)


def test_larger_windows_bring_noise_nearer():
    inner = {}
    for window in (1, 10, 40):
        plan = NoisePlan.build(LATENTS, window=window)
        x = LATENTS[plan.order]
        inner[window] = float((x * plan.noise(torch.arange(40), like=x)).mean())
    assert abs(inner[1]) < 0.05
    assert inner[1] < inner[10] < inner[40]


def test_labels_are_those_of_the_samples():
    labels = torch.arange(40) % 4
    plain = NoisePlan.build(LATENTS, ORDER, window=40, strength=0.0)
    for given in (labels, [f"class {i}" for i in labels.tolist()]):
        plan = NoisePlan.build(LATENTS, ORDER, window=40, labels=given)
        for window in torch.arange(80).split(40):
            for label in range(4):
                here = window[labels[ORDER[window]] == label]
                assert sorted(plan.seeds[here].tolist()) == sorted(plain.seeds[here].tolist())
        assert not torch.equal(plan.seeds, plain.seeds)


def test_masks_are_those_of_the_samples():
    mask = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    plan = NoisePlan.build(LATENTS, ORDER, window=24, mask=mask)
    otherwise = NoisePlan.build(LATENTS.masked_fill(~mask, 100.0), ORDER, window=24, mask=mask)
    assert torch.equal(plan.seeds, otherwise.seeds)  # what the padding holds does not matter
    assert not torch.equal(plan.seeds, NoisePlan.build(LATENTS, ORDER, window=24).seeds)
    for_all, for_each = mask[:1], mask[:1].expand(40, 1, 4, 4)
    plans = [NoisePlan.build(LATENTS, ORDER, window=24, mask=given) for given in (for_all, for_each)]
    assert torch.equal(plans[0].seeds, plans[1].seeds)


@pytest.mark.parametrize("samples", [LATENTS, [*LATENTS, *torch.randn(20, 4, 4, 6)]], ids=["one shape", "buckets"])
def test_the_seed_fixes_which_rows_are_assigned_window_by_window(samples: Tensor | list[Tensor]):
    order = torch.arange(len(samples)).repeat(2)
    plan, again = (NoisePlan.build(samples, order, window=10, strength=0.5) for _ in range(2))
    assert torch.equal(plan.seeds, again.seeds)
    short = NoisePlan.build(samples, order[: len(samples)], window=10, strength=0.5)
    assert torch.equal(plan.seeds[: len(samples)], short.seeds)
    assert not torch.equal(plan.seeds, NoisePlan.build(samples, order, window=10).seeds)


def test_labels_and_masks_are_one_for_each_sample():
    for name, rows in (("labels", torch.arange(41)), ("mask", torch.ones(24, 1, 4, 4))):
        with pytest.raises(ValueError, match=f"{name} has {len(rows)} rows, but there are 40 samples"):
            NoisePlan.build(LATENTS, ORDER, window=24, **{name: rows})


def test_buckets_exchange_noise_with_their_like():
    samples = [torch.randn(4, 4, 4 if i % 3 else 6, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    plan, plain = (NoisePlan.build(samples, window=8, strength=s) for s in (1.0, 0.0))
    wide = torch.arange(30) % 3 == 0
    for bucket in (wide, ~wide):
        for places in bucket.nonzero()[:, 0].split(8):
            assert sorted(plan.seeds[places].tolist()) == sorted(plain.seeds[places].tolist())
    assert plan.noise(torch.tensor([3]), like=samples[3][None]).shape == (1, 4, 4, 6)
    assert not torch.equal(plan.seeds, plain.seeds)


def test_a_plan_is_stored_and_another_torch_is_told(tmp_path: Path):
    plan = NoisePlan.build(LATENTS, ORDER, window=24)
    loaded = read_plan(write_plan(plan, tmp_path / "plan.safetensors"))
    assert torch.equal(loaded.order, plan.order)
    assert torch.equal(loaded.seeds, plan.seeds)
    assert loaded.window == 24
    write_plan(NoisePlan(plan.order, plan.seeds, 24, "1.0"), tmp_path / "old.safetensors")
    with pytest.warns(UserWarning, match="made with torch 1.0"):
        read_plan(tmp_path / "old.safetensors")


def test_a_file_that_is_no_plan(tmp_path: Path):
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("order\n0\n1\n" * 10)
    with pytest.raises(ValueError, match="holds no plan, or is damaged"):
        read_plan(tmp_path / "text.safetensors")
    save_file({"order": torch.arange(3)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="holds no plan"):
        read_plan(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("order", "window", "message"),
    [([0, 40], 8, r"order\[1\] is 40, but there are 40"), ([-1], 8, r"order\[0\] is -1"), ([0], 0, "window is 0")],
)
def test_bad_arguments(order: list[int], window: int, message: str):
    with pytest.raises(ValueError, match=message):
        NoisePlan.build(LATENTS, order, window=window)


def test_noise_takes_type_and_shape_of_the_batch():
    plan = NoisePlan.build(LATENTS)
    noise = plan.noise(torch.tensor([5, 2]), like=LATENTS[:2].half())
    assert noise.dtype == torch.float16
    assert torch.equal(noise, plan.noise(torch.tensor([5, 2]), like=LATENTS[:2]).half())


@pytest.mark.parametrize(("count", "strength", "warned"), [(49, 1.0, True), (50, 1.0, False), (49, 0.5, False)])
def test_few_samples_are_warned_of(count: int, strength: float, warned: bool):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        NoisePlan.build(torch.randn(count, 3), torch.arange(count).repeat(2), strength=strength)
    assert [str(one.message).split(":")[0] for one in caught] == [f"there are only {count} samples"] * warned


def test_samples_that_change_are_warned_of():
    class Augmented(list[Tensor]):
        def __getitem__(self, index):
            return super().__getitem__(index) + torch.randn(3)

    samples = [*torch.randn(60, 3)]
    with pytest.warns(UserWarning, match="a sample changes from one reading to the next"):
        NoisePlan.build(Augmented(samples))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoisePlan.build(samples)
