"""Warped images and warped positions agree."""

import math

import pytest
import torch

from diffusion_featsel.warp import (
    MILD,
    STRONG,
    Affine,
    AffineRange,
    identity_affine,
    in_frame,
    random_affine,
    random_gain,
    unwarp_points,
    warp_images,
    warp_points,
)


def blob(points: torch.Tensor, size: tuple[int, int], width: float) -> torch.Tensor:
    """Returns one picture per position, a Gaussian bump around it."""
    y, x = torch.meshgrid(torch.arange(size[0]).double(), torch.arange(size[1]).double(), indexing="ij")
    distance = (x - points[:, 0, None, None]) ** 2 + (y - points[:, 1, None, None]) ** 2
    return (-distance / (2 * width**2)).exp()[:, None]


def centre_of_mass(images: torch.Tensor) -> torch.Tensor:
    """Returns the mean position (x, y) of each picture's mass."""
    height, width = images.shape[2:]
    mass = images.sum((1, 2, 3))
    x = (images.sum((1, 2)) * torch.arange(width).double()).sum(1) / mass
    y = (images.sum((1, 3)) * torch.arange(height).double()).sum(1) / mass
    return torch.stack([x, y], 1)


@pytest.mark.parametrize("size", [(96, 96), (80, 112)])
def test_points_go_where_the_picture_goes(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    affine = random_affine(20, generator, STRONG)
    middle = torch.tensor([size[1], size[0]]).double() / 2
    points = middle + 8 * (torch.rand(20, 2, dtype=torch.float64, generator=generator) - 0.5)
    warped = centre_of_mass(warp_images(blob(points, size, 2.5), affine, padding="zeros"))
    torch.testing.assert_close(warped, warp_points(points[:, None], affine, size)[:, 0], atol=0.02, rtol=0)


def test_a_whole_shift_moves_pixels_exactly() -> None:
    images = torch.rand(1, 3, 8, 16)
    affine = Affine(torch.eye(2).double()[None], torch.tensor([[2 / 16, -1 / 8]]).double())
    torch.testing.assert_close(warp_images(images, affine)[..., :7, 2:], images[..., 1:, :-2])
    labels = images.mul(5).round()
    assert torch.equal(warp_images(labels, affine, mode="nearest")[..., :7, 2:], labels[..., 1:, :-2])


def test_content_from_outside_is_mirrored() -> None:
    images = torch.rand(1, 1, 4, 8)
    affine = Affine(torch.eye(2).double()[None], torch.tensor([[2 / 8, 0.0]]).double())
    torch.testing.assert_close(warp_images(images, affine)[..., :2], images[..., :2].flip(-1))


def test_the_inverse_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    affine = random_affine(5, generator)
    points = 40 * torch.rand(5, 7, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(unwarp_points(warp_points(points, affine, (30, 40)), affine, (30, 40)), points)
    assert torch.equal(warp_points(points, identity_affine(5), (30, 40)), points)


@pytest.mark.parametrize("limits", [STRONG, MILD])
def test_warps_fill_their_range_and_do_not_depend_on_how_many_there_are(limits: AffineRange) -> None:
    affine = random_affine(2000, torch.Generator().manual_seed(0), limits)
    scale = affine.linear.det().sqrt()
    angle = torch.atan2(affine.linear[:, 1, 0], affine.linear[:, 0, 0])
    span = limits.scale[1] - limits.scale[0]
    assert float(scale.min()) >= limits.scale[0]
    assert float(scale.max()) <= limits.scale[1]
    assert float(scale.max() - scale.min()) > 0.98 * span
    assert 0.98 * limits.rotation < float(angle.abs().max()) <= limits.rotation
    assert 0.98 * limits.shift < float(affine.shift.abs().max()) <= limits.shift
    few = random_affine(7, torch.Generator().manual_seed(0), limits)
    assert torch.equal(few.linear, affine[:7].linear)


def test_gain_changes_channels_by_at_most_its_spread() -> None:
    images = torch.full((50, 3, 2, 2), 0.5)
    changed = random_gain(images, torch.Generator().manual_seed(0)) / 0.5
    assert float(changed.std((2, 3)).max()) < 1e-6
    assert 0.19 < float((changed - 1).abs().max()) <= 0.2 + 1e-6


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rising order"):
        AffineRange(0.1, (1.2, 0.8), 0.1)
    with pytest.raises(ValueError, match="give one for each"):
        warp_images(torch.rand(2, 3, 4, 4), identity_affine(3))
    assert not bool(in_frame(torch.tensor([math.nan, 1.0]), (4, 4)))
