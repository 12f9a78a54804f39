"""Nearest-of-k selection against brute force over the same candidates, and its law in high dimension."""

import pytest
import torch

from immiscible_noise import select_noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(size: int = 24, shape: tuple[int, ...] = (3, 5, 5), dtype=torch.float32) -> torch.Tensor:
    return torch.randn(size, *shape, generator=seeded(9)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_candidate_is_a_plain_draw(dtype):
    x = make_images(dtype=dtype)
    assert torch.equal(select_noise(x, 1, generator=seeded()), torch.randn(x.shape, generator=seeded(), dtype=dtype))


@pytest.mark.parametrize("score", ["l2", "inner"])
@pytest.mark.parametrize("k", [2, 5, 17])
def test_keeps_the_best_of_all_candidates(score, k):
    x = make_images()
    generator = seeded()
    candidates = torch.stack([torch.randn(x.shape, generator=generator) for _ in range(k)], 1)
    if score == "l2":
        best = (x[:, None] - candidates).double().flatten(2).norm(dim=2).argmin(1)
    else:
        best = (x[:, None] * candidates).double().flatten(2).sum(2).argmax(1)
    chosen = select_noise(x, k, score=score, generator=seeded())
    assert torch.equal(chosen, candidates[torch.arange(len(x)), best])


def test_works_at_batch_size_one():
    x = make_images(1)
    plain, chosen = (select_noise(x, k, generator=seeded()) for k in (1, 64))
    assert (x - chosen).norm() < (x - plain).norm()


def test_laws_of_the_published_score():
    dim, k, expected_maximum = 3072, 4, 1.029
    x = torch.randn(512, dim, generator=seeded(1))
    noise = select_noise(x, k, generator=seeded(2))
    spread = (2 * dim + 4 * dim) ** 0.5  # |x|^2 = D for images of unit variance
    plain = select_noise(x, 1, generator=seeded(3))
    reduction = 1 - (x - noise).norm(dim=1).mean() / (x - plain).norm(dim=1).mean()
    assert float(reduction) == pytest.approx(expected_maximum * spread / (4 * dim), abs=1e-3)
    assert float(noise.square().mean()) == pytest.approx(1 - 2 * expected_maximum / spread, abs=3e-3)


def test_inner_score_keeps_the_norm():
    x = torch.randn(512, 3072, generator=seeded(1))
    noise = select_noise(x, 4, score="inner", generator=seeded(2))
    assert float(noise.square().mean()) == pytest.approx(1.0, abs=3e-3)


def test_memory_does_not_grow_with_k():
    x = make_images(64, (4, 16, 16))
    peaks = []
    for k in (4, 64):
        with torch.profiler.profile(profile_memory=True) as profiler:
            select_noise(x, k, generator=seeded())
        sizes, held, peak = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"], 0, 0
        for event in sorted(sizes, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    assert peaks[0] >= x.nbytes
    assert peaks[1] <= peaks[0] * 1.01


def test_gradients_stay_out():
    assert not select_noise(make_images().requires_grad_(), 3).requires_grad
