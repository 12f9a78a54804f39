"""Benchmark cases: the assignment against the published code and against what other trainers do.

The reference functions restate, in a few lines each, what public training scripts compute; they run on the same tensors
and on the same machine in turn with ours.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffcore.bench import Case
from immiscible_noise.ahead import AssignedAhead
from immiscible_noise.assign import assign_noise
from immiscible_noise.cost import Cost, cost_matrix, pair_costs
from immiscible_noise.select import select_noise
from immiscible_noise.solvers import HostSolver, Solver, has_lapx, reduced_costs, solve, solve_in_place

Images = Float[Tensor, "b channels height width"]
_DENSE: tuple[HostSolver, ...] = ("scipy", "lapx") if has_lapx() else ("scipy",)
_TIMED = (192, 256, 384, 512, 768, 1024)  # images in a batch


def cases(*, smoke: bool = False) -> list[Case]:
    """Returns the benchmark of this package.

    Args:
        smoke: Whether sizes are tiny, for a check of agreement only.
    """
    pixels = partial(_pair, shape=(3, 8, 8) if smoke else (3, 32, 32))
    latents = partial(_pair, shape=(4, 8, 8) if smoke else (4, 64, 64))
    small, large = (16, 32) if smoke else (256, 1024)
    large_pixels, same = pixels(large), partial(_assignment, same_cost=True)
    dense = partial(_assignment, solver="scipy")  # what "auto" takes for few rows, where lapx is not installed
    result = [
        dense("assign, against the authors' way", pixels(small), authors_assignment, goal=50.0),
        _assignment("assign, against the authors' way", large_pixels, authors_assignment, goal=50.0),
        dense("peak memory to assign, authors' way", latents(small), authors_assignment, memory=20.0),
        _assignment("assign, against cdist and scipy", large_pixels, cdist_assignment, goal=1.7),
        same("assign by the published cost, against cdist and scipy", large_pixels, cdist_assignment, cost="l2"),
        _rounded(large_pixels),
        _selection(pixels(max(small, 64)), k=4),
        _selection(latents(32), k=64, memory=8.0),
        *(_solvers(pixels(size), other) for other in _DENSE for size in (_TIMED[:1] if smoke else _TIMED)),
        _training(16 if smoke else 256, (3, 16, 16) if smoke else (3, 32, 32)),
    ]
    if torch.cuda.is_available():
        result += [_solvers_on_device(pixels(size)) for size in (_TIMED[:1] if smoke else _TIMED)]
    if has_lapx():
        plain = partial(_assignment, solver="lapx")
        result.append(plain("assign with lapx, against cdist and scipy", large_pixels, cdist_assignment, goal=2.5))
    return result


def synthetic_images(size: int, shape: tuple[int, int, int], *, seed: int = 0) -> Images:
    """Returns image-like tensors of zero mean and unit variance: smooth low-rank content and a little white noise."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(size, 48, generator=generator) @ torch.randn(48, shape[0] * 8 * 8, generator=generator)
    smooth = F.interpolate(content.reshape(size, shape[0], 8, 8), size=shape[1:], mode="bilinear")
    images = smooth / smooth.std() + 0.3 * torch.randn(size, *shape, generator=generator)
    return (images - images.mean()) / images.std()


def authors_assignment(x: Images, noise: Images, *, rows: int = 256) -> Images:
    """Assigns as the authors' Stable Diffusion script does, in blocks of rows where the whole would not fit.

    Half-precision broadcast differences scaled by 0.10, their norms, and scipy on the unsquared distances. Whole
    batches of 256 as in the script; the temporary of 1024 images at 32x32 would take 6 GB.
    """
    scaled_x, scaled_noise = (0.10 * t.half().flatten(1) for t in (x, noise))
    blocks = [torch.linalg.vector_norm(part[:, None] - scaled_noise[None], dim=2) for part in scaled_x.split(rows)]
    return noise[linear_sum_assignment(torch.cat(blocks).cpu().numpy())[1]]


