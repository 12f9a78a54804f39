"""Metrics of generated images, as functions on features and as `torchmetrics.Metric`."""

from diffcore.metrics.frechet import (
    Estimate,
    FrechetDistance,
    extrapolate,
    frechet_distance,
    frechet_distance_from_features,
    real_floor,
)
from diffcore.metrics.precision_recall import PrecisionRecall, Scores, precision_recall

__all__ = [
    "Estimate",
    "FrechetDistance",
    "PrecisionRecall",
    "Scores",
    "extrapolate",
    "frechet_distance",
    "frechet_distance_from_features",
    "precision_recall",
    "real_floor",
]
