"""Precision, recall, density and coverage: generated features against balls around real ones, and the reverse.

The ball of a row reaches to its k-th nearest other row of the same set. Distances come from one matrix product per
chunk. As float32 loses several digits in it, radii are computed anew from the nearest candidates, and so is every pair
that rounding could put on the wrong side of a radius: the scores are those of exact distances.

Balls are closed for precision, recall and coverage. For density a row exactly on the surface counts only as far as a
ball holds fewer than k rows inside, so that a set compared with itself has density 1, whatever repeats in it.

References:
    Precision and recall: Kynkäänniemi et al. 2019, equation 1. Density and coverage: Naeem et al. 2020, equations 4, 6.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from diffcore.metrics.rows import RealAndFake
from diffcore.stats import in_one_precision, require_finite

_ROWS = 2048  # per chunk of the distance matrix
_PAIRS = 65_536  # per chunk of directly computed distances
_SPARE = 8  # candidates beyond k: rounding may reorder neighbours


class Scores(NamedTuple):
    """Shares in [0, 1]; density alone may exceed 1."""

    precision: Float64[Tensor, ""]
    recall: Float64[Tensor, ""]
    density: Float64[Tensor, ""]
    coverage: Float64[Tensor, ""]


class Membership(NamedTuple):
    """Membership of each row in the balls around rows of the other set.

    Attributes:
        realistic: Whether a fake lies in the ball of some real row.
        num_balls: In how many of the wider real balls a fake lies; a ball that has fewer than k fakes inside shares the
            rest of k among those on its surface.
        recalled: Whether a real row lies in the ball of some fake.
        covered: Whether the wider ball of a real row holds some fake.
    """

    realistic: Bool[Tensor, " m"]
    num_balls: Float64[Tensor, " m"]
    recalled: Bool[Tensor, " n"]
    covered: Bool[Tensor, " n"]


def precision_recall(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], *, k: int = 3, k_coverage: int = 5
) -> Scores:
    """Returns precision and density of the fakes, recall and coverage of the reals.

    Args:
        real: Features of real images.
        fake: Features of generated images.
        k: Neighbour that sets the radius for precision and recall.
        k_coverage: Neighbour that sets the radius for density and coverage.

    Raises:
        ValueError: As `membership`.
    """
    found = membership(real, fake, k=k, k_coverage=k_coverage)
    return Scores(
        found.realistic.double().mean(),
        found.recalled.double().mean(),
        found.num_balls.mean() / k_coverage,
        found.covered.double().mean(),
    )


def membership(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], *, k: int = 3, k_coverage: int = 5
) -> Membership:
    """Returns for each row whether it lies in balls of the other set; arguments as in `precision_recall`.

    Raises:
        ValueError: A set has no more rows than neighbours, or holds NaN or infinity.
    """
    for name, features in (("real", real), ("fake", fake)):
        require_finite(f"{name} features", features)
        if len(features) <= max(k, k_coverage):
            raise ValueError(f"{name} has {len(features)} rows; {max(k, k_coverage)} neighbours need more")
    # A common offset would eat the digits of the product.
    centre = real.double().mean(0)
    real, fake = ((features.double() - centre).to(features.dtype) for features in in_one_precision(real, fake))
    near, wide = squared_radii(real, (k, k_coverage))
    (fake_near,) = squared_radii(fake, (k,))

    realistic = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    balls = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    recalled, covered = [], []
    for start in range(0, len(real), _ROWS):
        rows = slice(start, start + _ROWS)
        squared = squared_distances(real[rows], fake)
        realistic |= _inside(real[rows], fake, squared, near[rows, None]).closed.any(0)
        recalled.append(_inside(real[rows], fake, squared, fake_near[None]).closed.any(1))
        in_wide = _inside(real[rows], fake, squared, wide[rows, None])
        balls += _filled(in_wide, k_coverage)
        covered.append(in_wide.closed.any(1))
    return Membership(realistic, balls, torch.cat(recalled), torch.cat(covered))


def squared_radii(x: Float[Tensor, "n d"], ks: tuple[int, ...]) -> list[Float64[Tensor, " n"]]:
    """Returns, for each k, every row's squared distance to its k-th nearest other row."""
    count = min(max(ks) + _SPARE, len(x) - 1)
    parts = []
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        squared = squared_distances(rows, x)
        own = torch.arange(len(rows), device=x.device)
        squared[own, own + start] = torch.inf  # by index: a duplicate is a neighbour, at distance 0
        approximate, candidates = squared.topk(count, largest=False)
        exact = _direct(rows, x, own.repeat_interleave(count), candidates.flatten())
        exact = exact.view(len(rows), count).sort(dim=1).values
        # A row whose farthest candidate is not clearly beyond its neighbours may have missed one.
        missed = exact[:, max(ks) - 1] > approximate[:, -1] - _rounding(rows, x).amax(1)
        for row in missed.nonzero().flatten().tolist() if count < len(x) - 1 else []:
            everyone = torch.arange(len(x), device=x.device)
            distances = _direct(rows, x, torch.full_like(everyone, row), everyone)
            distances[start + row] = torch.inf
            exact[row] = distances.sort().values[:count]
        parts.append(exact)
    nearest = torch.cat(parts)
    return [nearest[:, k - 1] for k in ks]