def cdist_assignment(x: Images, noise: Images) -> Images:
    """Assigns as several trainers do: pairwise distances and scipy."""
    return noise[linear_sum_assignment(torch.cdist(x.flatten(1), noise.flatten(1)).cpu().numpy())[1]]


def authors_selection(x: Images, *, k: int, seed: int) -> Images:
    """Selects the nearest of k as the authors' scripts do: all candidates and half-precision differences at once."""
    noise = torch.randn(len(x), k, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
    distances = torch.linalg.vector_norm((x.half()[:, None] - noise.half()).flatten(2), dim=2)
    return noise[torch.arange(len(x)), distances.argmin(1)]


def _pair(size: int, shape: tuple[int, int, int]) -> tuple[Images, Images]:
    return synthetic_images(size, shape), torch.randn(size, *shape, generator=torch.Generator().manual_seed(1))


def _assignment(
    name: str,
    pair: tuple[Images, Images],
    reference: Callable[[Images, Images], Images],
    *,
    solver: Solver = "sparse",
    cost: Cost = "sq",
    same_cost: bool = False,
    goal: float | None = None,
    memory: float | None = None,
) -> Case:
    x, noise = pair

    def agree(ours: Images, theirs: Images) -> bool:
        # Both use each row of noise once; ours is no worse by its cost, and equal where the reference minimises it too.
        used = all(torch.equal(_sorted_rows(result), _sorted_rows(noise)) for result in (ours, theirs))
        best, found = (_total(x, result, cost) for result in (ours, theirs))
        return used and best <= found * (1 + 1e-6) and (not same_cost or found <= best * (1 + 1e-6))

    return Case(
        name,
        _sizes(x),
        ours=partial(assign_noise, x, noise, cost=cost, solver=solver),
        reference=partial(reference, x, noise),
        agree=agree,
        goal=goal,
        memory_goal=memory,
    )


def _rounded(pair: tuple[Images, Images]) -> Case:
    """Returns the case of bfloat16 costs against float32 costs, with a bound on the gain that rounding loses."""
    x, noise = pair
    assign = partial(assign_noise, x, noise, solver="sparse")
    independent, exact, rounded = (_total(x, met, "sq") for met in (noise, assign(), assign(precision="bfloat16")))
    lost = (rounded - exact) / (independent - exact)
    bound = next((bound for bound in (0.0001, 0.001, 0.01) if lost < bound), 1.0)
    return Case(
        "assign with bfloat16 costs, against float32",
        {**_sizes(x), "gain_lost": f"<{bound:.2%}"},
        ours=partial(assign, precision="bfloat16"),
        reference=assign,
        agree=lambda ours, theirs: bound < 0.01 and _total(x, ours, "sq") <= _total(x, theirs, "sq") * (1 + 1e-3),
    )


def _selection(pair: tuple[Images, Images], *, k: int, memory: float | None = None) -> Case:
    x, _ = pair
    return Case(
        f"select the nearest of {k}, against the authors' way",
        _sizes(x),
        ours=lambda: select_noise(x, k, generator=torch.Generator().manual_seed(2)),
        reference=partial(authors_selection, x, k=k, seed=3),
        # The draws come in another order, so the mean distances are compared.
        agree=lambda ours, theirs: abs(_total(x, ours, "l2") / _total(x, theirs, "l2") - 1) < 0.02,
        memory_goal=memory,
    )


def _solvers(pair: tuple[Images, Images], other: HostSolver) -> Case:
    """Returns the case of the sparse solver against a dense one; `read_thresholds` takes "auto"'s choice from it."""
    costs = cost_matrix(*(tensor.flatten(1) for tensor in pair))
    table, rows = costs.numpy(), np.arange(len(costs))

    def agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
        best, found = (float(table[rows, columns].sum(dtype=np.float64)) for columns in (theirs, ours))
        return len(set(ours.tolist())) == len(rows) and abs(found - best) <= 1e-6 * abs(best)

    return Case(
        f"solve few of the pairs, against {other}",
        {"batch": len(costs)},
        ours=partial(solve, table, "sparse"),
        reference=partial(solve, table, other),
        agree=agree,
    )


def _solvers_on_device(pair: tuple[Images, Images]) -> Case:
    """Returns the case of the sparse solver against potentials, with all costs on the accelerator."""
    costs = cost_matrix(*(tensor.cuda().flatten(1) for tensor in pair))
    host = costs.cpu().numpy()
    finish = _DENSE[-1]

    def total(columns: np.ndarray) -> float:
        return float(host[np.arange(len(host)), columns].sum(dtype=np.float64))

    return Case(
        "solve few of the pairs, against potentials",
        {"batch": len(costs)},
        ours=lambda: solve_in_place(costs),
        reference=lambda: solve(reduced_costs(costs).cpu().numpy(), finish),
        agree=lambda ours, theirs: ours is not None and abs(total(ours) / total(theirs) - 1) <= 1e-6,
    )


def _training(size: int, shape: tuple[int, int, int], *, steps: int = 2) -> Case:
    """Returns the case of training steps with noise assigned ahead, against the same steps with noise as it is drawn.

    A small U-Net, on one thread. The worker that assigns takes another processor where one is free: its share of the
    processor time of a step, drawing included, is part of the name; it is what a machine without one would lose.
    """
    from immiscible_noise.study.network import unet

    batches = [synthetic_images(size, shape, seed=seed) for seed in range(steps)]
    network = unet(shape, 16, None)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    times = torch.randint(1000, (size,), generator=torch.Generator().manual_seed(0))

    def train(ahead: AssignedAhead) -> list[Tensor]:
        met = []
        for x, noise in ahead:
            share = (times / 1000)[:, None, None, None]
            predicted = network((1 - share) * x + share * noise, times).sample
            optimizer.zero_grad()
            F.mse_loss(predicted, noise - x).backward()
            optimizer.step()
            met.append(noise)
        return met

    def plain() -> list[Tensor]:
        return train(_Drawn(batches))

    def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
        pairs = zip(batches, ours, theirs, strict=True)
        return all(torch.equal(assign_noise(x, drawn), met) and not torch.equal(drawn, met) for x, met, drawn in pairs)

    timed = _Timed(batches)
    start = time.process_time()
    plain()
    step = (time.process_time() - start) / steps
    list(timed)
    taken = timed.seconds / steps / step
    bound = next((bound for bound in (0.005, 0.01, 0.02, 0.05) if taken < bound), 1.0)
    return Case(
        "train with noise assigned ahead, against noise as drawn",
        {"batch": size, "data": "x".join(map(str, shape)), "worker": f"<{bound:.1%} of a step"},
        ours=lambda: train(AssignedAhead(batches)),
        reference=plain,
        agree=agree,
        goal=0.98,
    )


class _Drawn(AssignedAhead):
    """Gives each batch the noise that `AssignedAhead` draws for it, where the training stands and unassigned."""

    def __iter__(self) -> Any:
        plain = AssignedAhead(self.loader, seed=self.seed, strength=0.0)
        for index, batch in enumerate(self.loader):
            yield batch, plain.noises(index, [batch])[0]


class _Timed(AssignedAhead):
    """Adds up the processor time of the thread that assigns."""

    seconds = 0.0

    def noises(self, index: int, batches: Sequence[Any]) -> list[Tensor]:
        start = time.thread_time()
        found = super().noises(index, batches)
        self.seconds += time.thread_time() - start
        return found


def _sizes(x: Images) -> dict[str, int | str]:
    return {"batch": len(x), "data": "x".join(map(str, x.shape[1:]))}


def _total(x: Images, noise: Images, cost: Cost) -> float:
    return float(pair_costs(x.flatten(1), noise.flatten(1), cost=cost).double().sum())


def _sorted_rows(noise: Images) -> Tensor:
    flat = noise.flatten(1)
    return flat[flat[:, 0].argsort()]
