"""Spectra, places, self-correspondence and similarity, on maps for which the answers are known."""

import math

import pytest
import torch
from torch import Tensor

from diffcore.hooks import Site
from diffusion_featsel.activation import Activation
from diffusion_featsel.locality import LocalitySums
from diffusion_featsel.measured_filter import FilterSettings, measured_filter
from diffusion_featsel.moments import Moments
from diffusion_featsel.readout import places_of
from diffusion_featsel.self_match import SelfMatchSums
from diffusion_featsel.similarity import IMAGES, SIDE, Samples, cka_matrix
from diffusion_featsel.spectrum import SpectrumSums
from diffusion_featsel.views import Batch, Views, grouped
from diffusion_featsel.warp import MILD, random_affine, warp_images, warp_points


def views_of(
    draws: Tensor, moved: Tensor | None = None, points: Tensor | None = None, to: Tensor | None = None
) -> Views:
    n = draws.shape[1]
    g = torch.Generator().manual_seed(0)
    empty = torch.empty(n, 0, 2)
    batch = Batch(
        tuple(grouped(n)),
        torch.zeros(n, 4, *draws.shape[3:]),
        torch.zeros(2, n, 4, *draws.shape[3:]),
        empty if points is None else points,
        empty if to is None else to,
        torch.rand(n, 32, 2, generator=g),
    )
    return Views(batch, draws, moved, None)


def grating(cycles: float, grid: tuple[int, int], angle: float = 0.0) -> Tensor:
    y, x = torch.meshgrid(*(torch.arange(side) / side for side in grid), indexing="ij")
    return torch.cos(2 * math.pi * cycles * (x * math.cos(angle) + y * math.sin(angle)))


def granularity(draws: Tensor):
    sums = SpectrumSums.empty(tuple(draws.shape[3:]))
    sums.add(views_of(draws))
    return sums.granularity()


@pytest.mark.parametrize("grid", [(32, 32), (31, 33), (24, 48)])
@pytest.mark.parametrize("cycles", [4, 8])
def test_a_grating_has_its_own_frequency(grid: tuple[int, int], cycles: int) -> None:
    maps = grating(cycles, grid).expand(2, 8, 3, *grid).contiguous()
    assert granularity(maps).frequency == pytest.approx(cycles, rel=0.08)


def test_blur_lowers_the_frequency_and_noise_does_not_raise_it() -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(1, 16, 4, 32, 32, generator=g)
    blurred = torch.nn.functional.avg_pool2d(image.flatten(0, 1), 5, 1, 2)[None]
    noise = 0.3 * torch.randn(2, 16, 4, 32, 32, generator=g)
    sharp, soft, noisy = (granularity(part.expand(2, -1, -1, -1, -1) + 0 * noise) for part in (image, blurred, blurred))
    noisy = granularity(blurred.expand(2, -1, -1, -1, -1) + noise)
    assert soft.frequency < 0.7 * sharp.frequency
    assert noisy.frequency == pytest.approx(soft.frequency, rel=0.1)
    assert noisy.over_refinement > 1.3
    assert soft.over_refinement == pytest.approx(1, abs=1e-4)


