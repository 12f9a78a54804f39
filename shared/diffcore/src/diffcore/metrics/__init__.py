"""Metrics of generated images, as functions on features and as `torchmetrics.Metric`."""

from diffcore.metrics.clip_score import ClipScore, PromptFit
from diffcore.metrics.compare import ImageComparison, Measure, compare_features, compare_images
from diffcore.metrics.embed import Embedded, Reading, embed_images
from diffcore.metrics.estimate import Estimate
from diffcore.metrics.features import FeatureExtractor, feature_extractor
from diffcore.metrics.frechet import (
    FrechetDistance,
    extrapolate,
    frechet_distance,
    frechet_distance_from_features,
    real_floor,
)
from diffcore.metrics.frechet_error import frechet_estimate
from diffcore.metrics.keypoints import CorrectKeypoints, PercentageCorrectKeypoints
from diffcore.metrics.kid import KernelDistance, kernel_distance
from diffcore.metrics.pairwise_ssim import PairwiseSSIM, pairwise_ssim
from diffcore.metrics.precision_recall import Membership, PrecisionRecall, Scores, membership, precision_recall
from diffcore.metrics.preprocess import Preprocessing, resize
from diffcore.metrics.replication import Nearest, Replication, ReplicationScore, nearest_training_images
from diffcore.metrics.rows import RealAndFake, gather_rows
from diffcore.metrics.segmentation import DataSetIoU, IntersectionOverUnion
from diffcore.metrics.statistics_file import read_statistics

__all__ = [
    "ClipScore",
    "CorrectKeypoints",
    "DataSetIoU",
    "Embedded",
    "Estimate",
    "FeatureExtractor",
    "FrechetDistance",
    "ImageComparison",
    "IntersectionOverUnion",
    "KernelDistance",
    "Measure",
    "Membership",
    "Nearest",
    "PairwiseSSIM",
    "PercentageCorrectKeypoints",
    "PrecisionRecall",
    "Preprocessing",
    "PromptFit",
    "Reading",
    "RealAndFake",
    "Replication",
    "ReplicationScore",
    "Scores",
    "compare_features",
    "compare_images",
    "embed_images",
    "extrapolate",
    "feature_extractor",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_estimate",
    "gather_rows",
    "kernel_distance",
    "membership",
    "nearest_training_images",
    "pairwise_ssim",
    "precision_recall",
    "read_statistics",
    "real_floor",
    "resize",
]
