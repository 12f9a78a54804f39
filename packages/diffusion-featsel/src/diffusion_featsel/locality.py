"""Locality (section 3.2): are neighboring cells alike for being neighbors, whatever they show?

Pairs of neighboring and of distant cells count where the most similar cells in another image disagree, so that both
cells show different things. Every second image is paired with the next one, from a fixed number of anchor cells, and
cosines are those of maps whose channels were centered by the mean over both images.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.match import largest
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
        count = len(views.batch) // 2
        if views.grid == (1, 1) or count == 0:
            return
        mine, other = views.draws[0].flatten(2)[: 2 * count].unflatten(0, (count, 2)).unbind(1)
        center = views.means[0, : 2 * count].unflatten(0, (count, 2)).mean(1)[..., None]
        places = views.batch.kept(
            "places", views.grid, lambda: _places(views.batch.anchors[: 2 * count : 2], views.grid)
        )
        # (n, c, 3 q): anchors, neighbors and distant cells one after the other.
        cells = directions(mine.gather(2, places[:, None].expand(-1, mine.shape[1], -1)) - center)
        b = other - center
        lengths = b.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()
        forward = (cells.transpose(1, 2) @ b).mul_(lengths)
        arrived = largest(forward.unflatten(2, views.grid))
        at_anchor, at_neighbor, at_distant = arrived.tensor_split(3, 1)
        anchors, neighbors, distant = places.tensor_split(3, 1)
        from_anchor, from_neighbor, from_distant = cells.tensor_split(3, 2)
        for sums, at, theirs, there in (
            (self.near, neighbors, from_neighbor, at_neighbor),
            (self.far, distant, from_distant, at_distant),
        ):
            counted = (there != at_anchor) & (at != anchors)
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


def _places(anchors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the anchors, a neighbor of each, and a cell far from each, as places counted row by row."""
    return torch.cat([cells[..., 0] * grid[1] + cells[..., 1] for cells in _cells(anchors, grid)], 1)
