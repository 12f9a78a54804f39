"""Probes: how well the classes of pixels, or of images, can be read from features.

All probes see features on one common grid, standardised by the training pixels. Ridge is in closed form, see `ridge`;
logistic regression starts from its solution; k-NN votes among the pixels of training images; "mlp-ensemble" is the
label-scarce protocol of the paper, see `scarce`. Each is repeated over several random splits of the images.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_featsel.gram import IGNORED, GramAccumulator, labels_on_grid, on_grid, require_labels
from diffusion_featsel.heads import fit_logistic, nearest_votes, pixels_of
from diffusion_featsel.ridge import STRENGTHS, LinearHead, fit_ridge
from diffusion_featsel.scarce import ScarceSettings, scarce_scores
from diffusion_featsel.segmentation import SegmentationScores, segmentation_scores
from diffusion_featsel.splits import Split, image_splits

Kind = Literal["ridge", "logistic", "knn", "mlp-ensemble"]
_PIECES_BYTES = 2**29  # of the moments of all pieces; where images need more, several make one of five or more


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the probes.

    Attributes:
        grid: Rows and columns that features and labels are brought to.
        num_splits: Number of random splits into training and test images.
        num_train: Number of training images; two thirds of all by default.
        seed: Seed of the splits, and of sampled pixels.
        neighbours: Number of nearest training pixels that vote (k-NN).
        temperature: Votes are exp(cosine / temperature) (k-NN).
        pixels_per_image: Largest number of pixels of a training image (k-NN).
        balanced: Whether sampled pixels are shared equally among the classes of an image (k-NN).
        decay: Factor of half the squared weights beside the mean cross-entropy (logistic).
        iterations: Largest number of L-BFGS iterations (logistic).
        scarce: Settings of the label-scarce protocol, its grid and seed among them (mlp-ensemble).
    """

    grid: tuple[int, int] = (64, 64)
    num_splits: int = 5
    num_train: int | None = None
    seed: int = 0
    neighbours: int = 20
    temperature: float = 0.07
    pixels_per_image: int = 2000
    balanced: bool = False
    decay: float = 1e-4
    iterations: int = 100
    scarce: ScarceSettings = field(default_factory=ScarceSettings)


@dataclass(frozen=True)
class Spread:
    """The mean over splits and their sample standard deviation, which is NaN for one split."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Returns the mean and standard deviation of some numbers."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan"))


@dataclass(frozen=True)
class ProbeResult:
    """Scores of one probe on several splits.

    Attributes:
        kind: Kind of the probe.
        scores: Scores on the test images of each split.
        splits: Training and test images of each split.
        strengths: Regularisation that each split chose; empty for probes without.
    """

    kind: Kind
    scores: tuple[SegmentationScores, ...]
    splits: tuple[Split, ...]
    strengths: tuple[float, ...] = ()

    @property
    def miou(self) -> Spread:
        """Mean intersection over union."""
        return Spread.of([score.miou for score in self.scores])

    @property
    def pixel_accuracy(self) -> Spread:
        """Share of pixels with the right class."""
        return Spread.of([score.pixel_accuracy for score in self.scores])

    @property
    def boundary_iou(self) -> Spread:
        """Mean intersection over union along boundaries."""
        return Spread.of([score.boundary_iou for score in self.scores])

    @property
    def per_class(self) -> tuple[float, ...]:
        """Mean over splits of each class's intersection over union; NaN for classes that no test image has."""
        return tuple(torch.tensor([score.per_class for score in self.scores]).nanmean(0).tolist())

    def to_json(self) -> dict[str, Any]:
        """Returns the means and deviations as plain values."""
        return {
            "kind": self.kind,
            "miou": vars(self.miou),
            "pixel_accuracy": vars(self.pixel_accuracy),
            "boundary_iou": vars(self.boundary_iou),
            "per_class": list(self.per_class),
            "strengths": list(self.strengths),
            "num_splits": len(self.splits),
            "missing": [list(split.missing) for split in self.splits],
        }


def probe(
    features: Mapping[str, Float[Tensor, "b _ _ _"]],
    labels: Int[Tensor, "b h w"],
    kind: Kind = "ridge",
    *,
    num_classes: int | None = None,
    settings: ProbeSettings | None = None,
) -> ProbeResult:
    """Measures how well the classes of pixels can be read from features.

    Args:
        features: Maps (b, c, h, w) of each activation, at native size; all are read together.
        labels: Class of each pixel at any size, or 255 for pixels that do not count.
        kind: Kind of the probe.
        num_classes: Number of classes; one more than the largest label by default.
        settings: Settings of the probes.

    Raises:
        ValueError: A label does not exist, or there are too few images.

    Example:
        >>> from torch.nn import functional as F
        >>> labels = torch.randint(2, (6, 8, 8), generator=torch.Generator().manual_seed(0))
        >>> features = {"a": F.one_hot(labels).permute(0, 3, 1, 2) + 0.1 * torch.randn(6, 2, 8, 8)}
        >>> round(probe(features, labels, settings=ProbeSettings(grid=(8, 8), num_splits=2)).miou.mean, 2)
        1.0
    """
    settings = settings or ProbeSettings()
    num_classes = _num_classes(labels) if num_classes is None else num_classes
    require_labels(labels, num_classes)
    if kind == "mlp-ensemble":
        voted = scarce_scores(
            features,
            labels,
            num_classes,
            num_splits=settings.num_splits,
            num_train=settings.num_train,
            settings=settings.scarce,
        )
        return ProbeResult(kind, *voted)
    maps, classes = on_grid(features, settings.grid), labels_on_grid(labels, settings.grid)
    splits = image_splits(
        classes, num_classes, num_train=settings.num_train, num_splits=settings.num_splits, seed=settings.seed
    )
    scores, strengths = [], []
    for number, split in enumerate(splits):
        predicted, strength = _predicted(maps, classes, num_classes, split, kind, settings, number)
        scores.append(segmentation_scores(predicted, classes[list(split.test)], num_classes))
        strengths += [] if strength is None else [strength]
    return ProbeResult(kind, tuple(scores), splits, tuple(strengths))


