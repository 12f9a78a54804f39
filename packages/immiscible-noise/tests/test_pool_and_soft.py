"""Pools of more noises than images, noise that knows of continuous conditions, and samplers that do not suit it."""

from itertools import permutations

import diffusers
import pytest
import torch
from torch.nn import functional

from immiscible_noise import (
    Coupling,
    assign_noise,
    assign_noise_softly,
    choose_noise,
    is_stochastic,
    warn_if_stochastic,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score", ["l2", "inner"])
def test_a_pool_is_chosen_from_as_brute_force_does(score: str):
    x, noise = draw(3, 5), draw(6, 5, seed=1)
    found = choose_noise(x, noise, score=score)

    def badness(rows: torch.Tensor) -> float:
        return float((x - rows).square().sum() if score == "l2" else -(x * rows).sum())

    best = min(badness(noise[list(places)]) for places in permutations(range(6), 3))
    assert badness(found) == pytest.approx(best, rel=1e-6)
    assert len({tuple(row.tolist()) for row in found}) == 3
    assert all(any(torch.equal(row, other) for other in noise) for row in found)


def test_scores_differ_in_the_norms_they_leave():
    x, noise = draw(64, 12), draw(512, 12, seed=1)
    short, plain = (choose_noise(x, noise, score=s).square().mean() for s in ("l2", "inner"))
    assert short < 0.9 * plain


def test_a_pool_of_the_batchs_size_is_an_assignment():
    x, noise = draw(9, 2, 3), draw(9, 2, 3, seed=1)
    assert torch.equal(choose_noise(x, noise), assign_noise(x, noise))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (draw(2, 5), "2 rows for 3 images"),
        (draw(4, 6), r"of \[6\]"),
        (torch.full((4, 5), torch.nan), r"noise\[0\]"),
        (torch.zeros(4, 5, dtype=torch.int32), "noise is torch.int32"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_pools_that_do_not_fit(noise: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        choose_noise(draw(3, 5), noise)


def share(x: torch.Tensor, noise: torch.Tensor, conditions: torch.Tensor, weight: float) -> float:
    """r(w) by its definition."""
    distance = (x.flatten(1)[:, None] - noise.flatten(1)[None]).square().sum(-1)
    apart = 1 - functional.cosine_similarity(conditions[:, None], conditions[None], dim=-1)
    return float((distance + weight * apart <= distance.diagonal()[:, None]).float().mean())


@pytest.mark.parametrize("target", [0.05, 0.2])
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e4])
def test_the_weight_leaves_the_share_that_was_asked_for(target: float, start: float):
    x, noise, text = draw(48, 3, 4), draw(48, 3, 4, seed=1), draw(48, 16, seed=2)
    x = x * torch.linspace(0.1, 3, 48).view(-1, 1, 1)
    found = assign_noise_softly(x, noise, text, target=target, start=start)
    assert share(x, noise, text, float(found.weight)) == pytest.approx(target, abs=0.01)
    assert float(found.share) == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("conditions", ["one for all", "one each"])
@pytest.mark.parametrize("size", [16, 64])
def test_a_share_that_no_weight_leaves_lets_the_search_go_on_with_the_next_batch(size: int, conditions: str):
    weight = 1.0
    for seed in range(8):  # every batch starts from the weight of the one before
        x, noise = draw(size, 8, seed=3 * seed), draw(size, 8, seed=3 * seed + 1)
        text = torch.ones(size, 6) if conditions == "one for all" else draw(size, 6, seed=3 * seed + 2)
        found = assign_noise_softly(x, noise, text, start=weight)  # a row and its own noise alone are more than 0.01
        assert torch.equal(found.noise, assign_noise(x, noise) if conditions == "one for all" else noise)
        weight = found.weight
    x, noise, text = draw(64, 8), draw(64, 8, seed=1), draw(64, 6, seed=2)
    assert float(assign_noise_softly(x, noise, text, target=0.1, start=weight).share) == pytest.approx(0.1, abs=0.01)


def test_soft_assignment_is_the_optimum_of_its_cost():
    x, noise, text = draw(6, 4), draw(6, 4, seed=1), draw(6, 5, seed=2)
    found = assign_noise_softly(x, noise, text, target=0.3)
    apart = 1 - functional.cosine_similarity(text[:, None], text[None], dim=-1)
    cost = (x[:, None] - noise[None]).square().sum(-1) + found.weight * apart
    best = min(float(cost[range(6), list(p)].sum()) for p in permutations(range(6)))
    places = [next(j for j in range(6) if torch.equal(noise[j], row)) for row in found.noise]
    assert float(cost[range(6), places].sum()) == pytest.approx(best, rel=1e-6)


def test_a_small_share_keeps_noise_inside_its_condition_and_a_large_one_ignores_conditions():
    x, noise = draw(40, 6), draw(40, 6, seed=1)
    text = functional.one_hot(torch.arange(40) % 4, 4).float()
    blocks = assign_noise(x, noise, labels=torch.arange(40) % 4)
    inside = share(x, noise, text, 1e6)  # pairs of one condition alone
    assert torch.equal(assign_noise_softly(x, noise, text, target=inside, start=1e6).noise, blocks)
    assert torch.equal(assign_noise_softly(x, noise, text, target=1.0).noise, assign_noise(x, noise))


@pytest.mark.usefixtures("as_shipped")
def test_soft_arguments_that_do_not_fit():
    x, noise = draw(4, 5), draw(4, 5, seed=1)
    with pytest.raises(ValueError, match="conditions has 3 rows, x has 4"):
        assign_noise_softly(x, noise, draw(3, 2))
    with pytest.raises(ValueError, match="target is 0"):
        assign_noise_softly(x, noise, draw(4, 2), target=0.0)
    for bad in range(3):
        given = [x, noise, draw(4, 2)]
        given[bad] = given[bad].clone()
        given[bad][2] = torch.nan
        with pytest.raises(ValueError, match=rf"^{('x', 'noise', 'conditions')[bad]}\[2\] holds NaN"):
            assign_noise_softly(*given)
        with pytest.raises(ValueError, match=r"\[2\] holds NaN"):
            assign_noise_softly(*given, strength=0.75, generator=torch.Generator().manual_seed(1))


STOCHASTIC = [
    diffusers.DDPMScheduler(),
    diffusers.EulerAncestralDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    diffusers.LCMScheduler(),
    diffusers.FlowMatchLCMScheduler(),
    diffusers.LTXEulerAncestralRFScheduler(),
    diffusers.SASolverScheduler(),
    diffusers.UnCLIPScheduler(),
    diffusers.DDPMWuerstchenScheduler(),
    diffusers.CogVideoXDPMScheduler(),
    diffusers.KarrasVeScheduler(),
    diffusers.SCMScheduler(),
]
DETERMINISTIC = [
    diffusers.DDIMScheduler(),
    diffusers.EulerDiscreteScheduler(),
    diffusers.HeunDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(),
    diffusers.LTXEulerAncestralRFScheduler(eta=0.0),
]
ASSIGNED = {"noise": {"method": "assignment", "strength": 1.0}}


@pytest.mark.parametrize("scheduler", STOCHASTIC, ids=lambda s: type(s).__name__)
def test_stochastic_samplers_are_warned_of(scheduler: object):
    with pytest.warns(UserWarning, match="adds fresh noise"):
        assert warn_if_stochastic(scheduler, ASSIGNED)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduler", DETERMINISTIC, ids=lambda s: type(s).__name__)
def test_deterministic_samplers_are_not(scheduler: object):
    assert not warn_if_stochastic(scheduler, ASSIGNED)


@pytest.mark.filterwarnings("error")
def test_a_model_that_was_trained_on_independent_noise_may_be_sampled_by_any():
    assert not warn_if_stochastic(diffusers.DDPMScheduler(), {"noise": {"method": "vanilla"}})
    assert not warn_if_stochastic(diffusers.DDPMScheduler(), {})


def test_ddim_is_stochastic_with_eta_and_consistency_models_from_the_second_step():
    assert is_stochastic(diffusers.DDIMScheduler(), eta=0.5)
    assert is_stochastic(diffusers.CMStochasticIterativeScheduler(), steps=2)
    assert not is_stochastic(diffusers.CMStochasticIterativeScheduler(), steps=1)
    assert not is_stochastic(diffusers.FlowMatchLCMScheduler(), steps=1)


def test_soft_assignment_of_a_share_leaves_the_other_rows_as_they_were():
    g = torch.Generator().manual_seed(0)
    x, noise, text = torch.randn(20, 16, generator=g), torch.randn(20, 16, generator=g), torch.randn(20, 8, generator=g)
    found = assign_noise_softly(x, noise, text, target=0.5, strength=0.5, generator=torch.Generator().manual_seed(1))
    moved = (found.noise != noise).any(1)
    assert 2 <= int(moved.sum()) <= 10
    assert sorted(map(tuple, found.noise.tolist())) == sorted(map(tuple, noise.tolist()))
    assert torch.equal(assign_noise_softly(x, noise, text, strength=0.0).noise, noise)
    with pytest.raises(ValueError, match="strength is 2"):
        assign_noise_softly(x, noise, text, strength=2.0)


def test_a_coupling_told_of_conditions_prefers_like_ones():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(24, 64, generator=g), torch.randn(24, 64, generator=g)
    text = torch.randn(24, 16, generator=g)
    soft, free = Coupling()(x, noise, conditions=text), Coupling()(x, noise)
    unit = functional.normalize(text, dim=1)

    def likeness(met: torch.Tensor) -> float:
        return float((unit * unit[torch.cdist(met, noise).argmin(1)]).sum(1).mean())

    assert likeness(soft) > likeness(free) + 0.1
    assert not torch.equal(soft, noise)
    assert torch.equal(Coupling(condition="ignore")(x, noise, conditions=text), free)
    with pytest.raises(ValueError, match="need `conditions`"):
        Coupling(condition="soft")(x, noise)
