"""The scores S3 and S3d (section 9): are points found again in a moved copy of their image, with independent noise?

A point's feature, of one noise draw, is compared with all places of the moved image under another draw, which was
turned, scaled, shifted and recolored. The point is found if the most similar place lies within a tenth of the image
from where the movement took it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.match import FeaturePair, Search
from diffusion_featsel.places import NEAR
from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import Views, directions

_GRID = 32  # least rows and columns of places that a point is compared with


@dataclass
class SelfMatchSums(Sums):
    """Sums over points.

    Attributes:
        found: Number of points that were found, and of these, that were also more similar to the moved image than to
            any other moved image of the group.
        count: Number of points that stayed in the image.
    """

    found: Float[Tensor, " 2"]
    count: Float[Tensor, ""]

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "SelfMatchSums":
        """Returns sums over no image.

        Args:
            device: Device that the sums are kept on.
        """
        return cls(zeros(2, device=device), zeros(device=device))

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation, with those of the moved images.

        Raises:
            ValueError: There are no maps of moved images.
        """
        if views.moved is None:
            raise ValueError("the views have no `moved` maps; run the network on the moved images too")
        pair = FeaturePair.of({"": views.draws[0]}, {"": views.moved}, center="pair")
        descriptors = pair.descriptors(views.batch.points)
        height, width = (max(side, _GRID) for side in views.grid)
        search = Search(pair.target, (height, width))
        cosines = torch.cat(list(search.cosines(descriptors)), 1).flatten(2)
        best, place = cosines.max(2)
        at = torch.stack([(place % width + 0.5) / width, (place // width + 0.5) / height], -1)
        near = (at - views.batch.moved).square().sum(-1).sqrt() <= NEAR  # NaN is never near
        self.found += torch.stack([near.sum(), (near & (best >= _best_elsewhere(views, pair, descriptors))).sum()])
        self.count += (~views.batch.moved.isnan().any(-1)).sum()

    @property
    def share(self) -> float | None:
        """Share of the points that were found (S3)."""
        return float(self.found[0] / self.count) if float(self.count) else None

    @property
    def share_among(self) -> float | None:
        """Share of the points that were found among the other images of the group too (S3d)."""
        return float(self.found[1] / self.count) if float(self.count) else None


def _best_elsewhere(views: Views, pair: FeaturePair, descriptors: Tensor) -> Tensor:
    """Returns the largest cosine of each point with a cell of the group's other moved images."""
    columns = directions(pair.target[0].flatten(2))
    first = views.batch.first
    best = []
    for group in views.batch.groups:
        rows = slice(group.start - first, group.stop - first)
        mine = columns[rows]
        cosines = torch.einsum("nkc,mcp->nkmp", descriptors[rows], mine).amax(3)
        own = torch.eye(len(mine), dtype=torch.bool, device=cosines.device)[:, None]
        best.append(cosines.masked_fill(own, -torch.inf).amax(2))
    return torch.cat(best)
