"""Which place of one image belongs to which of another: for some points, or for all, there and back again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_featsel.baselines import rescale
from diffusion_featsel.interpolation import centres
from diffusion_featsel.match import Centre, FeaturePair, MatchSettings, Search, match_points
from diffusion_featsel.pairs import Pair

Features = Callable[[Float[Tensor, "b c h w"]], Mapping[str, Tensor]]
"""Function of images to their activations: name to maps (b, c, h, w)."""


@dataclass(frozen=True)
class Matches:
    """Places of the source images with the places of the target images that they were matched to.

    All positions are (x, y) in pixels of the images; whole numbers are pixel centres.

    Attributes:
        points: Places of the source images: the given points, or the centres of all cells, row by row.
        matched: Place in the target image that each was matched to.
        similarity: Largest cosine of each place, from -1 to 1.
        returned: Place in the source image that the matched place is matched to in turn; None where not asked for.
        cycle_error: Distance between a place and where it returns to, in pixels.
        mutual: Whether a place returns: to within the tolerance, or for all cells to the very same cell.
        flipped: Whether the mirrored target image was more similar to the source, and gave the matches.
        grid: Rows and columns of the source's cells, where all cells were matched.
        target_grid: Rows and columns of the target's cells, where all cells were matched.
        nearest: Centres of the most similar target cells of each cell, best first, where all cells were matched.
        nearest_similarity: Cosines of these cells.
        back: Place in the source image of each cell of the target image, where all cells were matched.
    """

    points: Float[Tensor, "b points 2"]
    matched: Float[Tensor, "b points 2"]
    similarity: Float[Tensor, "b points"]
    returned: Float[Tensor, "b points 2"] | None = None
    cycle_error: Float[Tensor, "b points"] | None = None
    mutual: Bool[Tensor, "b points"] | None = None
    flipped: Bool[Tensor, " b"] | None = None
    grid: tuple[int, int] | None = None
    target_grid: tuple[int, int] | None = None
    nearest: Float[Tensor, "b points k 2"] | None = None
    nearest_similarity: Float[Tensor, "b points k"] | None = None
    back: Float[Tensor, "b cells 2"] | None = None

    @property
    def coverage(self) -> float:
        """Share of places that are mutual; NaN where returning was not asked for."""
        return float("nan") if self.mutual is None else float(self.mutual.double().mean())


def correspond(
    features: Features,
    source: Float[Tensor, "b 3 _ _"],
    target: Float[Tensor, "b 3 _ _"],
    points: Float[Tensor, "b points 2"] | None = None,
    *,
    matcher: Literal["argmax", "soft", "window"] = "argmax",
    mutual: bool = False,
    flip: bool = False,
    tolerance: float | None = None,
    weights: Mapping[str, float] | None = None,
    center: Centre = None,
    top: int = 4,
) -> Matches:
    """Matches points, or all cells, of the source images to the target images of the same rows.

    Args:
        features: Function of images to their activations.
        source: Images whose points or cells are matched.
        target: Target images; their size may differ from the source's.
        points: Positions (x, y) in pixels of the source images; None for all cells of the finest activation.
        matcher: How points are matched, see `MatchSettings`; cells are matched to the most similar cell.
        mutual: Whether points are matched back, too; cells always are.
        flip: Whether the mirrored target is tried as well; the one with the larger mean similarity is kept, per pair.
        tolerance: Distance in pixels within which a point returns; by default the size of the finest activation's cell.
        weights: Factor of each activation before they are concatenated; 1 where it is missing.
        center: Per-channel means to subtract from each activation, or "pair" for those of each pair of images.
        top: Number of most similar target cells that are kept for each cell.

    Example:
        >>> import torch
        >>> def features(images):
        ...     return {"pixels": torch.nn.functional.avg_pool2d(images, 2)}
        >>> image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> matches = correspond(features, image, image)
        >>> matches.grid, matches.coverage
        ((8, 8), 1.0)
    """
    sizes = _size(source), _size(target)
    settings = MatchSettings(matcher)
    ours = features(source)

    def one(theirs: Mapping[str, Tensor]) -> Matches:
        if points is None:
            return _all_cells(FeaturePair.of(ours, theirs, weights=weights, center=center), sizes, top)
        found = match_points(
            ours,
            theirs,
            points,
            source_size=sizes[0],
            target_size=sizes[1],
            settings=settings,
            weights=weights,
            center=center,
        )
        matches = Matches(points, found.points, found.similarity)
        if not mutual:
            return matches
        back = match_points(
            theirs,
            ours,
            found.points,
            source_size=sizes[1],
            target_size=sizes[0],
            settings=settings,
            weights=weights,
            center=center,
        )
        error = (back.points - points).norm(dim=2)
        near = error <= (_cell(ours, sizes[0]) if tolerance is None else tolerance)
        return replace(matches, returned=back.points, cycle_error=error, mutual=near)

    plain = one(features(target))
    if not flip:
        return plain
    mirrored = _unmirrored(one(features(target.flip(3))), sizes[1])
    better = mirrored.similarity.mean(1) > plain.similarity.mean(1)
    return _chosen(better, mirrored, plain)


def match_pairs(
    pairs: Sequence[Pair],
    features: Callable[[list[str]], Mapping[str, Tensor]],
    size: tuple[int, int],
    *,
    settings: MatchSettings | None = None,
    weights: Mapping[str, float] | None = None,
    center: Centre = None,
    batch_size: int = 16,
) -> list[Float[Tensor, "_ 2"]]:
    """Predicts the key points of each pair, in pixels of the original target image, for `keypoint_scores`.

    Args:
        pairs: Pairs of images with key points in pixels of the original images.
        features: Function of names of images to their activations: name to maps (b, c, h, w).
        size: Height and width that images of any shape had when their features were computed.
        settings: Matcher and protocol; the largest cosine over all pixels by default.
        weights: Factor of each activation before they are concatenated; 1 where it is missing.
        center: Per-channel means to subtract from each activation, or "pair" for those of each pair of images.
        batch_size: Number of pairs that are matched together.

    Example:
        >>> import torch
        >>> maps = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> points = torch.tensor([[9.5, 17.5]])
        >>> pair = Pair("a.png", "b.png", points, points, (32, 32), (64, 64))
        >>> match_pairs([pair], lambda names: {"res-out": maps}, (8, 8))[0].tolist()
        [[19.5, 35.5]]
    """
    settings = settings or MatchSettings()
    published = settings.protocol == "paper"
    found: list[Tensor] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        ours, theirs = features([pair.source for pair in batch]), features([pair.target for pair in batch])
        points = [rescale(pair.source_points, pair.source_size, size, published=published) for pair in batch]
        padded = torch.nn.utils.rnn.pad_sequence(points, batch_first=True).to(next(iter(ours.values())).device)
        matched = match_points(
            ours,
            theirs,
            padded,
            source_size=size,
            target_size=size,
            settings=settings,
            weights=weights,
            center=center,
        ).points.cpu()
        for pair, some in zip(batch, matched, strict=True):
            found.append(rescale(some[: len(pair.source_points)], size, pair.target_size, published=published))
    return found


def _all_cells(pair: FeaturePair, sizes: tuple[tuple[int, int], tuple[int, int]], top: int) -> Matches:
    """Matches every cell of the finest grid both ways, with some rows of the matrix of cosines at one time."""
    grids = [_finest(side) for side in (pair.source, pair.target)]
    device, number = pair.source[0].device, len(pair.source[0])
    places = [_cell_shares(grid).to(device) for grid in grids]
    positions = [_pixels(place, size) for place, size in zip(places, sizes, strict=True)]
    descriptors = pair.descriptors(places[0].expand(number, -1, -1))
    search = Search(pair.target, grids[1])
    num_cells = len(places[1])
    best_back = torch.full((number, num_cells), -torch.inf, device=device, dtype=descriptors.dtype)
    back = torch.zeros(number, num_cells, dtype=torch.long, device=device)
    nearest, similarities, start = [], [], 0
    for part in search.cosines(descriptors):
        cosines = part.flatten(2)
        values, indices = cosines.topk(min(top, num_cells), dim=2)
        nearest.append(indices)
        similarities.append(values)
        value, row = cosines.max(1)
        back = torch.where(value > best_back, row + start, back)
        best_back = torch.maximum(value, best_back)
        start += cosines.shape[1]
    index, similarity = torch.cat(nearest, 1), torch.cat(similarities, 1)
    returned = back.gather(1, index[..., 0])
    points = positions[0].expand(number, -1, -1)
    home = positions[0][returned]
    return Matches(
        points,
        positions[1][index[..., 0]],
        similarity[..., 0],
        returned=home,
        cycle_error=(home - points).norm(dim=2),
        mutual=returned == torch.arange(len(places[0]), device=device),
        grid=grids[0],
        target_grid=grids[1],
        nearest=positions[1][index],
        nearest_similarity=similarity,
        back=positions[0][back],
    )


def _finest(side: Sequence[Tensor]) -> tuple[int, int]:
    return max((_size(maps) for maps in side), key=lambda grid: grid[0] * grid[1])


def _cell_shares(grid: tuple[int, ...]) -> Tensor:
    y, x = torch.meshgrid(centres(grid[0]), centres(grid[1]), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _pixels(places: Tensor, size: tuple[int, int]) -> Tensor:
    sides = torch.tensor([size[1], size[0]], dtype=torch.float64, device=places.device)
    return (places * sides - 0.5).float()


def _cell(features: Mapping[str, Tensor], size: tuple[int, int]) -> float:
    """Returns the longer side of a cell of the finest activation, in pixels."""
    return min(max(size[0] / maps.shape[2], size[1] / maps.shape[3]) for maps in features.values())


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def _unmirrored(matches: Matches, size: tuple[int, int]) -> Matches:
    """Returns matches to mirrored images as matches to the images themselves."""

    def mirrored(places: Tensor) -> Tensor:
        return torch.stack([size[1] - 1 - places[..., 0], places[..., 1]], -1)

    nearest, back = matches.nearest, matches.back
    if back is not None and matches.target_grid is not None:
        # The cells of the mirrored image, in the order of the image's own.
        back = back.unflatten(1, matches.target_grid).flip(2).flatten(1, 2)
    return replace(
        matches,
        matched=mirrored(matches.matched),
        nearest=None if nearest is None else mirrored(nearest),
        back=back,
    )


def _chosen(better: Tensor, mirrored: Matches, plain: Matches) -> Matches:
    def one(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(better.view(-1, *[1] * (a.ndim - 1)), a, b)

    names = ("matched", "similarity", "returned", "cycle_error", "mutual", "nearest", "nearest_similarity", "back")
    parts = {name: one(getattr(mirrored, name), getattr(plain, name)) for name in names}
    return replace(plain, flipped=better, **parts)
