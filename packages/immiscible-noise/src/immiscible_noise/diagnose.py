"""Measure, before any training, what each coupling of noise and images would do to a data set, and recommend one.

For image x and the noise n that it meets, the averages over random batches are the distance ``|x - n|``, the tilt
``<n, x / |x|>``, and the moments ``|n|^2 / d`` and ``<n, v>^2`` along the images' first principal direction v, which
tell how Gaussian the noise stays. Where labels are given, a linear probe that reads the label from n measures the leak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .assign import assign_noise
from .batch import check_images, draw_noise, non_finite_message
from .blocks import Labels, label_table
from .coupling import Coupling
from .leak import ClassLeak, class_leak, pool_noise
from .select import select_noise
from .solvers import Solver

Kind = Literal["independent", "assignment", "blocks", "nearest"]
"""Plain noise, assignment that ignores labels, assignment within labels, nearest of k."""


@dataclass(frozen=True)
class CouplingStatistics:
    """What one coupling does at one batch size, averaged over random batches."""

    coupling: Kind
    batch_size: int
    reduction: float
    """Share by which the mean L2 distance between image and noise falls."""
    tilt: float
    """Mean of ``<noise, x / |x|>``; 0 for independent pairs, at most about ``sqrt(2 ln batch_size)``."""
    norm_ratio: float
    """Mean of ``|noise|^2`` over its dimension: 1 for Gaussian noise."""
    main_direction_variance: float
    """Variance of the noise along the first principal component of the images: 1 for Gaussian noise."""
    num_pairs: int
    leak: ClassLeak | None
    """How far the noise gives away the label; None without labels."""


@dataclass(frozen=True)
class Recommendation:
    """The coupling that measurements speak for, and the reason."""

    coupling: Coupling
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """The measurements of `diagnose`, by coupling and batch size, and what follows from them."""

    statistics: tuple[CouplingStatistics, ...]
    recommendation: Recommendation


def diagnose(
    x: Float[Tensor, "n *data"],
    *,
    labels: Labels | None = None,
    batch_sizes: Sequence[int] = (64, 256, 1024),
    k: int = 4,
    num_pairs: int = 4096,
    solver: Solver = "auto",
    generator: torch.Generator | None = None,
) -> Diagnosis:
    """Measures distance reduction, tilt, Gaussianity and class leak of every coupling of images and noise.

    Args:
        x: A sample of the data as the diffusion sees it, a thousand images or more; scale matters.
        labels: Conditions, as for `assign_noise`. With several columns, the leak of their combination is measured.
        batch_sizes: Batch sizes that are tried; those above the number of images are left out.
        k: Number of candidates of nearest-of-k selection, whose statistics do not depend on the batch size.
        num_pairs: Number of pairs of image and noise behind each figure. The leak's standard error falls with its root.
        solver: Exact solver, as for `assign_noise`.
        generator: Source of batches and noise, on the CPU.

    Raises:
        ValueError: There are fewer than two images, or `assign_noise` refuses an input.

    Example:
        >>> import torch
        >>> labels = torch.arange(200) % 2
        >>> x = torch.randn(200, 1, 4, 4) + 2 * labels.view(-1, 1, 1, 1)
        >>> diagnosis = diagnose(x, labels=labels, batch_sizes=[50], num_pairs=400)
        >>> diagnosis.recommendation.coupling.name
        'half'
    """
    check_images(x)
    sizes = sorted({size for size in batch_sizes if 2 <= size <= len(x)}) or [len(x)]
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} rows; a diagnosis needs a sample of the data")
    if not torch.isfinite(x).all():
        raise ValueError(non_finite_message(x=x))
    classes = None if labels is None else label_table(labels, len(x)).cpu().unique(dim=0, return_inverse=True)[1]
    direction = main_direction(x)

    def measure(coupling: Kind, batch_size: int) -> CouplingStatistics:
        sums, features, seen = torch.zeros(6, dtype=torch.float64), [], []
        for index in _batches(len(x), batch_size, num_pairs, generator):
            images = x[index.to(x.device)]
            met = noise = draw_noise(images, generator)
            if coupling == "nearest":
                met = select_noise(images, k, generator=generator)
            elif coupling != "independent":
                within = classes[index] if coupling == "blocks" and classes is not None else None
                met = assign_noise(images, noise, labels=within, solver=solver)
            sums += _row_sums(images, noise, met, direction)
            if classes is not None:
                features.append(pool_noise(met).cpu())
                seen.append(classes[index])
        count, before, after, tilt, energy, along = sums.tolist()
        return CouplingStatistics(
            coupling=coupling,
            batch_size=batch_size,
            reduction=1 - after / before,
            tilt=tilt / count,
            norm_ratio=energy / count / direction.numel(),
            main_direction_variance=along / count,
            num_pairs=int(count),
            leak=_leak(features, seen),
        )

    assignments: tuple[Kind, ...] = ("assignment",) if classes is None else ("assignment", "blocks")
    statistics = (
        measure("independent", sizes[-1]),
        *(measure(coupling, size) for coupling in assignments for size in sizes),
        measure("nearest", sizes[-1]),
    )
    return Diagnosis(statistics, recommend(statistics))


def main_direction(x: Float[Tensor, "n *data"], *, iterations: int = 30) -> Float[Tensor, "d"]:
    """Returns the unit vector along which the images vary most, by subspace iteration from the first images."""
    centred = (flat := x.detach().reshape(len(x), -1).float()) - flat.mean(0)
    basis = centred[:8].T
    for _ in range(iterations):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    return basis @ torch.linalg.svd(centred @ basis, full_matrices=False).Vh[0]


def recommend(statistics: Sequence[CouplingStatistics]) -> Recommendation:
    """Returns the coupling that the measurements speak for; it respects labels where there are any."""
    best = {s.coupling: s for s in sorted(statistics, key=lambda s: s.batch_size)}
    free, within = best["assignment"], best.get("blocks")
    chosen, why = free, "no labels were given, so rows may exchange noise freely"
    if within is not None:
        chosen, leak = within, free.leak
        if leak is None:
            why = "labels have too few samples to measure a leak, and staying within them is exact"
        elif leak.exceeds_chance:
            why = (
                f"a linear probe reads the class from freely assigned noise in {leak.accuracy:.1%} of cases against "
                f"{leak.chance:.1%} by chance, which a conditional model would learn and its sampler not repeat"
            )
        else:
            why = "no leak was measured, and staying within labels is exact whatever the probe misses"
    if chosen.reduction < 0.002:
        return Recommendation(
            Coupling("vanilla"),
            f"{why}; but distances fall by only {chosen.reduction:.2%} at batch size {chosen.batch_size}: "
            "too little to expect an effect. Larger batches, or batches of few labels, give the assignment more choice",
        )
    if chosen.reduction > 0.05:
        return Recommendation(
            Coupling("assignment", strength=0.5),
            f"{why}; distances fall by {chosen.reduction:.1%}, which is large: in so few dimensions full strength "
            "helps sampling in few steps and hurts it in many, half strength did not",
        )
    return Recommendation(Coupling("assignment"), f"{why}; distances fall by {chosen.reduction:.2%}")


def _row_sums(images: Tensor, noise: Tensor, met: Tensor, direction: Tensor) -> Tensor:
    """Returns rows, distance before and after, tilt, squared norm and squared main coordinate, summed."""
    x, n, p = (t.reshape(len(t), -1).float() for t in (images, noise, met))
    norms = torch.linalg.vector_norm(x, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    rows = torch.stack(
        [
            torch.ones_like(norms),
            torch.linalg.vector_norm(x - n, dim=1),
            torch.linalg.vector_norm(x - p, dim=1),
            torch.linalg.vecdot(x, p) / norms,
            torch.linalg.vecdot(p, p),
            (p @ direction).square(),
        ]
    )
    return rows.sum(1, dtype=torch.float64).cpu()


def _batches(num_rows: int, batch_size: int, num_pairs: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yields full random batches without repetition inside a pass, until ``num_pairs`` rows are out."""
    served = 0
    while served < num_pairs:
        for index in torch.randperm(num_rows, generator=generator).split(batch_size):
            if len(index) < batch_size or served >= num_pairs:
                break
            served += batch_size
            yield index


def _leak(features: list[Tensor], classes: list[Tensor]) -> ClassLeak | None:
    if not features:
        return None
    try:
        return class_leak(torch.cat(features), torch.cat(classes))
    except ValueError:  # fewer than two classes with enough samples: nothing to measure
        return None
