"""The exact matcher equals brute force, and finds what is known."""

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_featsel.app.bench_reference import match_by_brute_force
from diffusion_featsel.interpolation import centres
from diffusion_featsel.match import FeaturePair, MatchSettings, Search, match_points, shares

CASES = {
    "one activation": ([(6, 8, 8)], [(6, 8, 8)], (32, 32), (32, 32)),
    "factors that are not whole": ([(6, 5, 7)], [(6, 5, 7)], (33, 41), (29, 30)),
    "several activations": (
        [(6, 4, 4), (3, 8, 8), (5, 16, 16)],
        [(6, 4, 4), (3, 8, 8), (5, 16, 16)],
        (50, 50),
        (40, 40),
    ),
    "two of the same size": ([(6, 4, 4), (3, 4, 4)], [(6, 4, 4), (3, 4, 4)], (20, 20), (20, 20)),
    "images that are not square": ([(6, 4, 8), (2, 8, 16)], [(6, 8, 4), (2, 16, 8)], (32, 64), (64, 32)),
    "one cell": ([(3, 1, 1), (4, 2, 1)], [(3, 1, 1), (4, 2, 1)], (9, 9), (9, 9)),
    "grid coarser than the map": ([(4, 16, 16)], [(4, 16, 16)], (16, 16), (7, 5)),
}


