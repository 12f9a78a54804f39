"""The Fréchet distance between Gaussians fitted to features, in float64.

`|m1 - m2|² + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)`. The last trace is the sum of the square roots of the eigenvalues of
the symmetric `S1^(1/2) S2 S1^(1/2)`, or, with fewer rows than columns, the nuclear norm of the product of the centred
features, which needs no covariance at all.

The estimate is biased upwards by about `(d (d + 1) / 2 + 2 d) / n` for n rows on each side: compare it always with
`real_floor`, the distance between two halves of the real images.

References:
    Dowson and Landau 1982; Heusel et al. 2017; extrapolation to infinite n: Chong and Forsyth 2020.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torchmetrics import Metric

from diffcore.metrics.estimate import Estimate
from diffcore.stats import Covariance, RunningCovariance, covariance, require_finite


def frechet_distance(real: Covariance, fake: Covariance) -> Float64[Tensor, ""]:
    """Returns the squared Fréchet distance of two Gaussians; 0 or more.

    Raises:
        ValueError: A side has fewer than two rows, holds NaN or infinity, or is no covariance.
    """
    for name, side in (("real", real), ("fake", fake)):
        _check_side(name, side)
    return _combined(real, fake, _overlap(_root(real), fake))


def frechet_distance_from_features(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"]) -> Float64[Tensor, ""]:
    """Returns the distance of two sets of features, by the cheaper of both exact ways.

    Raises:
        ValueError: A side has fewer than two rows or holds NaN or infinity.
    """
    for name, features in (("real", real), ("fake", fake)):
        _check_features(name, features)
    if min(len(real), len(fake)) >= real.shape[1]:
        return frechet_distance(covariance(real), covariance(fake))
    return _by_nuclear_norm(real.double(), fake.double())


def real_floor(real: Float[Tensor, "n d"], size: int, *, repeats: int = 4, seed: int = 0) -> Estimate:
    """Returns the distance of `size` real rows from other real rows: what a perfect generator would score.

    Each repeat draws `size` rows and compares them with up to as many of the rest as there are. Where the set holds
    fewer than twice `size` rows, both sides have half of it; `n` of the result tells.
    """
    _check_features("real", real)
    size = min(size, len(real) // 2)
    if size < 2:
        raise ValueError(f"real has {len(real)} rows; a real-versus-real distance needs at least 4 and a size of 2")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(repeats):
        order = torch.randperm(len(real), generator=generator).to(real.device)
        distances.append(frechet_distance_from_features(real[order[size:]], real[order[:size]]))
    values = torch.stack(distances)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(repeats) if repeats > 1 else math.nan, size)


def extrapolate(
    real: Float[Tensor, "n d"] | Covariance, fake: Float[Tensor, "m d"], *, subsets: int = 3, seed: int = 0
) -> Estimate:
    """Returns the distance extrapolated to infinitely many fakes.

    Subsets of five sizes from m / 2 to m are compared with all reals; the intercept of a straight line in 1 / size
    remains. The bias of the finite real set stays in it.
    """
    if not isinstance(real, Covariance):
        _check_features("real", real)
    _check_features("fake", fake)
    if len(fake) < 10:
        raise ValueError(f"fake has {len(fake)} rows; extrapolation needs at least 10")
    generator = torch.Generator().manual_seed(seed)
    reference = real if isinstance(real, Covariance) else covariance(real)
    _check_side("real", reference)
    root = _root(reference)  # most of the work, and the same for all subsets
    inverse, distances = [], []
    for size in torch.linspace(len(fake) / 2, len(fake), 5).long().tolist():
        for _ in range(subsets):
            chosen = torch.randperm(len(fake), generator=generator)[:size].to(fake.device)
            inverse.append(1 / size)
            subset = covariance(fake[chosen])
            distances.append(_combined(reference, subset, _overlap(root, subset)))
    x, y = torch.tensor(inverse, dtype=torch.float64), torch.stack(distances).cpu()
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum()
    intercept = y.mean() - slope * x.mean()
    variance = (y - intercept - slope * x).square().sum() / (len(x) - 2)
    error = (variance * (1 / len(x) + x.mean().square() / centred.square().sum())).sqrt()
    return Estimate(float(intercept), float(error), len(fake))


class FrechetDistance(Metric):
    """The Fréchet distance of streamed features; adds up exactly over batches and processes.

    Args:
        num_features: Number of columns of the features.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    full_state_update = True

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(**options)
        self.real = RunningCovariance(num_features, **options)
        self.fake = RunningCovariance(num_features, **options)

    def update(self, features: Float[Tensor, "b d"], real: bool) -> None:
        """Adds features of real or of generated images.

        Raises:
            ValueError: Rows hold NaN or infinity; they are named.
        """
        side = self.real if real else self.fake
        require_finite("real features" if real else "fake features", features, int(side.num_rows))
        side.update(features)

    def compute(self) -> Float[Tensor, ""]:
        """Returns the distance; warns where a side has no more rows than columns."""
        real, fake = self.real.compute(), self.fake.compute()
        distance = frechet_distance(real, fake)
        rows, columns = int(min(real.num_rows, fake.num_rows)), real.mean.numel()
        if rows <= columns:
            warnings.warn(
                f"a Fréchet distance from {rows} rows of {columns} features is mostly bias; "
                "compare it with the real-versus-real distance at the same number of rows",
                stacklevel=2,
            )
        return distance

    def reset(self) -> None:
        """Forgets all features."""
        super().reset()
        self.real.reset()
        self.fake.reset()


