"""Steps to equal distance: crossings of curves, and factors over pairs of trainings."""

import pytest

from immiscible_noise.study.crossing import Crossing, crossing, speedup

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