def _predicted(
    maps: Tensor, classes: Tensor, num_classes: int, split: Split, kind: Kind, settings: ProbeSettings, number: int
) -> tuple[Tensor, float | None]:
    train, test = list(split.train), list(split.test)
    rows = maps[test].movedim(1, 3)
    if kind == "knn":
        generator = torch.Generator().manual_seed(settings.seed * 1000 + number)
        x, y = pixels_of(maps[train], classes[train], settings.pixels_per_image, settings.balanced, generator)
        x, rows = _standardised(maps[train], classes[train], x, rows)
        votes = nearest_votes(x, y, rows, num_classes, settings.neighbours, settings.temperature)
        return votes.argmax(-1), None
    size = maps.shape[1] + 1 + num_classes
    pieces = min(len(train), max(_PIECES_BYTES // (8 * size**2), 5))
    sums = GramAccumulator({"all": maps.shape[1]}, num_classes, settings.grid, pieces)
    for image in train:
        sums.update({"all": maps[image : image + 1]}, classes[image : image + 1])
    fit = fit_ridge(sums.compute(), strength=None if pieces > 1 else STRENGTHS[2])
    if kind == "ridge":
        return fit(rows).argmax(-1), fit.strength
    x, y = pixels_of(maps[train], classes[train])
    head = fit_logistic(x, y, fit, settings.decay, settings.iterations)
    return head(rows).argmax(-1), fit.strength


def _standardised(maps: Tensor, classes: Tensor, *parts: Tensor) -> list[Tensor]:
    """Returns rows of channels by the mean and deviation of the training pixels; constant channels become 0."""
    x, _ = pixels_of(maps, classes)
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    return [(part - mean) * scale for part in parts]


@dataclass(frozen=True)
class ImageProbeResult:
    """Share of test images with the right class, for each split.

    Attributes:
        kind: Kind of the probe.
        accuracies: Share of right test images of each split.
        splits: Training and test images of each split.
    """

    kind: Literal["logistic", "knn"]
    accuracies: tuple[float, ...]
    splits: tuple[Split, ...]

    @property
    def accuracy(self) -> Spread:
        """Mean and deviation over the splits."""
        return Spread.of(list(self.accuracies))


def probe_images(
    features: Mapping[str, Float[Tensor, "b _ _ _"]],
    labels: Int[Tensor, " b"],
    kind: Literal["logistic", "knn"] = "knn",
    *,
    pool: Literal["mean", "gem"] = "mean",
    num_classes: int | None = None,
    settings: ProbeSettings | None = None,
) -> ImageProbeResult:
    """Measures how well the classes of whole images can be read from pooled features.

    Args:
        features: Maps (b, c, h, w) of each activation, at native size.
        labels: Class of each image.
        kind: Kind of the probe.
        pool: Average over places, or the generalised mean (mean of f^3)^(1/3), the sign of f kept (GeM).
        num_classes: Number of classes; one more than the largest label by default.
        settings: Settings of the probes.

    Raises:
        ValueError: A label does not exist, or there are too few images.

    Example:
        >>> from torch.nn import functional as F
        >>> labels = torch.arange(3).repeat(8)
        >>> features = {"a": F.one_hot(labels)[:, :, None, None] + 0.1 * torch.randn(24, 3, 4, 4)}
        >>> probe_images(features, labels, settings=ProbeSettings(neighbours=3)).accuracy.mean
        1.0
    """
    settings = settings or ProbeSettings()
    num_classes = _num_classes(labels) if num_classes is None else num_classes
    require_labels(labels, num_classes)
    pooled = pooled_features(features, pool)
    splits = image_splits(
        labels, num_classes, num_train=settings.num_train, num_splits=settings.num_splits, seed=settings.seed
    )
    accuracies = []
    for split in splits:
        train, test = list(split.train), list(split.test)
        mean, deviation = pooled[train].mean(0), pooled[train].std(0, unbiased=False)
        x = (pooled - mean) * torch.where(deviation > 0, 1 / deviation, 0.0)
        if kind == "knn":
            k = min(settings.neighbours, len(train))
            votes = nearest_votes(x[train], labels[train], x[test], num_classes, k, settings.temperature)
        else:
            start = LinearHead(x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes))
            votes = fit_logistic(x[train], labels[train], start, settings.decay, settings.iterations)(x[test])
        accuracies.append(float((votes.argmax(-1) == labels[test]).double().mean()))
    return ImageProbeResult(kind, tuple(accuracies), splits)


def pooled_features(
    features: Mapping[str, Float[Tensor, "b _ _ _"]], pool: Literal["mean", "gem"] = "mean"
) -> Float[Tensor, "b channels"]:
    """Returns one vector for each image: the mean of each channel, or its generalised mean with power 3."""
    parts = []
    for maps in features.values():
        values = maps.float().flatten(2)
        mean = values.mean(2) if pool == "mean" else values.pow(3).mean(2)
        parts.append(mean if pool == "mean" else mean.sign() * mean.abs().pow(1 / 3))
    return torch.cat(parts, 1)


def _num_classes(labels: Tensor) -> int:
    counted = labels[labels != IGNORED]
    if not counted.numel():
        raise ValueError("`labels` has no pixel that counts; all are 255")
    return int(counted.max()) + 1
