"""Benchmark cases: one pass for all activations against the ways that need one run, or one copy, for each."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore.bench import Case
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from diffusion_featsel.app.bench_reference import left_out_error_by_refitting, match_by_brute_force
from diffusion_featsel.app.portraits import MODEL, portraits
from diffusion_featsel.forward import activations_of, noised
from diffusion_featsel.gram import GramAccumulator
from diffusion_featsel.inventory import Inventory, inventory
from diffusion_featsel.match import match_points
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.rank import score
from diffusion_featsel.ranking import Ranking
from diffusion_featsel.ridge import left_out_errors

_COMPARED = 512  # rows and columns at which the published code compares features
_PIECES, _STRENGTH = 8, 1e-2


def cases(*, smoke: bool = False) -> list[Case]:
    """Returns the benchmark of this package.

    Args:
        smoke: Take small sizes, for a check of agreement only.
    """
    model = load(MODEL, Runtime(device="cpu"))
    listed = inventory(model)
    images = portraits(16 if smoke else 64, 1).plain
    return [
        sweep(model, listed, images[:2] if smoke else images[:4], 3 if smoke else 20, 64 if smoke else _COMPARED),
        _moments(model, listed, images),
        _all_scores(model, listed, images),
        _match(64 if smoke else _COMPARED),
        _subsets(12 if smoke else 60, 3 if smoke else 24),
    ]


def sweep(model: DiffusionModel, listed: Inventory, images: Tensor, count: int, side: int) -> Case:
    """Returns the case of many activations, each alone: from cached latents in one pass, against one run for each.

    Args:
        model: Diffusion model whose activations are matched.
        listed: Its activations for this size of images.
        images: An even number of images; points of the first half are searched in the second.
        count: Number of activations, evenly over the network.
        side: Rows and columns of places that are compared.
    """
    step = max(len(listed.features) // count, 1)
    chosen = listed.features[::step][:count]
    half = len(images) // 2
    points = torch.rand(half, 8, 2, generator=torch.Generator().manual_seed(0)) * (images.shape[-1] - 1)
    size = (images.shape[2], images.shape[3])
    keys, x0, condition = image_keys(images), model.codec.encode(images), model.empty_condition(1)

    def ours() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def see(name: str, maps: Tensor) -> None:
            pair = {name: maps[:half]}, {name: maps[half:]}
            found[name] = match_points(*pair, points, source_size=size, target_size=(side, side)).similarity

        activations_of(model, noised(model, x0, keys, 50.0), 50.0, condition, chosen, reduce=see)
        return found

    def theirs() -> dict[str, Tensor]:
        # Each activation alone: autoencoder, whole network, both maps enlarged and compared at every place.
        found = {}
        for activation in chosen:
            encoded = noised(model, model.codec.encode(images), keys, 50.0)
            maps = activations_of(model, encoded, 50.0, condition, [activation], stop=False)[activation.name]
            found[activation.name] = _largest_cosines(maps[:half], maps[half:], points, size, side)
        return found

    def agree(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
        return all(_as_similar(a[name], b[name]) for name in a)

    sizes = {"activations": len(chosen), "images": len(images), "compared": f"{side}x{side}"}
    return Case("match with many activations, against one run for each", sizes, ours, theirs, agree, goal=15.0)


def _plain_pass(model: DiffusionModel, images: Tensor, copies: int) -> Callable[[], Tensor]:
    """Returns a plain pass of the network over the images, a number of times each, in one batch."""
    keys, condition = image_keys(images), model.empty_condition(1)

    def run() -> Tensor:
        with torch.no_grad():
            x0 = model.codec.encode(images)
            x_t = torch.cat([noised(model, x0, keys, 50.0, draw=draw) for draw in range(copies)])
            cond = {key: value.expand(len(x_t), *value.shape[1:]) for key, value in condition.items()}
            return model.denoiser(x_t, torch.full((len(x_t),), 50.0), cond).output

    return run


def _moments(model: DiffusionModel, listed: Inventory, images: Tensor) -> Case:
    def agree(ranking: Ranking, output: Tensor) -> bool:
        return len(ranking) == len(listed.features) and not ranking.broken and bool(output.isfinite().all())

    ours = partial(score, model, images, listed.features, measurements=(), batch_size=2 * len(images))
    sizes = {"activations": len(listed.features), "images": len(images)}
    name = "moments of all activations, against a plain pass"
    return Case(name, sizes, ours, _plain_pass(model, images, 2), agree, goal=0.77)


def _all_scores(model: DiffusionModel, listed: Inventory, images: Tensor) -> Case:
    keys, condition = image_keys(images), model.empty_condition(1)

    def stored() -> dict[str, list[Tensor]]:
        # What measuring afterwards would need: both draws and the moved image of every activation.
        x0 = model.codec.encode(images)
        kept: dict[str, list[Tensor]] = {activation.name: [] for activation in listed.features}
        for draw in range(3):
            maps = activations_of(model, noised(model, x0, keys, 50.0, draw=draw), 50.0, condition, listed.features)
            for name, part in maps.items():
                kept[name].append(part)
        return kept

    def agree(ranking: Ranking, maps: Mapping[str, list[Tensor]]) -> bool:
        # The first two draws are those of the ranking, so the scale of each activation is the same.
        def scale(name: str) -> float:
            return float(torch.cat(maps[name][:2]).double().square().mean().sqrt())

        return all(abs(row.rms - scale(row.name)) < 1e-3 * row.rms for row in ranking.rows)

    ours = partial(score, model, images, listed.features)
    sizes = {"activations": len(listed.features), "images": len(images)}
    name = "all scores of all activations, against storing three passes"
    return Case(name, sizes, ours, stored, agree, goal=0.33, memory_goal=6.7)


def _match(side: int) -> Case:
    g = torch.Generator().manual_seed(0)
    source, target = (torch.randn(1, 640, 32, 32, generator=g) for _ in range(2))
    points = torch.rand(1, 12, 2, generator=g) * 511

    def ours() -> Tensor:
        found = match_points({"": source}, {"": target}, points, source_size=(512, 512), target_size=(side, side))
        return found.similarity

    reference = partial(_largest_cosines, source, target, points, (512, 512), side)
    sizes = {"channels": 640, "grid": "32x32", "compared": f"{side}x{side}"}
    return Case("match points exactly, against comparing every pixel", sizes, ours, reference, _as_similar, goal=10.0)


def _largest_cosines(source: Tensor, target: Tensor, points: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Returns the largest cosine of each point over a target with `side` rows and columns of interpolated features."""
    _, cosines = match_by_brute_force({"": source}, {"": target}, points, source_size=size, target_size=(side, side))
    return cosines.amax((2, 3))


