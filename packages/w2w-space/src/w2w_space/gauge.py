"""The canonical gauge: one vector for one adapter, whatever factors it was written with.

The change B A stays the same under A -> G A, B -> B G^-1 for any invertible G, so that one adapter has many vectors.
Adapters that were trained from the same initial A differ little in G; adapters of different people differ wildly, and a
PCA of their factors sees only that. Two steps remove the freedom, module by module:

1. Balance: with the singular value decomposition B A = U S W^T, take B = U S^(1/2) and A = S^(1/2) W^T. What is left is
   an orthogonal matrix Q of r x r, a sign for rank 1.
2. Align: stack J = [A^T; B] and choose Q = polar(J^T R), which brings J Q nearest to a reference R that the population
   shares. For rank 1, R is the leading direction of the population's J; for higher ranks it is found by generalised
   Procrustes analysis: align all to R, take the mean as the new R, a few rounds.

The reference belongs to the space: an adapter that comes later is aligned to it, and gets the vector that it would have
got as a member.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from w2w_space.layout import Layout

GaugeKind = Literal["canonical", "raw"]
_ROUNDS = 10  # of power iteration, or of Procrustes analysis
_MEDOID_OF = 64  # members among which the first reference is looked for
_TIE = 1e-6  # relative overlap with the reference below which the choice of a sign is a coin toss


@dataclass(frozen=True)
class Gauge:
    """The rule that makes the vectors of a population comparable.

    Attributes:
        layout: Table of the vectors.
        reference: Vector whose factors are the reference R of each module; zeros where the rule is "raw".
        kind: "canonical", or "raw" for vectors as they are (published code).
    """

    layout: Layout
    reference: Float[Tensor, " size"]
    kind: GaugeKind = "canonical"

    def __call__(self, vectors: Float[Tensor, "b size"]) -> Float[Tensor, "b size"]:
        """Returns the vectors of the same adapters in this gauge.

        Args:
            vectors: Vectors of adapters, with whatever factors.

        Example:
            >>> layout = Layout.of({"to_q": (4, 3)}, rank=1)
            >>> gauge = Gauge(layout, torch.ones(7))
            >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
            >>> one, other = torch.cat([a, b]), torch.cat([-5 * a, b / -5])
            >>> torch.allclose(*gauge(torch.stack([one, other])))
            True
        """
        return self.of_modules(vectors, range(len(self.layout.modules)))

    def of_modules(self, block: Float[Tensor, "b numbers"], modules: range) -> Float[Tensor, "b numbers"]:
        """Returns the numbers of some modules in this gauge.

        Args:
            block: Numbers of these modules alone.
            modules: Places in the table of modules that follow one another.
        """
        if self.kind == "raw" or not len(modules):
            return block
        done, start = torch.empty_like(block), self.layout.spans[modules[0]].start
        for place in modules:
            span = self.layout.spans[place]
            own = slice(span.start - start, span.stop - start)
            joint = balanced(self.layout, block[:, own], place)
            turns = rotations(joint, joined(self.layout, self.reference[None, span], place)[0])
            done[:, own] = apart(self.layout, turned(joint, turns.matrices), place)
        return done


@dataclass(frozen=True)
class Rotations:
    """The orthogonal matrices that bring the members' factors of one module nearest to a reference.

    Attributes:
        matrices: One matrix per member; for rank 1 a sign.
        ties: Members of rank 1 whose sign is undecided, because they have nothing in common with the reference.
        zero: Members whose change of this module is zero.
    """

    matrices: Float[Tensor, "n r r"]
    ties: Bool[Tensor, " n"]
    zero: Bool[Tensor, " n"]


def joined(layout: Layout, block: Float[Tensor, "n numbers"], module: int) -> Float[Tensor, "n sides r"]:
    """Returns J = [A^T; B] of each member, from the numbers of one module.

    Args:
        layout: Table of the vectors.
        block: Numbers of that module.
        module: Place of the module in the table.
    """
    down, up = layout.split(block, module)
    return torch.cat([down.transpose(1, 2), up], 1)


def apart(layout: Layout, joint: Float[Tensor, "n sides r"], module: int) -> Float[Tensor, "n numbers"]:
    """Returns the numbers of one module from J = [A^T; B], as `joined` takes them.

    Args:
        layout: Table of the vectors.
        joint: Stacked factors of each member.
        module: Place of the module in the table.
    """
    inputs = layout.sides[module][0]
    return torch.cat([joint[:, :inputs].transpose(1, 2).flatten(1), joint[:, inputs:].flatten(1)], 1)


def balanced(layout: Layout, block: Float[Tensor, "n numbers"], module: int) -> Float[Tensor, "n sides r"]:
    """Returns J of factors with equal singular values on both sides: step 1 of the gauge.

    Args:
        layout: Table of the vectors.
        block: Numbers of one module.
        module: Place of the module in the table.
    """
    down, up = layout.split(block, module)
    if layout.rank == 1:
        norms = down.norm(dim=(1, 2)), up.norm(dim=(1, 2))
        ratio = (norms[1] / norms[0].clamp(min=torch.finfo(block.dtype).tiny)).sqrt()[:, None, None]
        empty = (norms[0] * norms[1] == 0)[:, None, None]
        down = (down * ratio).masked_fill(empty, 0.0)
        up = (up / ratio.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
        return torch.cat([down.transpose(1, 2), up], 1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.transpose(1, 2))
    left, values, right = torch.linalg.svd(r_up @ r_down.transpose(1, 2))
    root = values.sqrt()[:, None]
    return torch.cat([q_down @ right.transpose(1, 2) * root, q_up @ left * root], 1)


def rotations(joint: Float[Tensor, "n sides r"], reference: Float[Tensor, "sides r"]) -> Rotations:
    """Returns the orthogonal matrices Q = polar(J^T R): step 2 of the gauge.

    Args:
        joint: Balanced factors of each member.
        reference: Reference R of the module.
    """
    size = joint.norm(dim=(1, 2))
    zero = size == 0
    if joint.shape[2] == 1:
        overlap = joint[:, :, 0] @ reference[:, 0]
        signs = torch.where(overlap < 0, -1.0, 1.0).to(joint)
        ties = (overlap.abs() <= _TIE * size * reference.norm()) & ~zero
        return Rotations(signs[:, None, None], ties, zero)
    left, _, right = torch.linalg.svd(joint.transpose(1, 2) @ reference)
    return Rotations(left @ right, torch.zeros_like(zero), zero)


def turned(joint: Float[Tensor, "n sides r"], matrices: Float[Tensor, "n r r"]) -> Float[Tensor, "n sides r"]:
    """Returns J Q of each member.

    Args:
        joint: Stacked factors of each member.
        matrices: Orthogonal matrix of each member.
    """
    return joint * matrices if joint.shape[2] == 1 else joint @ matrices


def find_reference(joint: Float[Tensor, "n sides r"]) -> Float[Tensor, "sides r"]:
    """Returns the reference that a population's balanced factors of one module share, the same for any gauge of theirs.

    Args:
        joint: Balanced factors of each member.
    """
    if joint.shape[2] == 1:
        # Power iteration on sum_i j_i j_i^T, in which signs cancel; the start is the member of the largest change.
        rows = joint[:, :, 0]
        found = rows[rows.norm(dim=1).argmax()]
        for _ in range(_ROUNDS):
            found = rows.T @ (rows @ found)
            found = found / found.norm().clamp(min=torch.finfo(joint.dtype).tiny)
        return (found * torch.where(found[found.abs().argmax()] < 0, -1.0, 1.0))[:, None]
    found = joint[_medoid(joint)]
    for _ in range(_ROUNDS):
        found = turned(joint, rotations(joint, found).matrices).mean(0)
    # The frame of the member that it began with is arbitrary: take columns that are orthogonal, the longest first.
    found = found @ torch.linalg.svd(found, full_matrices=False)[2].T
    return found * torch.where(found.gather(0, found.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)


def _medoid(joint: Float[Tensor, "n sides r"]) -> int:
    """Returns the member whose J J^T is nearest to all others', among evenly spread ones; no gauge changes it."""
    places = torch.linspace(0, len(joint) - 1, min(len(joint), _MEDOID_OF)).round().long()
    some = joint[places].double()
    inner = torch.einsum("ias,jat->ijst", some, some).square().sum((2, 3))
    own = inner.diagonal()
    distances = (own[:, None] + own[None] - 2 * inner).clamp(min=0).sqrt().sum(1)
    return int(places[distances.argmin()])
