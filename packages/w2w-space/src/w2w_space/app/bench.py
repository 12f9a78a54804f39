"""Benchmark cases: spaces against decompositions of the whole matrix, cuts and projections against formed products.

Those of training and swapping are in `bench_training`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore.adapters import LowRank
from diffcore.bench import Case
from w2w_space.app.bench_training import training_cases
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.products import product_gram
from w2w_space.ranks import at_rank
from w2w_space.space import WeightSpace

_COMPONENTS = 100
_BLOCKS = ((320, 768, 5), (640, 768, 5), (1280, 768, 6))  # width, text width, number of attention blocks in SD 1.5


def cases(*, smoke: bool = False) -> list[Case]:
    """Returns the benchmark of this package.

    Args:
        smoke: Take small sizes, for a check of agreement only.
    """
    layout = Layout.of({"a.to_q": (40, 32), "b.to_v": (24, 32)}, rank=1) if smoke else sd15_layout()
    members, components = (30, 5) if smoke else (1000, _COMPONENTS)
    vectors = population_of(layout, members)
    return [
        _pca(layout, vectors, components, "full", goal=6.0),
        _pca(layout, vectors, components, "randomized"),
        _products(layout, vectors[: 10 if smoke else 100]),
        _cuts(4 if smoke else 64, 48 if smoke else 1280),
        _projections(layout, vectors, components, 5 if smoke else 64),
        *training_cases(smoke=smoke),
    ]


def sd15_layout() -> Layout:
    """Returns the paper's layout in SD 1.5: queries and values of both attentions, 64 modules, 99 648 numbers."""
    shapes = {}
    for width, text, count in _BLOCKS:
        for block in range(count):
            for attention, inputs in (("attn1", width), ("attn2", text)):
                stem = f"width{width}.{block}.{attention}"
                shapes |= {f"{stem}.to_q": (width, width), f"{stem}.to_v": (width, inputs)}
    return Layout.of(shapes, rank=1)


def population_of(layout: Layout, members: int, *, planted: int = 40) -> Tensor:
    """Returns vectors that share some planted directions of falling strength, and have noise of their own.

    Args:
        layout: Table of the vectors.
        members: Number of adapters that are drawn.
        planted: Number of directions that they share.
    """
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(planted, layout.size, generator=g)
    latents = torch.randn(members, planted, generator=g) * torch.linspace(1.0, 0.1, planted)
    # One sign for all: the reference decomposes raw vectors, and both must see the same matrix.
    return torch.randn(members, layout.size, generator=g).mul_(0.3).add_(latents @ directions)


def _pca(layout: Layout, vectors: Tensor, count: int, solver: str, goal: float | None = None) -> Case:
    """Components of standardised vectors: inner products over column blocks, against scikit-learn."""
    population = Population(layout, tuple(map(str, range(len(vectors)))), Stacked(vectors))

    def ours() -> Tensor:
        return WeightSpace.build(population, gauge="raw", num_components=count).variances

    def theirs() -> Tensor:
        from sklearn.decomposition import PCA

        z = (vectors - vectors.mean(0)) / vectors.std(0)
        fitted = PCA(count, svd_solver=solver, random_state=0).fit(z.numpy())
        return torch.from_numpy(fitted.explained_variance_).double()

    def agree(a: Tensor, b: Tensor) -> bool:
        # The randomised solver is right for the leading components alone, which are compared.
        known = slice(None) if solver == "full" else slice(min(5, count // 2))
        return bool(((a - b)[known].abs() / a[known]).max() < (1e-4 if solver == "full" else 1e-2))

    sizes = {"members": len(vectors), "numbers": layout.size, "components": count}
    return Case(f"{count} components, against scikit-learn's {solver} decomposition", sizes, ours, theirs, agree, goal)


def _products(layout: Layout, vectors: Tensor) -> Case:
    """Inner products of all changes: from small matrices, against the changes themselves."""

    def theirs() -> Tensor:
        total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
        for down, up in layout.factors(vectors).values():
            flat = (up @ down).flatten(1)
            total += (flat @ flat.T).double()
        return total

    def agree(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() < 1e-4 * a.abs().max())

    sizes: Mapping[str, int | str] = {"adapters": len(vectors), "modules": len(layout.modules)}
    name = "inner products of changes, against forming the changes"
    return Case(name, sizes, lambda: product_gram(layout, vectors), theirs, agree, 5.0)


def _cuts(modules: int, side: int) -> Case:
    """Changes of rank 16 cut to rank 4: from the factors, against a decomposition of the change."""
    g = torch.Generator().manual_seed(0)
    count = min(modules, 4)  # the reference takes seconds for each
    changes = [
        LowRank(torch.randn(16, side, generator=g), torch.randn(side, 16, generator=g), 8.0) for _ in range(count)
    ]

    def ours() -> list[Any]:
        return [at_rank(change, 4)[0].delta() for change in changes]

    def theirs() -> list[Any]:
        found = []
        for change in changes:
            u, s, v = torch.linalg.svd(change.delta(), full_matrices=False)
            found.append(u[:, :4] * s[:4] @ v[:4])
        return found

    def agree(a: list[Any], b: list[Any]) -> bool:
        return all(float((x - y).norm() / x.norm()) < 1e-3 for x, y in zip(a, b, strict=True))

    sizes = {"modules": count, "side": side, "ranks": "16 to 4"}
    return Case("cut a LoRA to a smaller rank, against decomposing its changes", sizes, ours, theirs, agree, 5.0)


def _projections(layout: Layout, vectors: Tensor, components: int, count: int) -> Case:
    """Coordinates of several adapters: in one pass, against one after the other as the published code does."""
    population = Population(layout, tuple(map(str, range(len(vectors)))), Stacked(vectors))
    space = WeightSpace.build(population, num_components=components)
    some = vectors[:count]

    def theirs() -> Tensor:
        v = space.components.T.contiguous()
        beta = [((space.gauge(row[None]) - space.mean) / space.scale) @ v for row in some]
        return torch.cat(beta) / space.sigma

    def agree(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() < 1e-3)

    sizes = {"adapters": count, "components": components, "numbers": layout.size}
    return Case("project adapters, against one at a time", sizes, lambda: space.coordinates(some), theirs, agree)
