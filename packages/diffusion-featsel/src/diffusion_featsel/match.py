"""Exact nearest neighbours between images of any size, from feature maps at their native size.

A point of the source image is matched to the place p of a fine grid over the target image, mostly its pixels, where

    cos(p) = <d, F(p)> / (|d| |F(p)|)

is largest: d is the source feature at the point, F the target features interpolated to the grid. Interpolation commutes
with the inner product, so <d, F(p)> is one product at native size and the interpolation of a single number per place;
|F(p)|^2 follows from the inner products of neighbouring cells, see `interpolation.squared_norms`. No interpolated
feature is ever built. The feature of several activations is their concatenation: both terms are sums over them.

Positions are (x, y) in pixels, whole numbers are pixel centres; pixel x of an image of width W lies at
u = (x + 0.5) w / W - 0.5 of a map of width w.

References:
    Meng et al. 2024, section 4, evaluate with `protocol="paper"`; "window" matching: Zhang et al. 2024, "Telling Left
    from Right", section 4.2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_featsel.interpolation import centres, squared_norms, squared_norms_at_centres, values_at, weights_at

Centre = Mapping[str, Float[Tensor, " _"]] | Literal["pair"] | None
"""Per-channel means that are subtracted from each activation: given, those of each pair of images, or none."""
_CHUNK = 2**24  # cosines that are held at one time
_ZERO = 1e-10  # squared norm, as a share of the map's largest, below which a place has no direction
_PAPER_MIDDLE, _PAPER_GRID = 128, 512


@dataclass(frozen=True)
class MatchSettings:
    """How a point is matched.

    Attributes:
        matcher: Place of the largest cosine; or the expected place of a softmax over cosines, over the whole image
            ("soft") or over a square around the largest ("window").
        temperature: Cosines are divided by this before the softmax.
        window: Half the side of the square, as a share of the image's; 5 of 60 cells for untrained features, 7 for
            trained ones, in the published code.
        grid: Rows and columns of places that are compared; one per pixel of the target by default.
        protocol: "exact" takes source features at the exact point. "paper" resizes all maps to 128x128, then to
            512x512, rounds source points to pixels, and compares all 512x512 places.
    """

    matcher: Literal["argmax", "soft", "window"] = "argmax"
    temperature: float = 0.02
    window: float = 5 / 60
    grid: tuple[int, int] | None = None
    protocol: Literal["exact", "paper"] = "exact"

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}; give a number above 0")
        if not 0 <= self.window <= 1:
            raise ValueError(f"`window` is {self.window}; give a share of the side, from 0 to 1")
        if self.protocol == "paper" and self.grid not in (None, (_PAPER_GRID, _PAPER_GRID)):
            raise ValueError(f"`grid` is {self.grid}, and the paper's protocol has 512x512 places; leave it out")


@dataclass(frozen=True)
class Match:
    """Where points of the source images were found in the target images.

    Attributes:
        points: Positions (x, y) in pixels of the target image.
        similarity: Largest cosine of each point, from -1 to 1; 0 for features without a direction.
    """

    points: Float[Tensor, "b points 2"]
    similarity: Float[Tensor, "b points"]


def match_points(
    source: Mapping[str, Float[Tensor, "b _ _ _"]],
    target: Mapping[str, Float[Tensor, "b _ _ _"]],
    points: Float[Tensor, "b points 2"],
    *,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    settings: MatchSettings | None = None,
    weights: Mapping[str, float] | None = None,
    center: Centre = None,
) -> Match:
    """Finds the points of each source image in the target image of the same row.

    Args:
        source: Name of each activation to its maps (b, c, h, w) of the source images, at native size.
        target: The same activations of the target images; grids may differ from those of the source.
        points: Positions (x, y) in pixels of the source images.
        source_size: Height and width of the source images that `points` refer to.
        target_size: Height and width of the target images that the result refers to.
        settings: Matcher and protocol; the place of the largest cosine over the target's pixels by default.
        weights: Factor of each activation before they are concatenated; 1 where it is missing.
        center: Per-channel means to subtract from each activation, or "pair" for those of each pair of images.

    Raises:
        ValueError: The activations of both sides differ in names, rows or channels.

    Example:
        >>> import torch
        >>> maps = {"up-level1-repeat0-res-out": torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0))}
        >>> points = torch.tensor([[[3.5, 11.5], [20.0, 9.0]]])
        >>> match_points(maps, maps, points, source_size=(32, 32), target_size=(32, 32)).points.round().tolist()
        [[[4.0, 11.0], [20.0, 9.0]]]
    """
    settings = settings or MatchSettings()
    pair = FeaturePair.of(source, target, weights=weights, center=center)
    paper = settings.protocol == "paper"
    positions = _rounded(points, source_size) if paper else shares(points, source_size)
    descriptors = pair.descriptors(positions, paper=paper)
    grid = (_PAPER_GRID, _PAPER_GRID) if paper else settings.grid or target_size
    search = Search(pair.target, grid, paper=paper)
    found = [_matched(cosines, settings) for cosines in search.cosines(descriptors)]
    place, similarity = (torch.cat(part, 1) for part in zip(*found, strict=True))
    return Match(_in_pixels(place, grid, target_size, paper=paper).to(points.dtype), similarity)


def shares(points: Float[Tensor, "*batch 2"], size: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Returns positions (x, y) in pixels of an image of some height and width as shares of its sides.

    Example:
        >>> import torch
        >>> shares(torch.tensor([0.0, 1.5]), (4, 2)).tolist()
        [0.25, 0.5]
    """
    return (points.double() + 0.5) / torch.tensor([size[1], size[0]], dtype=torch.float64, device=points.device)


