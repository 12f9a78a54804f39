"""What batching and the right algebra save: metrics beside the plain way, same precision and threads.

    python benchmarks/diffcore_metrics.py [--small] [--repeats 3]

The references are written as one would without these metrics: torchmetrics' SSIM called for each pair of images with
all prompts in the batch, and the Fréchet distance with SciPy's general matrix root of the product of covariances.
"""

import argparse
import sys
from itertools import combinations
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from diffcore.bench import Case, run_cases
from diffcore.metrics import frechet_distance_from_features, kernel_distance, pairwise_ssim


def pairwise_ssim_case(prompts: int, seeds: int, side: int) -> Case:
    """SSIM of all pairs of seeds beside a loop over pairs, each call on all prompts at once."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(prompts, seeds, 4, side, side, generator=generator)

    def ours() -> Tensor:
        return pairwise_ssim(images, data_range=1.0)

    def loop() -> Tensor:
        pairs = [
            structural_similarity_index_measure(images[:, i], images[:, j], data_range=1.0, reduction="none")
            for i, j in combinations(range(seeds), 2)
        ]
        return torch.stack([torch.as_tensor(pair) for pair in pairs], dim=1)

    sizes: dict[str, int | str] = {"prompts": prompts, "seeds": seeds, "image": f"4x{side}x{side}"}
    return Case("pairwise SSIM", sizes, ours, loop, lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5), goal=4.0)


def frechet_case(n: int, d: int, goal: float) -> Case:
    """The distance from features beside the textbook: two covariances, the root of their product."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    real, fake = (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix for _ in range(2))

    def ours() -> float:
        return float(frechet_distance_from_features(real, fake))

    def general_root() -> float:
        mu1, mu2 = real.numpy().mean(0), fake.numpy().mean(0)
        sigma1, sigma2 = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
        root: Any = scipy.linalg.sqrtm(sigma1 @ sigma2)
        return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1 + sigma2 - 2 * root.real))

    # Below full rank the general root is the less exact of the two.
    tolerance = 1e-6 if n > d else 1e-3

    def agree(a: float, b: float) -> bool:
        return abs(a - b) <= tolerance * abs(b)

    return Case("Fréchet distance", {"n": n, "d": d}, ours, general_root, agree, goal=goal)


def kernel_distance_case(n: int, d: int) -> Case:
    """All pairs of rows, with a standard error, beside the three whole kernel matrices without one."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, d, generator=generator) for _ in range(2))

    def ours() -> float:
        return kernel_distance(real, fake).value

    def whole_matrices() -> float:
        xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake)))
        within = sum((k.double().sum() - k.double().trace()) / (n * (n - 1)) for k in (xx, yy))
        return float(within - 2 * xy.double().mean())

    return Case("kernel distance", {"n": n, "d": d}, ours, whole_matrices, lambda a, b: abs(a - b) < 1e-6)


def cases(*, small: bool = False) -> list[Case]:
    """Returns all cases."""
    if small:
        return [
            pairwise_ssim_case(3, 4, 16),
            frechet_case(100, 32, 2.5),
            frechet_case(20, 32, 8.0),
            kernel_distance_case(50, 8),
        ]
    return [
        pairwise_ssim_case(64, 10, 64),
        frechet_case(4096, 2048, 2.5),
        frechet_case(500, 2048, 8.0),
        kernel_distance_case(4000, 2048),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure metrics beside the plain way.")
    parser.add_argument("--small", action="store_true", help="tiny sizes; checks agreement only")
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs per case")
    options = parser.parse_args()
    return run_cases(cases(small=options.small), smoke=options.small, repeats=options.repeats)


if __name__ == "__main__":
    sys.exit(main())
