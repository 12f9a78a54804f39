import itertools
import random
from copy import deepcopy

import pytest

from diffcore.digests import digest_of
from diffcore.errors import UserError
from nemo_localize.cover import lightest_cover
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.minimal_set import minimal_set, within_budget
from nemo_localize.neurons import NeuronSet
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.results import CaptionResult, Results
from nemo_localize.score import similarity
from nemo_localize.settings import StepSettings

FIRST, SECOND = "portrait of 1917 no 1", "some other thing 42"
SEEDS = StepSettings(num_seeds=4)
TAU = 0.8  # latents this small score high; with only innocent neurons off captions score 1


def brute_force(groups, demands, weights) -> float:
    items = sorted(set().union(*groups))
    choices = (set(c) for size in range(len(items) + 1) for c in itertools.combinations(items, size))
    met = (c for c in choices if all(len(g & c) >= d for g, d in zip(groups, demands, strict=True)))
    return min(sum(weights[item] for item in c) for c in met)


def test_the_cover_is_the_lightest_of_all_by_brute_force():
    rng = random.Random(0)
    for _ in range(150):
        groups = [set(rng.sample(range(8), rng.randint(1, 5))) for _ in range(rng.randint(1, 6))]
        demands = [rng.randint(0, len(group)) for group in groups]
        weights = {item: rng.choice((1.0, rng.uniform(0.1, 3))) for item in range(8)}
        found = lightest_cover(groups, demands, weights)
        assert found.exact
        assert all(len(g & found.items) >= d for g, d in zip(groups, demands, strict=True))
        assert sum(weights[i] for i in found.items) == pytest.approx(brute_force(groups, demands, weights))


def test_a_cover_without_time_to_search_is_greedy_and_says_so():
    # The greedy choice takes the item that serves three groups, and two more; two items serve all four.
    groups = [{0, 1}, {0, 1}, {0, 2}, {2}, {1}]
    weights = {0: 1.0, 1: 1.0, 2: 1.0}
    hasty = lightest_cover(groups, [1] * 5, weights, nodes=0)
    assert not hasty.exact
    assert all(group & hasty.items for group in groups)
    assert lightest_cover(groups, [1] * 5, weights).items == {1, 2}


def test_a_cover_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="group 0 demands 2"):
        lightest_cover([{1}], [2], {1: 1.0})
    with pytest.raises(ValueError, match="positive"):
        lightest_cover([{1}], [1], {1: 0.0})


@pytest.fixture(scope="module")
def step(leaky: Planted) -> FirstStep:
    return FirstStep(leaky.model, SEEDS)


@pytest.fixture(scope="module")
def results(leaky: Planted, step: FirstStep) -> Results:
    """As localisation would leave them, had it kept two innocent neurons that both captions share."""
    shared = NeuronSet.of({step.sites.sites[4].module: [1, 2]})
    kept = tuple(SEEDS.seeds)
    found = [
        CaptionResult(p, digest_of(p), "localized", kept_seeds=kept, refined=leaky.carriers(p).union(shared))
        for p in (FIRST, SECOND)
    ]
    return Results((*found, CaptionResult("never found", "x", "not_localized")))


@pytest.fixture(scope="module")
def ordinary() -> list[str]:
    return ordinary_captions(3, seed=9)


def test_the_common_set_is_what_is_needed_and_no_more(leaky: Planted, step: FirstStep, results: Results, ordinary):
    found = minimal_set(step, results, ordinary, tau=TAU, budget=1.0)
    needed = leaky.carriers(FIRST).union(leaky.carriers(SECOND))
    assert found.neurons == needed
    assert len(found.union.neurons) == 4
    assert found.chosen.num_closed == found.union.num_closed == 2
    assert found.left_out == ("never found",)
    assert found.rounds == 3  # one shared neuron, both, all of them; then what proves superfluous is switched on again
    # Scores are those of all captions with the set off together.
    cond = step.encode([FIRST])[0]
    off = step.sites.numbers(found.neurons)
    rows = [Row(0, seed, which) for which in (frozenset[int](), off) for seed in range(4)]
    before, after = step(cond, rows)[0].split(4)
    assert found.chosen.captions[0].score == pytest.approx(float(similarity(before, after).max()), abs=1e-5)
    assert found.chosen.damage <= found.union.damage + 1e-6
    table = found.rows()
    assert [row["set"] for row in table] == ["minimal", "union"]
    assert found.to_json()["neurons"] == needed.to_json()


def test_beyond_the_budget_captions_are_given_up_by_name(step: FirstStep, results: Results, ordinary):
    found = minimal_set(step, results, ordinary, tau=TAU, budget=1e-12)
    assert found.given_up == (FIRST,)  # ordinary captions feel its neuron more
    assert found.chosen.damage <= 1e-12 < found.union.damage
    assert all(row["closed"] != row["given_up"] for row in found.caption_rows())


def test_ordinary_captions_that_cannot_be_scored_are_no_proof_of_harmlessness(leaky: Planted, ordinary):
    broken = deepcopy(leaky.model.backbone)
    broken.conv_out.weight.data.fill_(float("nan"))
    step = FirstStep(leaky.model.with_modules("broken", {"unet": broken}), SEEDS)
    with pytest.raises(UserError, match=r"ordinary caption .* cannot be scored"):
        within_budget(step, ordinary)


def test_a_minimal_set_needs_something_to_choose_from(step: FirstStep, results: Results):
    with pytest.raises(UserError, match="no caption was localized"):
        minimal_set(step, Results(results.captions[2:]), ["a"], tau=TAU)
    with pytest.raises(UserError, match="ordinary"):
        minimal_set(step, results, [], tau=TAU)
