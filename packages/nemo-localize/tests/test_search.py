"""The search against the sequential algorithm, for random functions of seed and set: thousands of them."""

import importlib
import random
from collections.abc import Callable

from nemo_localize.search import Question, refine, select

page = importlib.import_module("nemo_localize.localize")
Score = Callable[[int, frozenset[int]], float]


def drive(search, score: Score, rounds: list[int] | None = None):
    """Answers a search's questions and returns what it found, with the questions; notes how many come at a time."""
    asked: list[Question] = []
    try:
        questions = next(search)
        while True:
            assert questions, "an empty list of questions would cost a round for nothing"
            asked += questions
            if rounds is not None:
                rounds.append(len(questions))
            questions = search.send([tuple(score(seed, q.ablated) for seed in q.seeds) for q in questions])
    except StopIteration as finished:
        return finished.value, asked


def random_score(rng: random.Random, numbers: int, seeds: int) -> Score:
    """A function of (seed, set), 1 where nothing is off: wild, or falling with the set, on a grid that makes ties."""
    wild, salt = rng.random(), rng.getrandbits(32)
    weights = [[rng.choice([0, 0, 1, 2, 5]) for _ in range(numbers)] for _ in range(seeds)]

    def score(seed: int, off: frozenset[int]) -> float:
        if not off:
            return 1.0
        if (hash((salt, seed, off)) % 1000) / 1000 < wild**2:
            return (hash((seed, off, salt)) % 11) / 10
        return max(10 - sum(weights[seed][number] for number in off), 0) / 10

    return score


def random_case(rng: random.Random):
    """Nested sets in layers, a few seeds, a threshold on the grid, and a score."""
    widths = [rng.randint(0, 4) for _ in range(rng.randint(1, 5))]
    starts = [sum(widths[:place]) for place in range(len(widths))]
    layers = [list(range(start, start + width)) for start, width in zip(starts, widths, strict=True)]
    numbers, seeds = sum(widths), rng.randint(2, 5)
    entry = [rng.randint(0, 8) for _ in range(numbers)]
    sets = [frozenset(n for n in range(numbers) if entry[n] <= index) for index in range(9)]
    return layers, sets, seeds, rng.randint(1, 8) / 10, random_score(rng, numbers, seeds)


def test_selection_is_the_sequential_one(plain):
    rng, suppressed = random.Random(0), 0
    for _ in range(1000):
        _, sets, seeds, tau, score = random_case(rng)
        worst = worst_of(score, seeds)
        expected = plain.select_plainly(sets, tau, worst)
        found, asked = drive(select(sets, range(seeds), tau, give_up_early=False), score)
        assert (found.index if found.reached else None) == expected
        assert found.scores == {seed: score(seed, sets[found.index]) for seed in range(seeds)}
        assert len({(q.ablated, s) for q in asked for s in q.seeds}) == sum(len(q.seeds) for q in asked)  # none twice
        index = page.select(sets, tau, worst)
        assert (index if worst(sets[index]) <= tau else None) == expected
        suppressed += found.reached
    assert 200 < suppressed < 950  # both outcomes were seen


def worst_of(score: Score, seeds: int) -> Callable[[frozenset[int]], float]:
    return lambda ablated: max(score(seed, ablated) for seed in range(seeds))


def test_giving_up_early_only_ever_gives_up(plain):
    rng, gave_up = random.Random(1), 0
    for _ in range(200):
        _, sets, seeds, tau, score = random_case(rng)
        expected = plain.select_plainly(sets, tau, lambda off: max(score(s, off) for s in range(seeds)))  # noqa: B023
        found, _ = drive(select(sets, range(seeds), tau), score)
        if found.reached:
            assert found.index == expected
        elif expected is not None:
            gave_up += 1
            assert max(score(seed, sets[-1]) for seed in range(seeds)) > tau
        index = page.select(sets, tau, worst_of(score, seeds), give_up_early=True)
        assert index in (found.index, len(sets) - 1)  # it looks at all seeds of the last set, the search at one first
    assert gave_up  # what the documentation warns of does happen


def test_refinement_is_the_sequential_one(plain):
    rng, removed = random.Random(2), 0
    for _ in range(1000):
        layers, sets, seeds, threshold, score = random_case(rng)
        start = sets[-1]
        if not start:
            continue
        scores = {seed: score(seed, start) for seed in range(seeds)}
        left = plain.refine_plainly(layers, threshold, worst_of(score, seeds))
        expected = page.together(left)
        found, _ = drive(refine(scores, layers[::-1], threshold), score)
        assert found.neurons == page.refine(layers, threshold, worst_of(score, seeds)) == expected
        assert found.scores == {seed: score(seed, expected) for seed in range(seeds)}
        assert found.neurons <= start
        removed += len(start) - len(found.neurons)
    assert removed > 333


def test_neurons_that_stand_twice_are_tested_as_published(plain):
    """Where the score is not below the threshold, a neuron that is listed twice stays untested."""
    rng, removed, kept = random.Random(4), 0, 0
    for _ in range(300):
        layers, sets, seeds, threshold, score = random_case(rng)
        start = sets[-1]
        if not start:
            continue
        layers = [[*layer, *rng.sample(layer, rng.randint(0, len(layer)))] for layer in layers]
        worst = worst_of(score, seeds)
        if rng.random() < 0.5:  # the published threshold of what never fell below tau: the score itself
            threshold = worst(start)
        expected = page.together(plain.refine_plainly(layers, threshold, worst))
        assert page.refine(layers, threshold, worst) == expected
        once = plain.refine_plainly([list(dict.fromkeys(layer)) for layer in layers], threshold, worst)
        kept += expected != page.together(once)
        removed += len(start) - len(expected)
    assert removed > 80
    assert kept > 3  # to list a neuron twice does make a difference


def test_the_last_question_is_about_what_is_left():
    rng = random.Random(3)
    for _ in range(100):
        layers, sets, seeds, threshold, score = random_case(rng)
        if not sets[-1]:
            continue
        scores = {seed: score(seed, sets[-1]) for seed in range(seeds)}

        found, asked = drive(refine(scores, layers[::-1], threshold, num_seeds=seeds, residual_threshold=0.5), score)
        last = [question for question in asked if question.among][-1]
        assert (last.ablated, last.seeds, last.threshold) == (found.neurons, tuple(range(seeds)), 0.5)
        assert found.residual == tuple(score(seed, found.neurons) for seed in range(seeds))


def test_one_seed_is_enough_to_keep_a_neuron():
    # Ten seeds, of which the ninth alone is stubborn: after it has been met once, it is asked first.
    def score(seed: int, off: frozenset[int]) -> float:
        return 0.1 if seed != 8 or off >= set(range(6)) else 0.9

    scores = dict.fromkeys(range(10), 0.1)
    found, asked = drive(refine(scores, [[n] for n in range(6)], 0.5), score)
    assert found.neurons == frozenset(range(6))
    assert sum(len(q.seeds) for q in asked) < 0.6 * (6 + 6) * 10


def test_refinement_asks_in_few_rounds():
    def score(seed: int, off: frozenset[int]) -> float:
        return 0.1 if 0 in off else 0.9

    rounds: list[int] = []
    layers = [list(range(8, 16)), list(range(8))]
    scores = dict.fromkeys(range(10), 0.1)
    found, _ = drive(refine(scores, layers, 0.5), score, rounds)
    assert found.neurons == {0}
    assert len(rounds) <= 5  # one by one it would be 2 + 8
