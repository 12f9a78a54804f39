import numpy as np
import pytest
import torch
from scipy import stats

from diffcore.noise import (
    mix_seed,
    philox4x32,
    philox_normal,
    philox_uniform,
    row_generator,
    row_noise,
    splitmix64,
)

SHAPE = (3, 5, 7)  # 105 elements: no multiple of 16, where one call for the whole batch would depend on its size


def test_splitmix64_known_answers():
    # The published sequence for seed 1234567: each output is the step of a state that grows by the golden ratio.
    golden = 0x9E3779B97F4A7C15
    outputs = [splitmix64((1234567 + n * golden) % 2**64) for n in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_seeds_do_not_collide_over_rows_streams_and_seeds():
    seeds = {mix_seed(s, r, t) for s in range(20) for r in range(50) for t in range(20)}
    assert len(seeds) == 20 * 50 * 20


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = philox4x32((c0, c1, c2, c3), key[0] | key[1] << 32)
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_philox_counter_layout():
    # element 5 of row 9 is word 1 of block 1: counter (1, 9, step, stream)
    words = philox4x32(tuple(torch.tensor([c]) for c in (1, 9, 3, 4)), 77)
    expected = ((words[1].item() >> 8) + 0.5) * 2.0**-24
    assert philox_uniform(77, [9], (8,), step=3, stream=4, dtype=torch.float64)[0, 5].item() == expected


@pytest.mark.parametrize("draw", [row_noise, philox_normal, philox_uniform])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_rows_do_not_depend_on_the_batch(draw, dtype, batch):
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:64].tolist()
    whole = draw(5, rows, SHAPE, stream=2, dtype=dtype)
    parts = [draw(5, rows[i : i + batch], SHAPE, stream=2, dtype=dtype) for i in range(0, 64, batch)]
    assert whole.dtype == dtype
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw(5, torch.tensor(rows), SHAPE, stream=2, dtype=dtype), whole)


@pytest.mark.parametrize("draw", [row_noise, philox_normal, philox_uniform])
def test_seed_row_and_stream_all_matter(draw):
    draws = torch.stack([draw(*args, (64,), stream=s)[0] for s in (0, 1) for args in ((0, [0]), (1, [0]), (0, [1]))])
    assert len(torch.unique(draws, dim=0)) == 6
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.5


@pytest.mark.parametrize("draw", [row_noise, philox_normal, philox_uniform])
def test_no_two_rows_are_alike(draw):
    draws = draw(0, range(500), (8,))
    assert len(torch.unique(draws, dim=0)) == 500
    assert len(torch.unique(draws[:, 0])) > 490


def test_steps_matter_and_large_values_are_accepted():
    a, b = (philox_normal(2**63 - 1, [2**32 - 1], (4,), step=step) for step in (0, 2**32 - 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("draw", [row_noise, philox_normal])
def test_moments_of_a_million_draws(draw):
    x = draw(0, range(256), (4096,)).double().flatten()
    n = x.numel()
    # each bound is four standard errors of the moment of a standard normal
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(x.pow(3).mean()) < 4 * (15 / n) ** 0.5
    assert abs(x.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_distributions_pass_kolmogorov_smirnov():
    assert stats.kstest(philox_normal(3, range(100), (100,)).flatten().numpy(), "norm").pvalue > 1e-3
    uniform = philox_uniform(3, range(100), (100,))
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3


def test_uniform_stays_inside_the_open_interval():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u = philox_uniform(0, range(64), (4096,), dtype=dtype).double()
        assert u.min() > 0
        assert u.max() < 1


def test_row_noise_is_the_rows_generator():
    direct = torch.randn(SHAPE, generator=row_generator(1, 8, 3))
    assert torch.equal(row_noise(1, [8], SHAPE, stream=3)[0], direct)


def test_empty_batches_and_scalar_rows():
    for draw in (row_noise, philox_normal, philox_uniform):
        assert draw(0, [], SHAPE).shape == (0, *SHAPE)
        assert draw(0, [1, 2], ()).shape == (2,)
    assert np.isfinite(philox_normal(0, [1], (3,)).numpy()).all()
