"""Locality (section 3.2): are neighboring cells alike for being neighbors, whatever they show?

Pairs of neighboring and of distant cells count where the most similar cells in another image disagree, so that both
cells show different things. Every second image is paired with the next one, from a fixed number of anchor cells, and
cosines are those of maps whose channels were centered by the mean over both images.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import Views, directions

_FAR = 0.25


@dataclass
class LocalitySums(Sums):
    """Sums over anchor cells.

    Attributes:
        near: Sum of the cosines of anchors and their neighbors, and their number.
        far: Sum of the cosines of anchors and cells at least a quarter of the image away, and their number.
    """

    near: Float[Tensor, " 2"]
    far: Float[Tensor, " 2"]

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "LocalitySums":
        """Returns sums over no image.

        Args:
            device: Device that the sums are kept on.
        """
        return cls(zeros(2, device=device), zeros(2, device=device))

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation.
        """
        height, width = views.grid
        count = len(views.batch) // 2
        if height * width < 2 or count == 0:
            return
        mine, other = views.draws[0].flatten(2)[: 2 * count].unflatten(0, (count, 2)).unbind(1)
        center = (mine.mean(2) + other.mean(2))[..., None] / 2
        a, b = directions(mine - center), directions(other - center)
        cells = _cells(views.batch.anchors[: 2 * count : 2], views.grid)
        anchors, neighbors, distant = (_flat(places, width) for places in cells)
        from_anchor, from_neighbor, from_distant = (_take(a, places) for places in (anchors, neighbors, distant))
        # (3 q, places) cosines with the other image.
        forward = torch.cat([from_anchor, from_neighbor, from_distant], 2).transpose(1, 2) @ b
        at_anchor, at_neighbor, at_distant = forward.argmax(2).tensor_split(3, 1)
        for sums, places, theirs, arrived in (
            (self.near, neighbors, from_neighbor, at_neighbor),
            (self.far, distant, from_distant, at_distant),
        ):
            counted = (arrived != at_anchor) & (places != anchors)
            sums[0] += ((from_anchor * theirs).sum(1) * counted).sum()
            sums[1] += counted.sum()

    @property
    def locality(self) -> float | None:
        """Cosine of neighboring cells beyond that of distant ones, (near - far) / (1 - far)."""
        if not float(self.near[1]) or not float(self.far[1]):
            return None
        near, far = (float(sums[0] / sums[1]) for sums in (self.near, self.far))
        return (near - far) / max(1 - far, 1e-6)


def _cells(anchors: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, x) of the anchors, of a neighbor in the same row or column, and of a cell far from each."""
    sides = torch.tensor(grid, device=anchors.device)
    cell = (anchors * sides).long()
    # A second use of the same random numbers: their lower digits choose the direction.
    fine = (anchors * sides * 4).frac()
    along_y = ((fine[..., 0] < 0.5) & (sides[0] > 1)) | (sides[1] == 1)
    step = torch.stack([along_y, ~along_y], -1).long()
    neighbor = torch.where(cell + step < sides, cell + step, cell - step)
    reach = (_FAR * sides.max()).ceil().long()
    distant = (cell + (sides // 2).clamp(min=1)) % sides
    distant = torch.where(((distant - cell).abs().amax(-1, keepdim=True) >= reach), distant, cell)
    return cell, neighbor, distant


def _flat(cells: Tensor, width: int) -> Tensor:
    return cells[..., 0] * width + cells[..., 1]


def _take(maps: Tensor, cells: Tensor) -> Tensor:
    """Returns (n, c, q) values of (n, c, places) at (n, q) cells."""
    return maps.gather(2, cells[:, None].expand(-1, maps.shape[1], -1))