def test_white_noise_is_flat_and_its_draws_share_nothing() -> None:
    maps = torch.randn(2, 32, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(*(torch.fft.fftfreq(32) * 32,) * 2, indexing="ij")
    flat = (x.square() + y.square()).sqrt()
    sums = SpectrumSums.empty((32, 32))
    sums.add(views_of(maps))
    assert abs(float(sums.cross.sum())) < 0.02 * float(sums.plain.sum())
    alone = granularity(maps[:1].expand(2, -1, -1, -1, -1).contiguous())
    assert alone.frequency == pytest.approx(float(flat.mean()), rel=0.02)
    beyond = float(((flat / 32) > 0.25).double().mean())
    assert alone.high_frequency == pytest.approx(beyond, rel=0.03)


def test_a_grid_too_small_for_frequencies_has_none() -> None:
    assert granularity(torch.randn(2, 8, 3, 3, 3)).frequency is None


def locality(draws: Tensor) -> float | None:
    sums = LocalitySums.empty()
    sums.add(views_of(draws))
    return sums.locality


def test_equal_images_have_no_places_that_disagree() -> None:
    """Every cell's most similar cell in an equal image is itself, so neighbors always disagree, and all pairs count."""
    g = torch.Generator().manual_seed(0)
    same = torch.randn(1, 1, 32, 12, 12, generator=g).expand(2, 16, -1, -1, -1).contiguous()
    sums = LocalitySums.empty()
    sums.add(views_of(same))
    assert float(sums.near[1]) == 8 * 32
    assert locality(torch.randn(2, 16, 32, 1, 1)) is None


def test_smooth_maps_are_local_and_white_ones_are_not() -> None:
    g = torch.Generator().manual_seed(0)
    white = torch.randn(2, 16, 32, 12, 12, generator=g)
    smooth = torch.nn.functional.avg_pool2d(white.flatten(0, 1), 5, 1, 2).unflatten(0, (2, 16))
    assert locality(smooth) > 0.5
    assert abs(locality(white)) < 0.05


def moved_pair(channels: int, grid: tuple[int, int], n: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns smooth textures, their moved copies, and points with where they went, as shares of the sides."""
    g = torch.Generator().manual_seed(0)
    texture = torch.nn.functional.avg_pool2d(torch.randn(n, channels, *grid, generator=g), 3, 1, 1)
    affine = random_affine(n, g, MILD)
    sides = torch.tensor([grid[1], grid[0]])
    points = torch.rand(n, 12, 2, generator=g) * sides - 0.5
    to = warp_points(points, affine, grid)
    inside = ((to > -0.5) & (to < sides - 0.5)).all(2, keepdim=True)
    to = torch.where(inside, to, torch.nan)
    return texture, warp_images(texture, affine), (points + 0.5) / sides, (to + 0.5) / sides


def matches(texture: Tensor, moved: Tensor, points: Tensor, to: Tensor) -> SelfMatchSums:
    sums = SelfMatchSums.empty()
    sums.add(views_of(torch.stack([texture] * 2), moved, points, to))
    return sums


def test_points_are_found_in_moved_textures() -> None:
    texture, moved, points, to = moved_pair(32, (16, 24))
    sums = matches(texture, moved, points, to)
    assert sums.share > 0.95
    assert float(sums.count) == float((~to.isnan().any(-1)).sum()) < to[..., 0].numel()


def test_independent_noise_finds_points_by_chance_and_coordinates_only_under_small_moves() -> None:
    _, _, points, to = moved_pair(32, (16, 16), 48)
    noise = torch.randn(2, 48, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    chance = math.pi * 0.1**2
    assert matches(noise[0], noise[1], points, to).share < 2.5 * chance
    where = places_of((16, 16), 48, torch.device("cpu"))[0]
    shifted = ((points + torch.tensor([0.3, 0.0])) % 1).clone()
    assert matches(where, where, points, shifted).share < 0.05


def test_without_moved_maps_there_is_nothing_to_search() -> None:
    with pytest.raises(ValueError, match="no `moved` maps"):
        SelfMatchSums.empty().add(views_of(torch.randn(2, 8, 4, 4, 4)))


def test_cka_is_unbiased_and_sees_through_rotations() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=g)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q
    wide = torch.randn(256, 1280, generator=g), torch.randn(256, 1280, generator=g)
    found = cka_matrix([x, 5 * x @ rotation + 3, *wide, torch.zeros(256, 4)])
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-4)
    assert abs(float(found[2, 3])) < 0.05  # the biased estimate says 0.83
    assert found[0, 4].isnan()


def test_cka_is_the_definition_on_many_samples() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 5, generator=g)
    y = x @ torch.randn(5, 7, generator=g) + torch.randn(2000, 7, generator=g)
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x.T @ y).square().sum() / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt()
    assert float(cka_matrix([x, y])[0, 1]) == pytest.approx(float(expected), abs=0.01)


def test_samples_are_those_of_the_first_images() -> None:
    draws = torch.randn(2, 24, 3, 8, 8)
    sums = Samples.empty(3)
    sums.add(views_of(draws))
    expected = (
        torch.nn.functional.adaptive_avg_pool2d(draws.mean(0), SIDE)[:IMAGES].flatten(2).transpose(1, 2).flatten(0, 1)
    )
    torch.testing.assert_close(sums.values, expected)


def test_moments_and_massive_channels() -> None:
    draws = torch.randn(2, 16, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    draws[:, :, 3] = 50 + draws[:, :, 3]
    sums = Moments.empty(8)
    sums.add(views_of(draws))
    by_channel = draws.transpose(0, 2).flatten(1)
    torch.testing.assert_close(sums.mean.float(), by_channel.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.std.float(), by_channel.std(1, correction=0), rtol=1e-3, atol=1e-3)
    assert sums.rms == pytest.approx(float(draws.square().mean().sqrt()), rel=1e-5)
    assert sums.massive == pytest.approx(50 / math.sqrt(2 / math.pi), rel=0.05)
    assert sums.finite
    draws[0, 0, 0, 0, 0] = torch.inf
    sums.add(views_of(draws))
    assert not sums.finite


def activation(
    name: str, *, kind: str = "res-out", grid: tuple[int, int] | None = (16, 16), same_as: str | None = None
):
    return Activation(name, Site(name), kind, "up", channels=8, grid=grid, same_as=same_as)


def test_every_drop_of_the_measured_filter_has_its_number() -> None:
    rows = [
        activation("text", kind="cross-k", grid=None),
        activation("map", kind="map"),
        activation("first"),
        activation("alias", same_as="first"),
        activation("constant"),
        activation("coarse", grid=(8, 8)),
        activation("noisy"),
        activation("twin"),
        activation("other"),
    ]
    reliability = {a.name: 0.9 for a in rows} | {"constant": None, "noisy": 0.31}
    similarity = torch.eye(len(rows))
    similarity[7, 2] = similarity[2, 7] = 0.999
    found = measured_filter(rows, reliability, similarity, image_side=512)
    assert found.kept == ("first", "other")
    assert dict(found.dropped) == {
        "text": "it has no places of an image",
        "map": "it is an attention map",
        "alias": "it is the same tensor as first",
        "constant": "it is constant",
        "coarse": "its 8x8 grid is at most 8 cells",
        "noisy": "reliability 0.31 is below 0.5",
        "twin": "CKA 0.9990 with first is above 0.995",
    }
    similarity[4] = similarity[:, 4] = torch.nan
    settings = FilterSettings(keep=("noi*", "con*", "text"))
    kept = measured_filter(rows, reliability, similarity, image_side=512, settings=settings).kept
    assert kept == ("first", "constant", "noisy", "other")


def test_locality_is_what_neighbors_have_beyond_distant_cells() -> None:
    near, far = torch.tensor([6.0, 10.0]), torch.tensor([2.0, 10.0])
    assert LocalitySums(near.double(), far.double()).locality == pytest.approx((0.6 - 0.2) / (1 - 0.2))


def test_cka_of_few_independent_samples_is_zero_on_average() -> None:
    g = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [float(cka_matrix([torch.randn(12, 40, generator=g) for _ in range(2)])[0, 1]) for _ in range(400)]
    )
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20
