"""The standard error of a Fréchet distance, from the influence of each row on it.

The distance is a smooth function of the weights of its rows; its derivatives by them, the influences, have the variance
of the distance up to first order. They cost as much as the distance itself, where a bootstrap would cost it hundreds of
times. The error says nothing about the bias, for which there are `real_floor` and `extrapolate`.

References:
    Infinitesimal jackknife: Efron 1982, section 6. The derivative of the last trace by the covariance S2 is
    `S1^(1/2) (S1^(1/2) S2 S1^(1/2))^(-1/2) S1^(1/2) / 2`, the optimal transport map of the Gaussians halved.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.metrics.estimate import Estimate
from diffcore.metrics.frechet import frechet_distance, frechet_distance_from_features
from diffcore.stats import Covariance, covariance


def frechet_estimate(real: Float[Tensor, "n d"] | Covariance, fake: Float[Tensor, "m d"]) -> Estimate:
    """Returns the Fréchet distance with its standard error.

    Args:
        real: Features of real images, or their moments alone: then the error is that of the fakes.
        fake: Features of generated images.

    Raises:
        ValueError: As `frechet_distance`.
    """
    if isinstance(real, Covariance):
        fake = fake.double()
        value = frechet_distance(real, covariance(fake))
        return Estimate(float(value), math.sqrt(_variance(_influence(real, fake))), len(fake))
    value = frechet_distance_from_features(real, fake)
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) >= real.shape[1]:
        influences = (_influence(covariance(fake), real), _influence(covariance(real), fake))
    else:
        influences = _influences_by_rows(real, fake)
    return Estimate(float(value), math.sqrt(sum(map(_variance, influences))), min(len(real), len(fake)))


def _variance(influence: Tensor) -> float:
    return float(influence.var()) / len(influence)


def _influence(other: Covariance, rows: Tensor) -> Float64[Tensor, " n"]:
    """Returns the influence of each row on the distance of its set to a Gaussian."""
    own = covariance(rows)
    values, vectors = torch.linalg.eigh((other.cov + other.cov.T) / 2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner, basis = torch.linalg.eigh(root @ own.cov @ root)
    kept = inner > inner[-1].clamp(min=0) * len(inner) * torch.finfo(inner.dtype).eps
    centred = rows - own.mean
    transported = (centred @ (root @ basis[:, kept])).square() @ inner[kept].rsqrt()
    return 2 * centred @ (own.mean - other.mean) + centred.square().sum(1) - transported


def _influences_by_rows(real: Tensor, fake: Tensor) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " m"]]:
    """Returns the same for both sets where rows are few: from the singular vectors of the product of the rows."""
    shift = real.mean(0) - fake.mean(0)
    first, second = real - real.mean(0), fake - fake.mean(0)
    left, values, right = torch.linalg.svd(first @ second.T, full_matrices=False)
    found = []
    for rows, vectors, towards in ((first, left, shift), (second, right.T, -shift)):
        own = vectors.square() @ values * math.sqrt((len(rows) - 1) / (len(real) + len(fake) - len(rows) - 1))
        found.append(2 * rows @ towards + rows.square().sum(1) - own)
    return found[0], found[1]
