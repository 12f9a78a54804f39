"""Measure, before any training, what assigning noise would do to a data set, and recommend a way of doing it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .assign import assign_noise
from .blocks import Labels, label_table
from .draw import draw_noise
from .leak import ClassLeak, class_leak, pool_noise
from .select import select_noise
from .solvers import Solver
from .validate import check_images, non_finite_message

Pairing = Literal["independent", "assignment", "blocks", "nearest"]


@dataclass(frozen=True)
class PairingStatistics:
    """What one way of pairing does at one batch size, averaged over random batches."""

    pairing: Pairing
    """"assignment" ignores labels, "blocks" stays within them, "nearest" is nearest of k, "independent" plain noise."""
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
    """Arguments for `assign_noise` and the reason for them."""

    pairing: Pairing
    strength: float
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """The measurements of `diagnose`, by pairing and batch size, and what follows from them."""

    statistics: tuple[PairingStatistics, ...]
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
    """Measures distance reduction, tilt, Gaussianity and class leak of every way of pairing images with noise.

    Args:
        x: A sample of the data as the diffusion sees it, a thousand images or more; scale matters.
        labels: Conditions, as for `assign_noise`. With several columns, the leak of their combination is measured.
        batch_sizes: Batch sizes to try; those above the number of images are left out.
        k: Candidates for nearest-of-k selection, whose statistics do not depend on the batch size.
        num_pairs: Pairs of image and noise behind each number. The leak's standard error falls with its root.
        solver: As for `assign_noise`.
        generator: Source of batches and noise, on the CPU.

    Raises:
        ValueError: If there are fewer than two images, or a bad input that `assign_noise` names.
    """
    check_images(x)
    sizes = sorted({size for size in batch_sizes if 2 <= size <= len(x)}) or [len(x)]
    if len(x) < 2:
        raise ValueError(f"x has {len(x)} rows; a diagnosis needs a sample of the data")
    if not torch.isfinite(x).all():
        raise ValueError(non_finite_message(x=x))
    classes = None if labels is None else label_table(labels, len(x)).cpu().unique(dim=0, return_inverse=True)[1]
    direction = main_direction(x)

    def measure(pairing: Pairing, batch_size: int) -> PairingStatistics:
        return _measure(pairing, x, classes, direction, batch_size, num_pairs, k, solver, generator)

    pairings: tuple[Pairing, ...] = ("assignment",) if classes is None else ("assignment", "blocks")
    statistics = (
        measure("independent", sizes[-1]),
        *(measure(pairing, size) for pairing in pairings for size in sizes),
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


def recommend(statistics: Sequence[PairingStatistics]) -> Recommendation:
    """Returns the way of pairing that the measurements speak for."""
    best = {s.pairing: s for s in sorted(statistics, key=lambda s: s.batch_size)}
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
            "independent",
            0.0,
            f"{why}; but distances fall by only {chosen.reduction:.2%} at batch size {chosen.batch_size}: "
            "too little to expect an effect. Larger batches, or batches of few labels, give the assignment more choice",
        )
    if chosen.reduction > 0.05:
        return Recommendation(
            chosen.pairing,
            0.5,
            f"{why}; distances fall by {chosen.reduction:.1%}, which is large: in so few dimensions full strength "
            "helps sampling in few steps and hurts it in many, half strength did not",
        )
    return Recommendation(chosen.pairing, 1.0, f"{why}; distances fall by {chosen.reduction:.2%}")


def _measure(
    pairing: Pairing,
    x: Tensor,
    classes: Tensor | None,
    direction: Tensor,
    batch_size: int,
    num_pairs: int,
    k: int,
    solver: Solver,
    generator: torch.Generator | None,
) -> PairingStatistics:
    sums, features, seen = torch.zeros(6, dtype=torch.float64), [], []
    for index in _batches(len(x), batch_size, num_pairs, generator):
        images = x[index.to(x.device)]
        noise = draw_noise(images, generator)
        if pairing == "nearest":
            paired = select_noise(images, k, generator=generator)
        elif pairing == "independent":
            paired = noise
        else:
            labels = classes[index] if pairing == "blocks" and classes is not None else None
            paired = assign_noise(images, noise, labels=labels, solver=solver)
        sums += _row_sums(images, noise, paired, direction)
        if classes is not None:
            features.append(pool_noise(paired).cpu())
            seen.append(classes[index])
    count, before, after, tilt, energy, along = sums.tolist()
    return PairingStatistics(
        pairing=pairing,
        batch_size=batch_size,
        reduction=1 - after / before,
        tilt=tilt / count,
        norm_ratio=energy / count / direction.numel(),
        main_direction_variance=along / count,
        num_pairs=int(count),
        leak=_leak(features, seen),
    )


def _row_sums(images: Tensor, noise: Tensor, paired: Tensor, direction: Tensor) -> Tensor:
    """Returns rows, distance before and after, tilt, squared norm and squared main coordinate, summed."""
    x, n, p = (t.reshape(len(t), -1).float() for t in (images, noise, paired))
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
