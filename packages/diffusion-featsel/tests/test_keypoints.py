"""PCK by hand in its four forms, and the predictions that need no features in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion_featsel.baselines import chance, disc_in_frame, random_positions, rescale, same_positions
from diffusion_featsel.keypoints import keypoint_scores
from diffusion_featsel.match import match_points
from diffusion_featsel.pairs import Pair, warped_pairs
from diffusion_featsel.warp import STRONG, AffineRange, random_affine, warp_points


def pair_of(num_points: int, category: str = "", box: tuple[float, float, float, float] | None = None) -> Pair:
    """Returns a pair of images of 100 x 80 pixels with points in the middle."""
    points = torch.stack([torch.linspace(20, 70, num_points), torch.linspace(30, 50, num_points)], 1)
    return Pair("a", "b", points, points, (100, 80), (100, 80), target_box=box, category=category)


def off_by(pair: Pair, distances: list[float]) -> Tensor:
    """Returns predictions that are off by these distances, each in another direction."""
    angle = torch.arange(len(distances)).double()
    step = torch.tensor(distances).double()[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return pair.target_points.double() + step


def test_the_border_counts() -> None:
    pair = pair_of(3, box=(10.0, 20.0, 60.0, 80.0))
    scores = keypoint_scores([pair], [off_by(pair, [5.0, 10.0, 10.1])])
    assert scores.share("image", "points", 0.1).value == pytest.approx(2 / 3)
    assert scores.share("image", "points", 0.05).value == pytest.approx(1 / 3)
    assert scores.share("image", "points", 0.15).value == 1.0
    scores = keypoint_scores([pair], [off_by(pair, [3.0, 6.0, 6.06])])
    assert scores.share("box", "points", 0.1).value == pytest.approx(2 / 3)


def test_points_and_pairs_are_two_means() -> None:
    pairs = [
        pair_of(1, "cat", (0.0, 0.0, 40.0, 40.0)),
        pair_of(9, "dog", (0.0, 0.0, 40.0, 40.0)),
        pair_of(2, "dog", (0.0, 0.0, 40.0, 40.0)),
    ]
    found = [off_by(pairs[0], [1.0]), off_by(pairs[1], [1.0] * 3 + [7.0] * 6), off_by(pairs[2], [1.0, 50.0])]
    scores = keypoint_scores(pairs, found)
    assert scores.share("image", "points").value == pytest.approx(11 / 12)
    assert scores.share("image", "pairs").value == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert scores.share("box", "points").value == pytest.approx(5 / 12)
    assert scores.share("box", "pairs").value == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    relative = scores.form("box", "points")
    assert relative.by_category["cat"][1] == 1.0
    assert relative.by_category["dog"][1] == pytest.approx(4 / 11)
    assert relative.category_mean[1].value == pytest.approx((1 + 4 / 11) / 2)
    assert scores.form("box", "pairs").by_category["dog"][1] == pytest.approx(5 / 12)
    assert (scores.num_pairs, scores.num_points) == (3, 12)


def test_what_does_not_count_is_counted() -> None:
    hidden = replace(pair_of(4), visible=torch.tensor([True, False, True, True]))
    outside = pair_of(3)
    target_points = outside.target_points.clone()
    target_points[0, 0] = 79.6
    outside = replace(outside, target_points=target_points)
    flat = pair_of(2, box=(30.0, 30.0, 30.0, 30.0))
    nothing = replace(pair_of(2), visible=torch.tensor([False, False]))
    pairs = [hidden, outside, flat, nothing]
    found = [pair.target_points.clone() for pair in pairs]
    found[0][1] = math.nan
    scores = keypoint_scores(pairs, found)
    assert (scores.num_pairs, scores.num_points) == (2, 5)
    assert (scores.num_invisible, scores.num_outside) == (3, 1)
    assert (scores.num_without_box, scores.num_without_points) == (1, 1)
    assert scores.share("box", "pairs").value == 1.0
    found[0][0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        keypoint_scores(pairs, found)


def test_the_box_of_the_counted_points_stands_in_for_a_missing_one() -> None:
    points = torch.tensor([[10.0, 20.0], [40.0, 60.0], [0.0, 0.0]])
    pair = Pair("a", "b", points, points, (100, 100), (100, 100), visible=torch.tensor([True, True, False]))
    assert pair.box == (40.0, 30.0)
    scores = keypoint_scores([pair], [off_by(pair, [4.0, 4.01, 0.0])])
    assert scores.share("box", "points").value == 0.5


def test_no_pair_at_all_has_no_share() -> None:
    assert math.isnan(keypoint_scores([], []).share().value)


def test_intervals_cover_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for repeat in range(40):
        pairs = [pair_of(2) for _ in range(40)]
        right = torch.rand(40, 2, generator=generator) < 0.6
        found = [off_by(pair, (30.0 * ~row).tolist()) for pair, row in zip(pairs, right, strict=True)]
        share = keypoint_scores(pairs, found, num_resamples=200, seed=repeat).share()
        covered += share.low <= 0.6 <= share.high
        assert share.low <= share.value <= share.high
    assert 33 <= covered <= 40


def test_intervals_do_not_change_from_run_to_run() -> None:
    pairs = [pair_of(2, str(i % 2)) for i in range(8)]
    found = [off_by(pair, [30.0 * (i % 3 == 0), 0.0]) for i, pair in enumerate(pairs)]
    share = keypoint_scores(pairs, found).form("image", "points")
    assert share.overall[1].low < share.overall[1].value < share.overall[1].high
    assert keypoint_scores(pairs, found).form("image", "points") == share


def test_wrong_predictions_are_refused() -> None:
    pair = pair_of(3)
    with pytest.raises(ValueError, match="give one for each"):
        keypoint_scores([pair], [])
    with pytest.raises(ValueError, match="for each of its points"):
        keypoint_scores([pair], [pair.target_points[:2]])
    with pytest.raises(ValueError, match="scores are for"):
        keypoint_scores([pair], [pair.target_points]).share(threshold=0.2)
    with pytest.raises(ValueError, match="give equal numbers"):
        replace(pair, source_points=pair.source_points[:2])


@pytest.mark.parametrize("radius", [1.3, 4.0, 7.5])
def test_the_area_of_a_cut_disc(radius: float) -> None:
    centres = torch.tensor([[0.0, 0.0], [6.0, 9.0], [1.0, 4.0], [5.0, 2.0], [3.0, 4.5]]).double()
    step = 0.05
    x, y = torch.arange(step / 2, 6, step).double(), torch.arange(step / 2, 9, step).double()
    distance = (x[None, :, None] - centres[:, 0]) ** 2 + (y[:, None, None] - centres[:, 1]) ** 2
    counted = (distance <= radius**2).double().sum((0, 1)) * step**2
    torch.testing.assert_close(disc_in_frame(centres, (9, 6), radius), counted, atol=0.1, rtol=0)


def portraits(num_images: int, limits: AffineRange, side: int = 64) -> list[Pair]:
    """Returns pairs of 13 points of aligned pictures, the target of each warped."""
    generator = torch.Generator().manual_seed(1)
    points = side / 2 + 0.2 * side * (torch.rand(num_images, 13, 2, generator=generator) - 0.5)
    affine = random_affine(num_images, generator, limits)
    names = [str(i) for i in range(num_images)]
    return warped_pairs(names, [f"{name}*" for name in names], points, affine, (side, side))


def test_the_same_position_under_shifts_has_a_closed_form() -> None:
    pairs = portraits(2000, AffineRange(0.0, (1.0, 1.0), 0.175))
    scores = keypoint_scores(pairs, same_positions(pairs), num_resamples=200)
    expected = math.pi * 0.1**2 / 0.35**2  # a shift within a square of side 0.35 that falls in the disc
    assert abs(scores.share("image", "pairs").value - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)


def test_the_same_position_is_right_where_the_warp_moves_little() -> None:
    pairs = portraits(200, STRONG)
    moved = torch.stack([(pair.target_points - pair.source_points).norm(dim=1) for pair in pairs])
    expected = (moved <= 6.4).double().mean()
    assert keypoint_scores(pairs, same_positions(pairs)).share().value == pytest.approx(float(expected))
    assert 0.05 < float(expected) < 0.6


def test_random_positions_and_white_features_are_at_chance() -> None:
    pairs = portraits(150, STRONG, side=32)
    counted = [int(pair.counted.sum()) for pair in pairs]
    expected = chance(pairs)
    noise = (expected * (1 - expected) / sum(counted)).sqrt()
    generator = torch.Generator().manual_seed(5)
    drawn = keypoint_scores(pairs, random_positions(pairs, generator))
    white, other = ({"a": torch.randn(150, 16, 32, 32, generator=generator)} for _ in range(2))
    points = torch.stack([pair.source_points for pair in pairs])
    matched = match_points(white, other, points, source_size=(32, 32), target_size=(32, 32)).points
    found = keypoint_scores(pairs, list(matched))
    for scores in (drawn, found):
        values = torch.tensor([interval.value for interval in scores.form("image", "points").overall]).double()
        assert bool(((values - expected).abs() < 4 * noise + 0.002).all()), (values, expected, noise)
    assert float(expected[1]) == pytest.approx(math.pi * 0.01, rel=0.02)


def test_warped_boxes_hold_their_corners() -> None:
    affine = random_affine(3, torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 12.0, 30.0, 28.0]]).expand(3, 4)
    corners = torch.tensor([[[10.0, 12.0], [30.0, 12.0], [30.0, 28.0], [10.0, 28.0]]]).expand(3, 4, 2)
    pairs = warped_pairs(list("abc"), list("def"), corners, affine, (40, 40), boxes=boxes)
    moved = warp_points(corners, affine, (40, 40))
    for pair, those in zip(pairs, moved, strict=True):
        expected = torch.cat([those.amin(0), those.amax(0)])
        torch.testing.assert_close(torch.tensor(pair.target_box), expected)
        assert pair.source_box == (10.0, 12.0, 30.0, 28.0)


def test_rescaling_keeps_the_place() -> None:
    points = torch.tensor([[-0.5, -0.5], [39.5, 19.5], [19.5, 9.5]])
    expected = torch.tensor([[-0.5, -0.5], [59.5, 99.5], [29.5, 49.5]])
    torch.testing.assert_close(rescale(points, (20, 40), (100, 60)), expected)
    only = rescale(points[2:], (20, 40), (100, 60), published=True)
    torch.testing.assert_close(only, points[2:] * torch.tensor([1.5, 5.0]))
