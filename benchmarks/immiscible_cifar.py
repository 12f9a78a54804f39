"""The published distance reductions on CIFAR-10, and the law of nearest-of-k selection, measured on the real images.

    python benchmarks/immiscible_cifar.py cifar10.zip

The archive holds ``train/<class>/*.jpg`` (or .png) of 32x32 pixels. Images are brought to zero mean and unit variance:
the published table holds for that scale only. Exits with 1 where a figure is off by more than its tolerance.

References:
    Y. Li et al., "Immiscible Diffusion", NeurIPS 2024, Table 2 (batch sizes); Y. Li et al., "Improved Immiscible
    Diffusion", 2025 (nearest of k).
"""

import argparse
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from immiscible_noise import assign_noise, select_noise

PUBLISHED_ASSIGNMENT = {128: 1.93, 256: 2.16, 512: 2.32, 1024: 2.44}  # percent
PUBLISHED_NEAREST = {4: 1.10, 8: 1.58}  # percent
EXPECTED_MAXIMUM = {2: 0.5642, 4: 1.0294, 8: 1.4236, 16: 1.7660}  # of k standard normal numbers


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the published distance reductions on CIFAR-10.")
    parser.add_argument("archive", type=Path, help="zip of CIFAR-10 with train/<class>/ folders")
    parser.add_argument("--pairs", type=int, default=16384, help="pairs of image and noise behind each figure")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(options.seed)
    images = read_images(options.archive)
    rows = [
        *assignment_rows(images, options.pairs, generator),
        *nearest_rows(images, options.pairs, generator),
    ]
    print(f"{len(images)} images, {options.pairs} pairs per figure")
    print(f"{'figure':<34}{'measured':>10}{'expected':>10}{'tolerance':>11}")
    for name, measured, expected, tolerance in rows:
        verdict = "ok" if abs(measured - expected) <= tolerance else "OFF"
        print(f"{name:<34}{measured:>10.3f}{expected:>10.3f}{tolerance:>11.2f}  {verdict}")
    return int(any(abs(measured - expected) > tolerance for _, measured, expected, tolerance in rows))


def read_images(archive: Path) -> Tensor:
    """Returns the training images, flattened, with zero mean and unit variance over all pixels."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if n.startswith("train/") and n.endswith((".jpg", ".png")))
        if not names:
            sys.exit(f"{archive} has no train/<class>/*.jpg")
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])
    images = torch.from_numpy(pixels).flatten(1).float()
    return images.sub_(images.mean()).div_(images.std())


def batches(images: Tensor, size: int, pairs: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), generator=generator)[: max(pairs // size, 1) * size]
    for index in order.split(size):
        yield images[index], torch.randn(len(index), images.shape[1], generator=generator)


def assignment_rows(
    images: Tensor, pairs: int, generator: torch.Generator
) -> Iterator[tuple[str, float, float, float]]:
    """Yields the reduction of the mean distance by the published cost, in percent."""
    for size, expected in PUBLISHED_ASSIGNMENT.items():
        before = after = 0.0
        for x, noise in batches(images, size, pairs, generator):
            before += float((x - noise).norm(dim=1).sum())
            after += float((x - assign_noise(x, noise, cost="l2")).norm(dim=1).sum())
        yield f"assignment, batch {size}: reduction %", 100 * (1 - after / before), expected, 0.15


def nearest_rows(images: Tensor, pairs: int, generator: torch.Generator) -> Iterator[tuple[str, float, float, float]]:
    """Yields reduction and mean squared norm of the selected noise, in percent, against the law and the paper."""
    dim = images.shape[1]
    for k, maximum in EXPECTED_MAXIMUM.items():
        before = after = energy = 0.0
        laws = []
        for x, noise in batches(images, 256, pairs, generator):
            chosen = select_noise(x, k, generator=generator)
            before += float((x - noise).norm(dim=1).sum())
            after += float((x - chosen).norm(dim=1).sum())
            energy += float(chosen.square().sum())
            squared_norm = x.square().sum(1)
            spread = (2 * dim + 4 * squared_norm).sqrt()
            laws.append(torch.stack([maximum * spread / (2 * (squared_norm + dim)), 1 - 2 * maximum / spread]).mean(1))
        reduction_law, norm_law = (100 * torch.stack(laws).mean(0)).tolist()
        reduction, norm = 100 * (1 - after / before), 100 * energy / (len(laws) * 256 * dim)
        yield f"nearest of {k}: reduction %", reduction, reduction_law, 0.15
        yield f"nearest of {k}: squared norm / D %", norm, norm_law, 0.3
        if k in PUBLISHED_NEAREST:
            yield f"nearest of {k}: published reduction %", reduction, PUBLISHED_NEAREST[k], 0.1


if __name__ == "__main__":
    raise SystemExit(main())