def _root(side: Covariance) -> Tensor:
    """Returns a matrix R with R R^T the covariance; the distance does not depend on which."""
    values, vectors = torch.linalg.eigh(_symmetric(side))
    return vectors * _clamped("real", values).sqrt()


def _overlap(root: Tensor, fake: Covariance) -> Tensor:
    """Returns the trace of the root of the product of the covariances."""
    return _clamped("fake", torch.linalg.eigvalsh(root.T @ _symmetric(fake) @ root)).sqrt().sum()


def _symmetric(side: Covariance) -> Tensor:
    cov = torch.atleast_2d(side.cov).double()
    return (cov + cov.T) / 2


def _by_nuclear_norm(real: Tensor, fake: Tensor) -> Tensor:
    first, second = real - real.mean(0), fake - fake.mean(0)
    n, m = len(real) - 1, len(fake) - 1
    overlap = torch.linalg.svdvals(first @ second.T).sum() / math.sqrt(n * m)
    traces = first.square().sum() / n + second.square().sum() / m
    return ((real.mean(0) - fake.mean(0)).square().sum() + traces - 2 * overlap).clamp(min=0)


def _combined(real: Covariance, fake: Covariance, overlap: Tensor) -> Tensor:
    shift = torch.atleast_1d(real.mean - fake.mean).square().sum()
    traces = torch.atleast_2d(real.cov).trace() + torch.atleast_2d(fake.cov).trace()
    return (shift + traces - 2 * overlap).clamp(min=0)


def _clamped(name: str, eigenvalues: Tensor) -> Tensor:
    """Rounding leaves eigenvalues a little below 0; far below, the matrix is no covariance."""
    if bool(eigenvalues.min() < -1e-3 * eigenvalues.abs().sum()):
        raise ValueError(f"the {name} matrix has the eigenvalue {float(eigenvalues.min()):.3g}; it is no covariance")
    return eigenvalues.clamp(min=0)


def _check_side(name: str, side: Covariance) -> None:
    if side.num_rows < 2:
        raise ValueError(f"{name} has {int(side.num_rows)} rows; a Fréchet distance needs at least 2")
    if not bool(torch.isfinite(side.mean).all() & torch.isfinite(side.cov).all()):
        raise ValueError(f"the moments of {name} hold NaN or infinity")


def _check_features(name: str, features: Tensor) -> None:
    require_finite(f"{name} features", features)
    if len(features) < 2:
        raise ValueError(f"{name} has {len(features)} rows; a Fréchet distance needs at least 2")