@dataclass(frozen=True)
class FeaturePair:
    """The features of source and target images, centred and scaled, as lists of maps in the same order.

    Attributes:
        source: Maps (b, c, h, w) of each activation of the source images.
        target: Maps of the same activations of the target images.
    """

    source: tuple[Float[Tensor, "b _ _ _"], ...]
    target: tuple[Float[Tensor, "b _ _ _"], ...]

    @classmethod
    def of(
        cls,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        *,
        weights: Mapping[str, float] | None = None,
        center: Centre = None,
    ) -> "FeaturePair":
        """Returns the pair; arguments and errors are those of `match_points`."""
        if not source or set(source) != set(target):
            raise ValueError(f"source has the activations {sorted(source)}, target {sorted(target)}; give the same")
        if unknown := set(weights or {}) - set(source):
            raise ValueError(f"`weights` names {sorted(unknown)}, which are not among the activations")
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name in source:
            maps = [
                side[name] if side[name].dtype == torch.float64 else side[name].float() for side in (source, target)
            ]
            if maps[0].shape[:2] != maps[1].shape[:2]:
                raise ValueError(
                    f"{name} has the shapes {[tuple(m.shape) for m in maps]}; give equal rows and channels"
                )
            mean = _mean(name, maps, center)
            factor = (weights or {}).get(name, 1.0)
            for side, values in zip(sides, maps, strict=True):
                centred = values if mean is None else values - mean
                side.append(centred if factor == 1 else centred * factor)
        return cls(tuple(sides[0]), tuple(sides[1]))

    def descriptors(self, positions: Float[Tensor, "b k 2"], *, paper: bool = False) -> Float[Tensor, "b k _"]:
        """Returns the source features at some positions, concatenated over activations, at length 1.

        Args:
            positions: Positions (x, y), as shares of width and height.
            paper: Whether maps are interpolated to 128x128 first.
        """
        at = _values_through if paper else values_at
        columns = [at(maps, positions) for maps in self.source]
        return torch.nn.functional.normalize(torch.cat(columns, 2), dim=2)