def _as_similar(a: Tensor, b: Tensor) -> bool:
    """Returns whether both found places of the same cosine: beyond the outermost cells, many places have the same."""
    return bool((a - b).abs().max() < 1e-4)


def _subsets(images: int, activations: int) -> Case:
    """Errors of pairs of activations, left out piece by piece: from moments, against fits to the pixels."""
    g = torch.Generator().manual_seed(0)
    names = [f"a{number}" for number in range(activations)]
    features = {name: torch.randn(images, 16, 16, 16, generator=g) for name in names}
    labels = torch.randint(0, 4, (images, 16, 16), generator=g)
    pairs = [(first, second) for place, first in enumerate(names) for second in names[:place]][:40]
    sums = GramAccumulator(dict.fromkeys(names, 16), num_classes=4, grid=(16, 16), num_pieces=_PIECES)
    sums.update(features, labels)
    gram = sums.compute()

    def ours() -> list[float]:
        return [float(left_out_errors(gram.subset(pair), (_STRENGTH,)).sum()) for pair in pairs]

    def theirs() -> list[float]:
        return [
            left_out_error_by_refitting([features[name] for name in pair], labels, 4, _PIECES, _STRENGTH)
            for pair in pairs
        ]

    def agree(a: list[float], b: list[float]) -> bool:
        return max(abs(x - y) / y for x, y in zip(a, b, strict=True)) < 1e-6

    sizes: dict[str, Any] = {"images": images, "activations": activations, "sets": len(pairs), "pieces": _PIECES}
    name = "errors of many sets from moments, against refitting on the pixels"
    return Case(name, sizes, ours, theirs, agree, goal=20.0)
