"""Steps to equal distance: crossings of curves, and factors over pairs of trainings."""

import pytest

from immiscible_noise.study.compare import Comparison
from immiscible_noise.study.crossing import Crossing, crossing, speedup
from immiscible_noise.study.evaluate import Score

STEPS = [100, 200, 400, 800]


def test_a_falling_curve_is_crossed_once_on_the_line_between_logarithms():
    assert crossing(STEPS, [16.0, 8.0, 4.0, 2.0], 5.656854249492381) == Crossing(282.842712, 282.842712)


def test_a_curve_that_rises_again_is_crossed_for_good_later():
    found = crossing(STEPS, [8.0, 4.0, 8.0, 2.0], 4.0)
    assert found == Crossing(200.0, 565.685425)


def test_a_curve_that_ends_above_is_crossed_at_first_only():
    assert crossing(STEPS, [8.0, 2.0, 4.0, 8.0], 4.0) == Crossing(141.421356, None)


def test_a_goal_that_is_never_or_always_reached():
    assert crossing(STEPS, [8.0, 7.0, 6.0, 5.0], 4.0) == Crossing(None, None)
    assert crossing(STEPS, [4.0, 3.0, 3.0, 2.0], 4.0) == Crossing(100.0, 100.0)


def test_factors_are_averaged_as_logarithms_over_pairs_of_equal_seeds():
    found = speedup([(800.0, 400.0), (800.0, 100.0)])
    assert (found.mean, found.least, found.most) == pytest.approx((4.0, 2.0, 8.0))


def test_a_pair_that_does_not_arrive_leaves_no_mean():
    found = speedup([(800.0, 400.0), (800.0, None)])
    assert (found.mean, found.reached, found.pairs) == (None, 1, 2)
    assert speedup([(800.0, None)]).mean is None


def study(curves: dict[tuple[str, int], list[float]]) -> Comparison:
    """Returns a study with these distances at STEPS, by coupling and seed."""
    scores = [
        Score(coupling, seed, step, step, 5, 0.0, frechet, None)
        for (coupling, seed), distances in curves.items()
        for step, frechet in zip(STEPS, distances, strict=True)
    ]
    return Comparison(scores, "features", 1.0, 10, [])


def test_a_study_compares_pairs_of_equal_seeds_at_vanillas_last_distance():
    found = study(
        {
            ("vanilla", 0): [16.0, 8.0, 4.0, 2.0],
            ("assignment", 0): [2.0, 1.0, 4.0, 1.0],  # there at 100, again above it at 400, for good between
            ("vanilla", 1): [64.0, 32.0, 16.0, 8.0],
            ("assignment", 1): [16.0, 8.0, 4.0, 2.0],  # there at 200
        }
    )
    (row,) = found.speedup_table()
    assert (row["coupling"], row["sampling_steps"], row["seeds"]) == ("assignment", 5, 2)
    at_first = row["fewer_steps_at_first"], row["at_first_least"], row["at_first_most"]
    assert at_first == pytest.approx((32**0.5, 4.0, 8.0))
    for_good = row["fewer_steps_for_good"], row["for_good_least"], row["for_good_most"]
    assert for_good == pytest.approx(((4 * 2**0.5) ** 0.5, 2**0.5, 4.0))
    (words,) = found.speedup_rows()
    assert words["fewer_steps_at_first"] == "5.7 (4 to 8)"
    assert found.summary()["times_fewer_training_steps_to_equal_distance"] == {
        "assignment, 5 steps": "at first 5.7 (4 to 8), for good 2.4 (1.4 to 4)"
    }


def test_a_study_tells_which_seeds_never_come_to_vanillas_distance():
    found = study({("vanilla", 0): [16.0, 8.0, 4.0, 2.0], ("assignment", 0): [8.0, 6.0, 5.0, 4.0]})
    (row,) = found.speedup_table()
    assert (row["fewer_steps_for_good"], row["for_good_reached"], row["seeds"]) == (None, 0, 1)
    assert found.speedup_rows()[0]["fewer_steps_for_good"] == "not reached by 1 of 1"
