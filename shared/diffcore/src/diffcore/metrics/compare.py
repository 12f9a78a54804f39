"""Comparing two image sets by every metric, with confidence intervals, in several kinds of features.

Intervals have 95 % coverage if images are independent draws. Those of shares hold the other set fixed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.data.source import ImageSource
from diffcore.errors import UserError, printable
from diffcore.metrics.copies import COPY, looks_like_noise, noise_of
from diffcore.metrics.embed import Embedded, Progress, Reading, embed_images, silent
from diffcore.metrics.estimate import Estimate
from diffcore.metrics.features import FeatureExtractor
from diffcore.metrics.frechet import extrapolate, real_floor
from diffcore.metrics.frechet_error import frechet_estimate
from diffcore.metrics.kid import kernel_distance
from diffcore.metrics.precision_recall import membership, squared_distances
from diffcore.metrics.prompt_fit import PromptScores, ScoredPrompts, score_prompts
from diffcore.metrics.replication import nearest_training_images
from diffcore.run import Run
from diffcore.stats import Covariance, in_one_precision

MIN_IMAGES = 10
_NORMAL = 1.959964  # standard errors of a 95 % interval
_ROWS = 2048
_K_COVERAGE = 5


@dataclass(frozen=True)
class Measure:
    """One value of a metric with its 95 % interval.

    Attributes:
        features: Name of the extractor.
        metric: Name of the metric.
        value: The estimate that the metric gives.
        low: Lower end of the 95 % interval; NaN where none is known.
        high: Upper end of the interval; NaN likewise.
        n: Number of images it rests on: of the smaller side, or of the side that is counted.
    """

    features: str
    metric: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ImageComparison:
    """The result of comparing two image sets.

    Attributes:
        measures: All metrics with their intervals.
        fake: Features of the generated images.
        real: Features of the real images; None where only statistics of them were given.
        scored: CLIP score of each generated image, if prompts were given.
    """

    measures: tuple[Measure, ...]
    fake: Embedded
    real: Embedded | None
    scored: PromptScores | None = None


def compare_images(
    real: ImageSource | Covariance,
    fake: ImageSource,
    extractors: Sequence[FeatureExtractor],
    run: Run,
    reading: Reading,
    *,
    digests: Mapping[str, str],
    prompts: ScoredPrompts | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ImageComparison:
    """Measures generated images against real ones; decodes every image once and runs every network once on it.

    Args:
        real: The real images, or moments of their features under the one extractor that is given.
        fake: The generated images, not yet read.
        extractors: Networks whose features are compared, each on its own.
        run: Run folder that keeps features, so that an interrupted comparison goes on.
        reading: Device, batch size and limits for reading images.
        digests: Digests that identify the image sets, by "real" and "fake".
        prompts: Prompts of the generated images, with the network that scores them.
        seed: Seed that chooses the random subsets.
        progress: Shows how far the reading of images is.

    Raises:
        UserError: A side has fewer than 10 readable images, or statistics do not fit the features.
    """
    judges = [] if prompts is None else [prompts.extractor]
    both = {extractor.sha256: extractor for extractor in (*judges, *extractors)}.values()
    if isinstance(real, Covariance):
        _check_statistics(real, extractors)
        reals = None
    else:
        reals = embed_images(real, digests["real"], extractors, run, reading, progress)
    fakes = embed_images(fake, digests["fake"], list(both), run, reading, progress)
    for side, embedded in (("real", reals), ("fake", fakes)):
        if embedded is not None and len(embedded.names) < MIN_IMAGES:
            raise UserError(f"the {side} side has {len(embedded.names)} readable images; give at least {MIN_IMAGES}")
    measures: list[Measure] = []
    for extractor in extractors:
        reference = real if isinstance(real, Covariance) else _side(reals, extractor)
        measures += compare_features(
            reference, _side(fakes, extractor), extractor.name, noise=noise_of(extractor), seed=seed
        )
    if prompts is None:
        return ImageComparison(tuple(measures), fakes, reals)
    judge = next(extractor for extractor in both if extractor.sha256 == prompts.extractor.sha256)
    scored = score_prompts(prompts, _side(fakes, judge), fakes.indices, reading.batch_size)
    measures.append(_measure(judge.name, "CLIP score", scored.fit))
    return ImageComparison(tuple(measures), fakes, reals, scored)


def compare_features(
    real: Float[Tensor, "n d"] | Covariance,
    fake: Float[Tensor, "m d"],
    name: str,
    *,
    noise: Float[Tensor, "p d"] | None = None,
    seed: int = 0,
) -> list[Measure]:
    """Returns all numbers that compare two sets of features; from moments of the real ones, the Fréchet distances.

    Args:
        real: Features of real images, or their moments.
        fake: Features of generated images.
        name: Name of the features in the result.
        noise: Features of `copies.noise_pictures`, where the features are made to find copies, so that a cosine above
            0.5 is one; fakes that look like noise are no copies, and are counted apart.
        seed: Seed that chooses the random subsets.
    """
    distance, limit = frechet_estimate(real, fake), extrapolate(real, fake, seed=seed)
    # The error of the line is small; the images it rests on are no more than those of the distance itself.
    limit = limit._replace(standard_error=math.hypot(limit.standard_error, distance.standard_error))
    found = [_measure(name, "Fréchet distance", distance), _measure(name, "Fréchet distance, extrapolated", limit)]
    if isinstance(real, Covariance):
        return found
    found.append(_measure(name, "Fréchet distance, real against real", real_floor(real, len(fake), seed=seed)))
    found.append(_measure(name, "kernel distance", kernel_distance(real, fake)))
    inside = membership(real, fake, k_coverage=_K_COVERAGE)
    balls = inside.num_balls / _K_COVERAGE
    density = Estimate(float(balls.mean()), float(balls.std()) / math.sqrt(len(balls)), len(balls))
    found += [
        _share(name, "precision", inside.realistic),
        _share(name, "recall", inside.recalled),
        _measure(name, "density", density, at_least=0.0),
        _share(name, "coverage", inside.covered),
    ]
    if noise is not None:
        cosine, broken = nearest_training_images(real, fake).cosine[:, 0], looks_like_noise(fake, noise)
        found.append(_share(name, "share of copies", (cosine > COPY) & ~broken))
        found.append(_share(name, "share that looks like noise", broken))
    return found


def nearest_real(real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], k: int) -> tuple[Tensor, Int[Tensor, "m k"]]:
    """Returns for each generated image its distance to the nearest real one, and the rows of the k nearest."""
    real, fake = in_one_precision(real, fake)
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    found = [squared_distances(rows, real).topk(min(k, len(real)), largest=False) for rows in fake.split(_ROWS)]
    distances, rows = (torch.cat(columns) for columns in zip(*found, strict=True))
    return distances[:, 0].clamp(min=0).sqrt(), rows


def as_rows(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Returns the numbers as table rows."""
    return [asdict(measure) for measure in measures]


