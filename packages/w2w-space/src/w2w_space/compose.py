"""Adapters added to one adapter: the exact weighted sum of their changes, and when a sum is no merge.

The change of each weight is the sum of w_j B_j A_j, which is the product of the factors side by side: nothing is
averaged, and ranks and alphas may differ. Averaging factors instead, as some tools do, adds cross terms w_i w_j B_i A_j
that no adapter has.

Two subjects of one space cannot be merged in this way: their sum is a third subject (paper, appendix H). A style that
has little in common with the space can be added. How much it has in common is the share of its squared norm that lies
in the span of the space's own changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.adapters import Adapter, LowRank
from diffcore.adapters.keys import BACKBONE
from diffcore.errors import IncompatibleModelError, UserError, printable
from w2w_space.ranks import RankLoss, adapter_at_rank
from w2w_space.space import Point, WeightSpace

FOREIGN = 0.1
"""Share inside a space up to which an adapter can be added to a subject of the space."""
_MEMBERS, _COMPONENTS = 512, 256  # members, and leading components, whose changes stand for the span of a space
_SMALLEST = 1e-10  # eigenvalue of the span's inner products, relative to the largest, that is more than rounding


@dataclass(frozen=True, eq=False)
class Composition:
    """A sum of adapters.

    Attributes:
        adapter: The sum, whose change is the weighted sum of the changes.
        losses: Loss of each module where the rank was cut; empty where the sum is exact.
    """

    adapter: Adapter
    losses: dict[str, RankLoss] = field(default_factory=dict)


def compose(
    adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None, name: str = "composed"
) -> Composition:
    """Returns the weighted sum of the adapters' changes, those of text encoders too.

    Args:
        adapters: Adapters of one base model, of any ranks; each may change modules that others do not.
        weights: One real number for each adapter, negative ones too.
        rank: Rank of every module of the result; by default as many as the factors have together, which loses nothing.
        name: Name of the result in messages.

    Raises:
        IncompatibleModelError: The adapters belong to different kinds of models, or change weights of different shapes.
        UserError: There is no adapter, or a weight is not finite, or all are zero.

    Example:
        >>> one = Adapter.from_factors({"to_q": (torch.ones(1, 3), torch.ones(2, 1))})
        >>> two = Adapter.from_factors({"to_q": (torch.eye(3), torch.ones(2, 3))}, alpha=6.0)
        >>> compose([one, two], [0.5, -1.0]).adapter.modules["to_q"].delta()[0].tolist()
        [-1.5, -1.5, -1.5]
    """
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"there are {len(adapters)} `adapters` and {len(weights)} `weights`; give as many, and one")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise UserError(f"`weights` are {', '.join(f'{w:g}' for w in weights)}; give finite ones that are not all zero")
    parts: dict[str, dict[str, LowRank]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter.backbone != adapters[0].backbone:
            raise IncompatibleModelError(
                f"{printable(adapter.name)} changes a {adapter.backbone}, {printable(adapters[0].name)} a "
                f"{adapters[0].backbone}; add adapters of one base model"
            )
        for component, module, change in adapter if weight else ():
            changes = parts.setdefault(component, {})
            before = changes.get(module)
            if before is not None and before.shape != change.shape:
                raise IncompatibleModelError(
                    f"{printable(adapter.name)} changes {module!r} of shape {change.shape}, the others of shape "
                    f"{before.shape}: they are adapters of different base models"
                )
            changes[module] = _added(before, change, weight)
    whole = Adapter(parts.pop(BACKBONE, {}), parts, adapters[0].backbone, name)
    return Composition(whole) if rank is None else Composition(*adapter_at_rank(whole, rank))


def combined(points: Sequence[Point], weights: Sequence[float]) -> Point:
    """Returns the point whose deviation from the mean is the weighted sum of those of some points.

    Weights that sum to 1 give an interpolation. The result is another subject and not both of them.

    Args:
        points: Points of one space.
        weights: One real number for each point.

    Raises:
        UserError: There is no point, the points belong to different spaces, or a weight is not finite.
    """
    if not points or len(points) != len(weights) or not all(map(math.isfinite, weights)):
        raise UserError(f"there are {len(points)} `points` and {len(weights)} `weights`; give as many finite numbers")
    scaled = [Point(point.space, weight * point.z) for point, weight in zip(points, weights, strict=True)]
    return sum(scaled[1:], scaled[0])


def share_inside(space: WeightSpace, adapter: Adapter) -> float:
    """Returns the share of the squared Frobenius norm of an adapter's changes inside the span of a space's changes.

    The span is that of the changes B A of the points one standard deviation up and down each component, of the mean,
    and of the members, where the space has them: up to 256 components and 512 members. All inner products go through
    the factors. Near 0 for an adapter of another kind, near 1 for an exported point; an
    adapter of the space's own kind, which has noise of its own, lies in between.

    Args:
        space: Space that the adapter is held against.
        adapter: Adapter of the same base model, of any rank; modules that the space lacks lie outside.

    Raises:
        UserError: The adapter changes nothing.

    Example:
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (20, 20)}, rank=1), torch.Generator().manual_seed(0)
        >>> population = Population(layout, tuple("abcd"), Stacked(torch.randn(4, 40, generator=g)))
        >>> space = WeightSpace.build(population)
        >>> round(share_inside(space, space.member("b").adapter()), 4)
        1.0
        >>> share_inside(space, layout.adapter(torch.randn(40, generator=g))) < 0.1
        True
    """
    layout, z = space.layout, _spanning(space)
    inner = torch.zeros(len(z), len(z), dtype=torch.float64)
    along = torch.zeros(len(z), dtype=torch.float64)
    scaled = z.to(space.mean) * space.sigma
    for place, (module, span) in enumerate(zip(layout.modules, layout.spans, strict=True)):
        block = space.mean[span] + space.scale[span] * (scaled @ space.components[:, span])
        down, up = layout.split(block.double(), place)
        inner += _inner(down, up, down, up)
        if (change := adapter.modules.get(module)) is not None:
            if change.shape != layout.shapes[place]:
                raise IncompatibleModelError(
                    f"{printable(adapter.name)} changes {module!r} of shape {change.shape}, the space of shape "
                    f"{layout.shapes[place]}: they belong to different base models"
                )
            theirs = change.down.flatten(1).double()[None], _strength(change) * change.up.double()[None]
            along += _inner(down, up, *theirs)[:, 0]
    total = sum(_squared_norm(change) for _, _, change in adapter)
    if total == 0:
        raise UserError(f"{printable(adapter.name)} changes nothing: all its products are zero")
    values, vectors = torch.linalg.eigh(inner)
    more = values > _SMALLEST * values[-1]
    return min(float((vectors[:, more].T @ along).square().div(values[more]).sum()) / total, 1.0)


def _spanning(space: WeightSpace) -> Float[Tensor, "k m"]:
    """Returns the coordinates of points whose changes stand for those of all points."""
    m = space.num_components
    steps = torch.eye(m)[:_COMPONENTS]
    some = torch.linspace(0, len(space.members) - 1, min(len(space.members), _MEMBERS)).round().long()
    parts = [torch.zeros(1, m), steps, -steps]
    return torch.cat([*parts, space.members[some].float()]) if len(some) else torch.cat(parts)


def _inner(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor) -> Float64[Tensor, "k l"]:
    """Returns the inner products of two batches of changes B A, as sums over (A A'^T) * (B^T B')."""
    if down.shape[1] == other_down.shape[1] == 1:
        return (down[:, 0] @ other_down[:, 0].T) * (up[..., 0] @ other_up[..., 0].T)
    found = torch.zeros(len(down), len(other_down), dtype=torch.float64)
    for a, b in zip(down.unbind(1), up.unbind(2), strict=True):
        for c, d in zip(other_down.unbind(1), other_up.unbind(2), strict=True):
            found += (a @ c.T) * (b @ d.T)
    return found


def _added(before: LowRank | None, change: LowRank, weight: float) -> LowRank:
    wide = torch.promote_types(torch.promote_types(change.down.dtype, change.up.dtype), torch.float32)
    down, up = change.down.to(wide), weight * _strength(change) * change.up.to(wide)
    if before is not None:
        down, up = torch.cat([before.down, down]), torch.cat([before.up, up], 1)
    return LowRank(down, up, float(len(down)))


def _strength(change: LowRank) -> float:
    return change.alpha / change.rank


def _squared_norm(change: LowRank) -> float:
    down, up = change.down.flatten(1).double(), change.up.double()
    return _strength(change) ** 2 * float(((down @ down.T) * (up.T @ up)).sum())