class PrecisionRecall(RealAndFake):
    """`precision_recall` of streamed features. Keeps them all; `compute` returns `Scores`.

    Args:
        k: Neighbour that sets the radius for precision and recall.
        k_coverage: Neighbour that sets the radius for density and coverage.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    def __init__(self, k: int = 3, k_coverage: int = 5, **options: Any) -> None:
        super().__init__(**options)
        if min(k, k_coverage) < 1:
            raise ValueError(f"`k` is {k}, `k_coverage` is {k_coverage}; both must be at least 1")
        self.k, self.k_coverage = k, k_coverage

    def compute(self) -> Scores:
        """Returns the four scores of all rows seen, over all processes."""
        return precision_recall(*self.both(), k=self.k, k_coverage=self.k_coverage)


def squared_distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Returns the squared distances of all pairs by one matrix product; small ones may come out below 0."""
    return torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1), x, y.T, alpha=-2)


def _rounding(x: Tensor, y: Tensor) -> Float[Tensor, "n m"]:
    """Bounds the error of `squared_distances`; rounding errors of a sum of d terms grow like sqrt(d)."""
    return 8 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * (x.square().sum(1)[:, None] + y.square().sum(1))


class _Inside(NamedTuple):
    """Which pairs lie within the radius, the surface included, and the places of those on the surface."""

    closed: Bool[Tensor, "n m"]
    surface: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]


def _inside(x: Tensor, y: Tensor, squared: Tensor, radii: Tensor) -> _Inside:
    """Compares distances with radii; pairs in doubt are decided on exact distances."""
    closed = squared <= radii
    i, j = ((squared - radii).abs() <= _rounding(x, y)).nonzero(as_tuple=True)
    distances, limits = _direct(x, y, i, j), radii.expand(len(x), len(y))[i, j]
    closed[i, j] = distances <= limits
    surface = distances == limits
    return _Inside(closed, (i[surface], j[surface]))


def _filled(inside: _Inside, k: int) -> Float64[Tensor, " m"]:
    """Returns for each column the number of rows' balls it counts in, those whose surface it is on by a share."""
    i, j = inside.surface
    counts = inside.closed.sum(0).double()
    on_surface = torch.bincount(i, minlength=len(inside.closed)).double()
    missing = k - (inside.closed.sum(1) - on_surface)
    share = (missing / on_surface.clamp(min=1)).clamp(0, 1)
    return counts.index_add(0, j, share[i] - 1)


def _direct(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Float64[Tensor, " pairs"]:
    """Returns the squared distances of the pairs (x[i], y[j]) from their differences, in float64."""
    parts = [
        (x[some_i].double() - y[some_j].double()).square().sum(1)
        for some_i, some_j in zip(i.split(_PAIRS), j.split(_PAIRS), strict=True)
    ]
    return torch.cat(parts)