def named(extractors: Sequence[FeatureExtractor]) -> list[FeatureExtractor]:
    """Names extractors without the folders of their files, as tables do, and leaves out those given twice."""
    found: dict[str, FeatureExtractor] = {}
    for extractor in extractors:
        found.setdefault(extractor.sha256, extractor)
    taken: set[str] = set()
    for extractor in found.values():
        kind, _, place = extractor.name.partition(":")
        name = f"{kind}:{printable(Path(place).name)}"
        extractor.name = f"{name} {extractor.sha256[:8]}" if name in taken else name
        taken.add(extractor.name)
    return list(found.values())


def _side(embedded: Embedded | None, extractor: FeatureExtractor) -> Tensor:
    assert embedded is not None  # both sides were embedded
    return embedded.features[extractor.name]


def _check_statistics(real: Covariance, extractors: Sequence[FeatureExtractor]) -> None:
    for extractor in extractors:
        device = next(iter(extractor.parameters()), torch.empty(0)).device
        width = extractor(torch.zeros(1, 3, 64, 64, device=device)).shape[1]
        if width != len(real.mean):
            raise UserError(
                f"the statistics are of {len(real.mean)} features, {printable(extractor.name)} has {width}; "
                "give the network that they were made with, and no other"
            )


def _measure(features: str, metric: str, found: Any, *, at_least: float = -math.inf) -> Measure:
    reach = _NORMAL * found.standard_error
    low = max(found.value - reach, at_least) if math.isfinite(reach) else math.nan
    return Measure(features, metric, found.value, low, found.value + reach, found.n)


def _share(features: str, metric: str, hits: Tensor) -> Measure:
    """Returns a share with Wilson's interval, which keeps its coverage near 0 and 1 too."""
    n = len(hits)
    share, square = float(hits.double().mean()), _NORMAL**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    reach = _NORMAL / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return Measure(features, metric, share, max(centre - reach, 0.0), min(centre + reach, 1.0), n)
