"""One rank for all: changes of other ranks are cut to the nearest change of this rank, or padded with zeros."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.adapters import Adapter, LowRank
from diffcore.adapters.keys import BACKBONE


@dataclass(frozen=True)
class RankLoss:
    """What is lost where a change is cut to a smaller rank.

    Attributes:
        lost: Sum of the squared singular values that are left out.
        total: Sum of all squared singular values.
    """

    lost: float
    total: float

    @property
    def relative(self) -> float:
        """Frobenius norm of what is lost, divided by that of the change; 0 for a zero change."""
        return (self.lost / self.total) ** 0.5 if self.total > 0 else 0.0


def at_rank(change: LowRank, rank: int) -> tuple[LowRank, RankLoss]:
    """Returns the nearest change of a rank, in the Frobenius norm, and what was lost; the product is never formed.

    With thin factorisations B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of R_B R_A^T.

    Args:
        change: Change of one weight, of any rank.
        rank: Rank of the result; a smaller change is padded with zeros.

    Raises:
        ValueError: The rank is below 1.

    Example:
        >>> change = LowRank(torch.eye(3), torch.diag(torch.tensor([3.0, 4.0, 0.0])), alpha=3.0)
        >>> cut, loss = at_rank(change, 1)
        >>> cut.rank, round(loss.relative, 6)
        (1, 0.6)
    """
    if rank < 1:
        raise ValueError(f"`rank` is {rank}; give at least 1")
    scale, down, up = change.alpha / change.rank, change.down.flatten(1).double(), change.up.double()
    if change.rank <= rank:
        up = scale * up
        total = float((down @ down.T * (up.T @ up)).sum())
        if more := rank - change.rank:
            down = torch.cat([down, down.new_zeros(more, down.shape[1])])
            up = torch.cat([up, up.new_zeros(len(up), more)], 1)
        return _change(down, up, change), RankLoss(0.0, total)
    q_up, r_up = torch.linalg.qr(scale * up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root, energy = values[:rank].sqrt(), values.square()
    down, up = root[:, None] * (q_down @ right[:rank].T).T, (q_up @ left[:, :rank]) * root
    more = rank - len(root)  # a small weight has fewer singular values than the rank that is asked for
    pad = torch.nn.functional.pad
    cut = _change(pad(down, (0, 0, 0, more)), pad(up, (0, more)), change)
    return cut, RankLoss(float(energy[rank:].sum()), float(energy.sum()))


def adapter_at_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, RankLoss]]:
    """Returns an adapter with every change at one rank, those of text encoders too, and the loss of each module.

    Args:
        adapter: Adapter of any ranks.
        rank: Rank of the result; smaller changes are padded with zeros.

    Raises:
        ValueError: The rank is below 1.

    Example:
        >>> change = LowRank(torch.eye(3), torch.diag(torch.tensor([3.0, 4.0, 0.0])), alpha=3.0)
        >>> cut, losses = adapter_at_rank(Adapter({"to_q": change}), 2)
        >>> cut.modules["to_q"].rank, losses["to_q"].relative
        (2, 0.0)
    """
    parts: dict[str, dict[str, LowRank]] = {}
    losses = {}
    for component, module, change in adapter:
        cut, loss = at_rank(change, rank)
        parts.setdefault(component, {})[module] = cut
        losses[module if component == BACKBONE else f"{component}: {module}"] = loss
    return Adapter(parts.pop(BACKBONE, {}), parts, adapter.backbone, adapter.name), losses


def _change(down: Tensor, up: Tensor, like: LowRank) -> LowRank:
    shape = (down.shape[0], *like.down.shape[1:])
    return LowRank(down.reshape(shape).float().contiguous(), up.float().contiguous(), float(down.shape[0]))
