"""Correspondence of points and of all cells, there and back."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_featsel.correspond import correspond, match_pairs
from diffusion_featsel.keypoints import keypoint_scores
from diffusion_featsel.match import MatchSettings
from diffusion_featsel.pairs import Pair

_KERNEL = torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(7))


def features(images: Tensor) -> dict[str, Tensor]:
    """Returns responses to random filters at two sizes."""
    fine = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="circular"), _KERNEL)
    return {"coarse": F.avg_pool2d(fine, 4), "fine": F.avg_pool2d(fine, 2)}


def image(height: int = 32, width: int = 32) -> Tensor:
    """Returns two random pictures."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_a_known_shift_is_found_both_ways() -> None:
    source = image()
    target = source.roll((8, -4), (2, 3))
    points = torch.tensor([[10.5, 10.5], [20.5, 5.5]]).expand(2, 2, 2)
    found = correspond(features, source, target, points, mutual=True)
    assert bool(((found.matched - points - torch.tensor([-4.0, 8.0])).abs() <= 1).all())
    assert found.coverage == 1.0
    assert correspond(features, source, target, points).mutual is None
    dense = correspond(features, source, target)
    assert dense.grid == (16, 16)
    expected = (dense.points + torch.tensor([-4.0, 8.0])) % 32
    interior = ((dense.points > 8) & (dense.points < 22)).all(-1)
    assert torch.equal(dense.matched[interior], expected[interior])
    assert dense.coverage > 0.9


def brute(source: Mapping[str, Tensor], target: Mapping[str, Tensor], grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns the whole matrix of cosines between all cells."""
    sides = [
        F.normalize(
            torch.cat([F.interpolate(m, size=grid, mode="bilinear") for m in side.values()], 1).flatten(2), dim=1
        )
        for side, grid in zip((source, target), grids, strict=True)
    ]
    return sides[0].transpose(1, 2) @ sides[1]


def test_all_cells_equal_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = image(32, 48), image(24, 16)
    cosines = brute(features(source), features(target), ((16, 24), (12, 8)))
    monkeypatch.setattr("diffusion_featsel.match._CHUNK", 96 * 2 * 5)  # five source cells at one time
    found = correspond(features, source, target, top=3)
    best = cosines.topk(3, 2)
    assert found.nearest_similarity is not None
    assert found.nearest is not None
    assert found.back is not None
    torch.testing.assert_close(found.nearest_similarity, best.values, atol=1e-5, rtol=0)
    assert (found.grid, found.target_grid) == ((16, 24), (12, 8))
    expected = torch.stack([best.indices % 8 * 2 + 0.5, best.indices // 8 * 2 + 0.5], -1)
    torch.testing.assert_close(found.nearest, expected)
    back = cosines.argmax(1)
    torch.testing.assert_close(found.back, torch.stack([back % 24 * 2 + 0.5, back // 24 * 2 + 0.5], -1))
    forth = cosines.argmax(2)
    returned = back.gather(1, forth)
    assert found.mutual is not None
    assert torch.equal(found.mutual, returned == torch.arange(16 * 24))
    assert found.cycle_error is not None
    torch.testing.assert_close(found.cycle_error == 0, found.mutual)
    assert 0 < found.coverage < 1


def test_the_mirrored_target_is_chosen_where_it_fits_better() -> None:
    source = image()
    target = source.clone()
    target[1] = source[1].flip(2)

    def mirrored_features(images: Tensor) -> dict[str, Tensor]:
        return {"fine": F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), _KERNEL)}

    points = torch.tensor([[7.0, 9.0], [20.0, 15.0], [12.0, 25.0]]).expand(2, 3, 2)
    found = correspond(mirrored_features, source, target, points, flip=True, mutual=True)
    assert found.flipped is not None
    assert found.flipped.tolist() == [False, True]
    torch.testing.assert_close(found.matched[0], points[0])
    torch.testing.assert_close(found.matched[1], torch.stack([31 - points[1, :, 0], points[1, :, 1]], -1))
    assert found.coverage == 1.0
    dense = correspond(mirrored_features, source, target, flip=True)
    assert dense.back is not None
    assert dense.nearest is not None
    flipped = torch.stack([31 - dense.points[1, :, 0], dense.points[1, :, 1]], -1)
    torch.testing.assert_close(dense.matched[1], flipped)
    torch.testing.assert_close(dense.nearest[1, :, 0], flipped)
    torch.testing.assert_close(dense.back[1], flipped)


def test_pairs_of_any_size_are_matched_in_their_own_pixels() -> None:
    pictures = {name: torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    pictures["b"] = pictures["a"].roll((4, 8), (1, 2))

    def named(names: list[str]) -> dict[str, Tensor]:
        return features(torch.stack([pictures[name] for name in names]))

    frame = torch.tensor([[6.5, 10.5], [18.5, 20.5], [10.5, 14.5]])
    moved = frame + torch.tensor([8.0, 4.0])
    pairs = []
    for number in (3, 2):
        source_points = (frame[:number] + 0.5) * torch.tensor([100 / 32, 60 / 32]) - 0.5
        target_points = (moved[:number] + 0.5) * torch.tensor([50 / 32, 80 / 32]) - 0.5
        pairs.append(Pair("a", "b", source_points, target_points, (60, 100), (80, 50)))
    for settings in (MatchSettings(), MatchSettings(protocol="paper"), MatchSettings("window")):
        found = match_pairs(pairs, named, (32, 32), settings=settings, batch_size=2)
        assert [len(points) for points in found] == [3, 2]
        assert keypoint_scores(pairs, found).share(threshold=0.05).value == 1.0