def maps_of(shapes: list[tuple[int, int, int]], seed: int, rows: int = 3) -> dict[str, Tensor]:
    """Returns random maps with unlike lengths of their columns."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"a{i}": torch.randn(rows, *shape, dtype=torch.float64, generator=generator)
        * (1 + 3 * torch.rand(rows, 1, *shape[1:], dtype=torch.float64, generator=generator))
        for i, shape in enumerate(shapes)
    }


def points_in(size: tuple[int, int], num: int, rows: int = 3) -> Tensor:
    """Returns positions all over the image, the corners and borders among them."""
    height, width = size
    points = torch.rand(rows, num, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    points = points * torch.tensor([width, height]) - 0.5
    points[:, 0] = torch.tensor([-0.5, -0.5])
    points[:, 1] = torch.tensor([width - 0.5, height - 0.5])
    return points


def cosines_of(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], points: Tensor, *sizes: tuple[int, int]
) -> Tensor:
    """Returns all cosines of the fast matcher."""
    pair = FeaturePair.of(source, target, weights={"a0": 0.7})
    return torch.cat(list(Search(pair.target, sizes[1]).cosines(pair.descriptors(shares(points, sizes[0])))), 1)


@pytest.mark.parametrize("case", CASES)
def test_it_equals_brute_force(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source_shapes, target_shapes, source_size, target_size = CASES[case]
    source, target, points = maps_of(source_shapes, 0), maps_of(target_shapes, 1), points_in(source_size, 11)
    matched = partial(match_points, source_size=source_size, target_size=target_size, weights={"a0": 0.7})
    _, cosines = match_by_brute_force(
        source, target, points, source_size=source_size, target_size=target_size, weights={"a0": 0.7}
    )
    torch.testing.assert_close(
        cosines_of(source, target, points, source_size, target_size), cosines, atol=1e-12, rtol=0
    )
    single, other = ({name: maps.float() for name, maps in side.items()} for side in (source, target))
    torch.testing.assert_close(
        cosines_of(single, other, points.float(), source_size, target_size), cosines.float(), atol=1e-6, rtol=0
    )
    found = matched(source, target, points)
    torch.testing.assert_close(found.similarity, cosines.amax((2, 3)), atol=1e-12, rtol=0)
    # Places beyond the outermost centres are equally similar, so that the first of them may be another.
    column, row = found.points.long().unbind(2)
    there = cosines.flatten(2).gather(2, (row * target_size[1] + column)[..., None])[..., 0]
    torch.testing.assert_close(there, cosines.amax((2, 3)), atol=1e-12, rtol=0)
    monkeypatch.setattr("diffusion_featsel.match._CHUNK", 1)
    monkeypatch.setattr("diffusion_featsel.interpolation._CHUNK", 1)
    chunked = matched(source, target, points)
    torch.testing.assert_close(chunked.similarity, found.similarity, atol=1e-12, rtol=0)


def test_the_papers_protocol_resizes_twice_and_rounds() -> None:
    source, target = maps_of([(4, 8, 8), (3, 16, 16)], 0, 2), maps_of([(4, 8, 8), (3, 16, 16)], 1, 2)
    size = (300, 200)
    points = points_in(size, 9, 2)
    small, large = [
        torch.cat([F.interpolate(m, size=(128, 128), mode="bilinear") for m in side.values()], 1)
        for side in (source, target)
    ]
    up_source, up_target = (F.interpolate(m, size=(512, 512), mode="bilinear") for m in (small, large))
    pixels = (points * torch.tensor([512 / 200, 512 / 300])).round().clamp(0, 511).long()
    columns = torch.stack([up_source[i][:, pixels[i, :, 1], pixels[i, :, 0]] for i in range(2)])
    cosines = F.normalize(columns, dim=1).transpose(1, 2) @ F.normalize(up_target, dim=1).flatten(2)
    best = cosines.argmax(2)
    expected = torch.stack([best % 512 * (200 / 512), best // 512 * (300 / 512)], -1).double()
    found = match_points(
        source, target, points, source_size=size, target_size=size, settings=MatchSettings(protocol="paper")
    )
    torch.testing.assert_close(found.points, expected)
    torch.testing.assert_close(found.similarity, cosines.amax(2), atol=1e-12, rtol=0)


def test_soft_and_window_are_expected_places() -> None:
    source, target = maps_of([(4, 6, 6)], 0), maps_of([(4, 6, 6)], 1)
    size = (24, 36)
    points = points_in(size, 5)
    _, cosines = match_by_brute_force(source, target, points, source_size=size, target_size=size)
    rows, columns = torch.meshgrid(torch.arange(24.0).double(), torch.arange(36.0).double(), indexing="ij")
    for matcher in ("soft", "window"):
        settings = MatchSettings(matcher, temperature=0.05, window=0.1)
        found = match_points(source, target, points, source_size=size, target_size=size, settings=settings)
        kept = cosines.clone()
        if matcher == "window":
            column, row = match_points(source, target, points, source_size=size, target_size=size).points.unbind(2)
            far = ((rows - row[..., None, None]).abs() > 2.4) | ((columns - column[..., None, None]).abs() > 3.6)
            kept[far] = -torch.inf
        mass = (kept / 0.05).flatten(2).softmax(2).view_as(kept)
        expected = torch.stack([(mass * columns).sum((2, 3)), (mass * rows).sum((2, 3))], -1)
        torch.testing.assert_close(found.points, expected)


def test_a_coarser_grid_gives_the_centres_of_its_cells() -> None:
    source = maps_of([(64, 8, 8)], 0)
    points = (centres(8).float() * 64 - 0.5).expand(3, 2, 8).transpose(1, 2).double()
    found = match_points(
        source, source, points, source_size=(64, 64), target_size=(64, 64), settings=MatchSettings(grid=(8, 8))
    )
    torch.testing.assert_close(found.points, points)


def test_a_known_shift_is_found_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    texture = torch.randn(1, 3, 32, 32, generator=generator)
    kernel = torch.randn(24, 3, 5, 5, generator=generator)
    dy, dx = 5, -9

    def features(images: Tensor) -> dict[str, Tensor]:
        return {"conv": F.conv2d(F.pad(images, (2, 2, 2, 2), mode="circular"), kernel)}

    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    points = torch.stack([x, y], -1).view(1, -1, 2)
    found = match_points(
        features(texture),
        features(texture.roll((dy, dx), (2, 3))),
        points,
        source_size=(32, 32),
        target_size=(32, 32),
    )
    assert torch.equal(found.points, (points + torch.tensor([dx, dy])) % 32)


def test_centring_takes_away_what_all_places_share() -> None:
    source, target = maps_of([(8, 8, 8)], 0), maps_of([(8, 8, 8)], 0)
    points, matched = points_in((32, 32), 6), partial(match_points, source_size=(32, 32), target_size=(32, 32))
    constant = torch.linspace(-50, 50, 8).double()
    first, second = ({"a0": side["a0"] + constant[:, None, None]} for side in (source, target))
    plain = matched(source, target, points, center="pair")
    torch.testing.assert_close(matched(first, second, points, center="pair").similarity, plain.similarity)
    exact = matched(source, target, points)
    torch.testing.assert_close(matched(first, second, points, center={"a0": constant}).points, exact.points)
    assert float(matched(first, second, points).similarity.min()) > 0.98


def test_cells_without_direction_have_cosine_zero() -> None:
    maps = maps_of([(4, 4, 4)], 0)
    maps["a0"][:, :, :2] = 0
    points = torch.tensor([[[1.0, 0.5]]]).double().expand(3, 1, 2)
    matched = partial(match_points, source_size=(8, 8), target_size=(8, 8))
    assert torch.equal(matched(maps, maps, points).similarity, torch.zeros(3, 1).double())
    some = points + torch.tensor([0.0, 6.0])
    cosines = cosines_of(maps, maps, some, (8, 8), (8, 8))
    assert bool(cosines.isfinite().all())
    assert torch.equal(cosines[:, :, :3], torch.zeros_like(cosines[:, :, :3]))


def test_half_precision_is_compared_in_single() -> None:
    maps = {name: values.half() for name, values in maps_of([(8, 8, 8)], 0).items()}
    points = points_in((32, 32), 4).float()
    found = match_points(maps, maps, points, source_size=(32, 32), target_size=(32, 32))
    assert found.similarity.dtype == torch.float32
    assert float(found.similarity.min()) > 0.999 - 0.05


def test_what_does_not_fit_together_is_refused() -> None:
    one, two = maps_of([(4, 4, 4)], 0), maps_of([(5, 4, 4)], 0)
    points, matched = points_in((8, 8), 2), partial(match_points, source_size=(8, 8), target_size=(8, 8))
    with pytest.raises(ValueError, match="give the same"):
        matched(one, {"other": one["a0"]}, points)
    with pytest.raises(ValueError, match="equal rows and channels"):
        matched(one, two, points)
    with pytest.raises(ValueError, match="not among the activations"):
        matched(one, one, points, weights={"b": 1.0})
    with pytest.raises(ValueError, match="no means of a0"):
        matched(one, one, points, center={})
    with pytest.raises(ValueError, match="`temperature`"):
        MatchSettings(temperature=0.0)
    with pytest.raises(ValueError, match="`window`"):
        MatchSettings(window=-1.0)
    with pytest.raises(ValueError, match="`grid`"):
        MatchSettings(protocol="paper", grid=(8, 8))