class Search:
    """Target features that points are compared with, at every place of a grid.

    Args:
        target: Maps (b, c, h, w) of each activation, at native size.
        grid: Number of rows and columns of places.
        paper: Whether maps are interpolated to 128x128 before the grid.
    """

    def __init__(
        self, target: tuple[Float[Tensor, "b _ _ _"], ...], grid: tuple[int, int], *, paper: bool = False
    ) -> None:
        self.target, self.grid, self.paper = target, grid, paper
        parts = [self._norms(maps) for maps in target]
        norms = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        known = norms > _ZERO * norms.amax((1, 2), keepdim=True)
        self.inverse_norms = torch.where(known, norms.rsqrt(), 0.0).to(target[0].dtype)
        self._resize = {
            size: tuple(self._weights(places, cells) for places, cells in zip(grid, size, strict=True))
            for size in {tuple(maps.shape[2:]) for maps in target}
        }

    def cosines(self, descriptors: Float[Tensor, "b k c"]) -> Iterator[Float[Tensor, "b _ gh gw"]]:
        """Yields the cosines of consecutive chunks of source features with every place of the grid.

        Args:
            descriptors: Source features of length 1, as `FeaturePair.descriptors` returns them.
        """
        for some in descriptors.split(max(_CHUNK // self.inverse_norms.numel(), 1), 1):
            native: dict[tuple[int, ...], Tensor] = {}
            start, size = 0, ()
            for maps in self.target:
                part = some[..., start : start + maps.shape[1]]
                start += maps.shape[1]
                products = (part @ maps.flatten(2)).unflatten(2, maps.shape[2:])
                size = tuple(maps.shape[2:])
                native[size] = native[size] + products if size in native else products
            (down, along), products = self._resize[size], native.pop(size)
            total = down @ (products @ along.transpose(0, 1))
            for size, products in native.items():
                down, along = self._resize[size]
                total += down @ (products @ along.transpose(0, 1))
            yield total.mul_(self.inverse_norms[:, None])

    def _weights(self, places: int, cells: int) -> Tensor:
        return _resizing(places, cells, paper=self.paper).to(self.target[0])

    def _norms(self, maps: Tensor) -> Tensor:
        if not self.paper:
            return squared_norms_at_centres(maps, self.grid)
        rows, columns = (centres(cells).to(maps.device) for cells in self.grid)
        # The norms at 512x512 come from neighbours at 128x128, whose channels are built some at a time.
        down, along = (_middle(cells, rows).to(maps.dtype) for cells in maps.shape[2:])
        each = max(_CHUNK // (len(maps) * _PAPER_MIDDLE**2), 1)
        parts = (down @ (part @ along.transpose(0, 1)) for part in maps.split(each, 1))
        return torch.stack([squared_norms(part, rows, columns) for part in parts]).sum(0)


@lru_cache(maxsize=64)
def _resizing(places: int, cells: int, *, paper: bool) -> Tensor:
    """Returns the weight of each cell of an axis at the centres of some places."""
    at = centres(places)
    return weights_at(at, _PAPER_MIDDLE) @ _middle(cells, at) if paper else weights_at(at, cells)


def _at_least_single(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()


def _mean(name: str, maps: list[Tensor], center: Centre) -> Tensor | None:
    if center is None:
        return None
    if isinstance(center, str):
        return ((maps[0].mean((2, 3)) + maps[1].mean((2, 3))) / 2)[:, :, None, None]
    if name not in center:
        raise ValueError(f"`center` has no means of {name}; give them, or 'pair'")
    return center[name].to(maps[0])[:, None, None]


def _middle(cells: int, like: Tensor) -> Tensor:
    return weights_at(centres(_PAPER_MIDDLE).to(like.device), cells)


def _rounded(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the centres of the pixels of 512x512 that the published code takes points to, as shares."""
    scale = torch.tensor([_PAPER_GRID / size[1], _PAPER_GRID / size[0]], dtype=torch.float64, device=points.device)
    pixels = (points.double() * scale).round().clamp(0, _PAPER_GRID - 1)
    return (pixels + 0.5) / _PAPER_GRID


def _values_through(maps: Tensor, positions: Tensor) -> Tensor:
    """Returns the columns (b, k, c) at some positions of maps that are interpolated to 128x128 first."""
    along, down = (
        (weights_at(positions[..., axis], _PAPER_MIDDLE) @ _middle(cells, positions)).to(maps.dtype)
        for axis, cells in ((0, maps.shape[3]), (1, maps.shape[2]))
    )
    rows = torch.einsum("bchw,bkw->bkch", maps, along)
    return torch.einsum("bkch,bkh->bkc", rows, down)


def _matched(cosines: Tensor, settings: MatchSettings) -> tuple[Tensor, Tensor]:
    """Returns the place (column, row) of each point on the grid, whole or between, and the largest cosine."""
    similarity, row, column = _largest(cosines)
    if settings.matcher == "argmax":
        return torch.stack([column, row], -1).double(), similarity
    logits = (cosines - similarity[..., None, None]) / settings.temperature
    height, width = cosines.shape[2:]
    rows, columns = (torch.arange(cells, device=cosines.device, dtype=cosines.dtype) for cells in (height, width))
    if settings.matcher == "window":
        far_rows = (rows - row[..., None]).abs() > settings.window * height
        far_columns = (columns - column[..., None]).abs() > settings.window * width
        logits = logits.masked_fill(far_rows[..., None] | far_columns[..., None, :], -torch.inf)
    mass = logits.exp()
    by_row, by_column = mass.sum(3).double(), mass.sum(2).double()
    total = by_row.sum(2)
    return torch.stack([by_column @ columns.double() / total, by_row @ rows.double() / total], -1), similarity


def largest(cosines: Float[Tensor, "b k gh gw"]) -> Int[Tensor, "b k"]:
    """Returns the first place of the largest value, counted row by row.

    Args:
        cosines: Values of each point at every place of a grid.

    Example:
        >>> largest(torch.tensor([[[[0.0, 0.5, 0.1], [0.2, 0.1, 0.9]]]])).tolist()
        [[5]]
    """
    _, row, column = _largest(cosines)
    return row * cosines.shape[3] + column


def _largest(cosines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Several times as fast on the CPU as `argmax` over all places.
    similarity, row = cosines.amax(3).max(2)
    in_row = cosines.gather(2, row[..., None, None].expand(-1, -1, 1, cosines.shape[3]))[:, :, 0]
    return similarity, row, in_row.argmax(2)


def _in_pixels(place: Tensor, grid: tuple[int, int], size: tuple[int, int], *, paper: bool) -> Tensor:
    scale = torch.tensor([size[1] / grid[1], size[0] / grid[0]], dtype=torch.float64, device=place.device)
    return place * scale if paper else (place + 0.5) * scale - 0.5
