"""Assignment that knows of text, and of other conditions that are never equal: noise prefers images of like conditions.

Noise that is assigned by images alone depends on them, and so on their conditions: training then sees p(n | c) that
sampling does not draw. For labels, `assign_noise` exchanges noise inside a label only. Conditions that are vectors
(text embeddings) have no blocks; here the noise drawn with row j also carries condition c_j, and the cost of giving it
to image i is

    |x_i - n_j|^2 + w (1 - cos(c_i, c_j)).

A large weight w keeps noise near its condition, w = 0 ignores conditions. The weight is found so that a stated share of
all pairs could still exchange their noise with profit:

    r(w) = mean over i, j of 1[|x_i - n_j|^2 + w (1 - cos(c_i, c_j)) <= |x_i - n_i|^2].

References:
    Cheng and Schwing 2025, "The Curse of Conditions: Analyzing and Improving Optimal Transport for Conditional
    Flow-Based Generation" (C2OT), which names the weight and its search.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .assign import solve_costs
from .batch import check_pair, check_strength, choose_rows, non_finite_message
from .cost import cost_matrix

_STEPS = 10
_MOST = 1e3  # of what an exchange can gain: beyond, only conditions nearly equal could still exchange


class SoftAssignment(NamedTuple):
    """Noise that was assigned with respect to conditions.

    Attributes:
        noise: Rows of the noise that was given, in the order of the images.
        weight: Weight w of the conditions; the next batch starts its search from it.
        share: Share r(w) of pairs that this weight leaves, on the device.
    """

    noise: Float[Tensor, "b *data"]
    weight: Float[Tensor, ""]
    share: Float[Tensor, ""]


@torch.no_grad()
def assign_noise_softly(
    x: Float[Tensor, "b *data"],
    noise: Float[Tensor, "b *data"],
    conditions: Float[Tensor, "b *features"],
    *,
    target: float = 0.01,
    start: Float[Tensor, ""] | float = 1.0,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
) -> SoftAssignment:
    """Returns the rows of `noise` in an order that brings each near its image and its condition.

    Args:
        x: Clean batch as the diffusion sees it.
        noise: Independent Gaussian noise of the same shape.
        conditions: Condition of each image, such as its text embedding, compared by the cosine of flattened rows.
        target: Share of pairs that may still exchange noise with profit, in (0, 1]; smaller is nearer to ordinary
            training. The published values are 0.01 in the paper and 0.2 in the code for small images. Every row and its
            own noise are one of these pairs: at one over the number of rows, unlike conditions exchange nothing.
        start: Weight that the search starts from: that of the batch before, which it hardly differs from.
        strength: Share of the rows, chosen at random, that exchange their noise; the others keep theirs.
        generator: Source of the choice of rows, for `strength` between 0 and 1.

    Raises:
        ValueError: Shapes differ, `target` or `strength` is out of its range, or a tensor holds NaN or infinity.

    Example:
        >>> x, noise, text = torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8), torch.randn(16, 32)
        >>> found = assign_noise_softly(x, noise, text, target=0.1)
        >>> found = assign_noise_softly(x, noise, text, target=0.1, start=found.weight)
        >>> found.noise.shape, abs(float(found.share) - 0.1) < 0.02
        (torch.Size([16, 4, 8, 8]), True)
    """
    check_pair(x, noise)
    if len(conditions) != len(x):
        raise ValueError(f"conditions has {len(conditions)} rows, x has {len(x)}; give one for each image")
    if not 0 < target <= 1:
        raise ValueError(f"target is {target}; give a share above 0, up to 1")
    check_strength(strength)
    rows = choose_rows(len(x), strength, generator).to(x.device)
    if len(rows) < len(x):
        try:
            found = assign_noise_softly(x[rows], noise[rows], conditions[rows], target=target, start=start)
        except ValueError:  # which counts the chosen rows alone
            raise ValueError(non_finite_message(x=x, noise=noise, conditions=conditions)) from None
        assigned = noise.clone()
        assigned[rows] = found.noise
        return SoftAssignment(assigned, found.weight, found.share)
    if len(x) < 2:
        return SoftAssignment(noise.clone(), torch.as_tensor(float(start)), torch.ones(()))
    images, drawn = x.flatten(1).float(), noise.flatten(1).float()
    distance = (2 * cost_matrix(images, drawn)).add_(drawn.square().sum(1))  # less |x_i|^2, which both sides hold
    unit = functional.normalize(conditions.flatten(1).float(), dim=1)
    apart = (1 - unit @ unit.T).clamp_min(0).fill_diagonal_(0)
    weight = _weight(distance, apart, target, start)
    try:
        columns = solve_costs(distance + weight * apart)
    except ValueError:
        raise ValueError(non_finite_message(x=x, noise=noise, conditions=conditions)) from None
    return SoftAssignment(noise[columns.to(noise.device)], weight, _share(distance, apart, weight))


def _weight(distance: Tensor, apart: Tensor, target: float, start: Tensor | float) -> Tensor:
    """Returns the weight at which r is the target: times or over 4 until it is passed, then halved in between.

    Where the target lies below what any weight leaves, such as one condition for all, the weight stops at a bound.
    """
    most = _MOST * (distance.diagonal()[:, None] - distance).amax()
    weight = torch.as_tensor(start, dtype=distance.dtype, device=distance.device).clamp_min(1e-6).minimum(most)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    for _ in range(2 * _STEPS):
        above = _share(distance, apart, weight) > target  # too many may exchange: the weight must grow
        low, high = torch.where(above, weight, low), torch.where(above, high, weight)
        weight = torch.where(high.isinf(), 4 * weight, torch.where(low == 0, weight / 4, (low + high) / 2))
        weight = weight.minimum(most)
    return weight


def _share(distance: Tensor, apart: Tensor, weight: Tensor) -> Tensor:
    """Returns r(w), without waiting for the device."""
    return (distance + weight * apart <= distance.diagonal()[:, None]).float().mean()
