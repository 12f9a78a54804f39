"""The search against the sequential algorithm, for random functions of seed and set: thousands of them."""

import random
from collections.abc import Callable

import pytest

from nemo_localize.batched import Question, Selection, refine, select

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
            questions = search.send([tuple(score(seed, q.off) for seed in q.seeds) for q in questions])
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


@pytest.mark.parametrize(("together", "cases"), [(False, 1000), (True, 200)])
def test_selection_is_the_sequential_one(plain, together, cases):
    rng, suppressed = random.Random(0), 0
    for _ in range(cases):
        _, sets, seeds, tau, score = random_case(rng)
        expected = plain.select_plainly(sets, tau, lambda off: max(score(s, off) for s in range(seeds)))  # noqa: B023
        found, asked = drive(select(sets, range(seeds), tau, together=together, give_up_early=False), score)
        assert (found.index if found.reached else None) == expected
        assert found.scores == {seed: score(seed, sets[found.index]) for seed in range(seeds)}
        assert len({(q.off, s) for q in asked for s in q.seeds}) == sum(len(q.seeds) for q in asked)  # nothing twice
        suppressed += found.reached
    assert 0.2 * cases < suppressed < 0.95 * cases  # both outcomes were seen


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
    assert gave_up  # what the documentation warns of does happen


@pytest.mark.parametrize(("together", "cases"), [(False, 1000), (True, 200)])
def test_refinement_is_the_sequential_one(plain, together, cases):
    rng, removed = random.Random(2), 0
    for _ in range(cases):
        layers, sets, seeds, threshold, score = random_case(rng)
        start = sets[-1]
        if not start:
            continue
        scores = {seed: score(seed, start) for seed in range(seeds)}
        left = plain.refine_plainly(layers, threshold, lambda off: max(score(s, off) for s in range(seeds)))  # noqa: B023
        expected = frozenset(number for layer in left for number in layer)
        found, _ = drive(refine(Selection(8, True, scores), layers[::-1], threshold, together=together), score)
        assert found.neurons == expected
        assert found.scores == {seed: score(seed, expected) for seed in range(seeds)}
        assert found.neurons <= start
        removed += len(start) - len(found.neurons)
    assert removed > cases / 3


@pytest.mark.parametrize("reached", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_neurons_that_stand_twice_are_tested_as_published(plain, together, reached):
    """Where the score is not below the threshold, a neuron that is listed twice stays untested."""
    rng, removed, kept = random.Random(4), 0, 0
    for _ in range(150):
        layers, sets, seeds, threshold, score = random_case(rng)
        start = sets[-1]
        if not start:
            continue
        layers = [[*layer, *rng.sample(layer, rng.randint(0, len(layer)))] for layer in layers]
        scores = {seed: score(seed, start) for seed in range(seeds)}
        if not reached:  # the published threshold of what never fell below tau: the score itself
            threshold = max(scores.values())

        def worst(off: frozenset[int], score: Score = score, seeds: int = seeds) -> float:
            return max(score(seed, off) for seed in range(seeds))

        left = plain.refine_plainly(layers, threshold, worst)
        expected = frozenset(number for layer in left for number in layer)
        found, _ = drive(refine(Selection(8, reached, scores), layers[::-1], threshold, together=together), score)
        assert found.neurons == expected
        once = plain.refine_plainly([list(dict.fromkeys(layer)) for layer in layers], threshold, worst)
        kept += found.neurons != frozenset(number for layer in once for number in layer)
        removed += len(start) - len(found.neurons)
    assert removed > 40
    assert kept > 3  # to list a neuron twice does make a difference


@pytest.mark.parametrize("together", [False, True])
def test_a_relative_threshold_asks_what_changes(plain, together):
    rng, removed, emptied = random.Random(5), 0, 0
    for _ in range(200):
        layers, sets, seeds, _, score = random_case(rng)
        start, share = sets[-1], rng.choice([0.05, 0.3, 1.5])
        if not start:
            continue
        whole = {seed: score(seed, start) for seed in range(seeds)}

        def change(off: frozenset[int], score: Score = score, whole: dict[int, float] = whole) -> float:
            return max(abs(score(seed, off) - level) / (level + 1e-9) for seed, level in whole.items())

        left = plain.refine_plainly(layers, share, change)
        expected = frozenset(number for layer in left for number in layer)
        search = refine(Selection(8, True, whole), layers[::-1], 0.5, relative=share, together=together)
        found, asked = drive(search, score)
        assert found.neurons == expected
        assert found.scores == {seed: score(seed, expected) for seed in range(seeds)}
        assert all(question.off and question.alone != together for question in asked)
        removed += len(start) - len(expected)
        emptied += not expected
    assert removed > 150
    assert emptied > 3


def test_the_last_question_is_about_what_is_left():
    rng = random.Random(3)
    for _ in range(100):
        layers, sets, seeds, threshold, score = random_case(rng)
        if not sets[-1]:
            continue
        scores = {seed: score(seed, sets[-1]) for seed in range(seeds)}

        def last(off: frozenset[int]) -> Question:
            return Question(off, (7,), 0.5, among=True)

        found, _ = drive(refine(Selection(8, True, scores), layers[::-1], threshold, last=last), answered(score))
        assert found.residual == (len(found.neurons),)


def answered(score: Score) -> Score:
    return lambda seed, off: float(len(off)) if seed == 7 else score(seed, off)


def test_one_seed_is_enough_to_keep_a_neuron():
    # Ten seeds, of which the ninth alone is stubborn: after it has been met once, it is asked first.
    def score(seed: int, off: frozenset[int]) -> float:
        return 0.1 if seed != 8 or off >= set(range(6)) else 0.9

    selection = Selection(0, True, {seed: 0.1 for seed in range(10)})
    found, asked = drive(refine(selection, [[n] for n in range(6)], 0.5), score)
    assert found.neurons == frozenset(range(6))
    assert sum(len(q.seeds) for q in asked) < 0.6 * (6 + 6) * 10


def test_refinement_asks_in_few_rounds():
    def score(seed: int, off: frozenset[int]) -> float:
        return 0.1 if 0 in off else 0.9

    rounds: list[int] = []
    layers = [list(range(8, 16)), list(range(8))]
    selection = Selection(0, True, dict.fromkeys(range(10), 0.1))
    found, _ = drive(refine(selection, layers, 0.5), score, rounds)
    assert found.neurons == {0}
    assert len(rounds) <= 5  # one by one it would be 2 + 8
