"""The score S3 (section 9): are points found again in a moved copy of their image, with independent noise?

A point's feature, of one noise draw, is compared with all places of the moved image under another draw, which was
turned, scaled, shifted and recolored. The point is found if the most similar place lies within a tenth of the image
from where the movement took it.

The same among the other images of the group (S3d), and matches there and back between different images (S4), were
measured too. On the zoo's models S3d ranked no better than S3, and S4 much worse, so neither is computed any more.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.interpolation import sampled, sampling
from diffusion_featsel.match import Search, largest
from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import Views

NEAR = 0.1
"""Distance, as a share of the image's sides, within which a point counts as found."""
_GRID = 32  # least rows and columns of places that a point is compared with


@dataclass
class SelfMatchSums(Sums):
    """Sums over points.

    Attributes:
        found: Number of points that were found.
        count: Number of points that stayed in the image.
    """

    found: Float[Tensor, ""]
    count: Float[Tensor, ""]

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> "SelfMatchSums":
        """Returns sums over no image.

        Args:
            device: Device that the sums are kept on.
        """
        return cls(zeros(device=device), zeros(device=device))

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation, with those of the moved images.

        Raises:
            ValueError: There are no maps of moved images.
        """
        if views.moved is None:
            raise ValueError("the views have no `moved` maps; run the network on the moved images too")
        batch, source, target = views.batch, views.draws[0], views.moved
        center = (views.means[0] + target.mean((2, 3))) / 2
        cells, weights = batch.kept("sampling", views.grid, lambda: sampling(batch.points, views.grid))
        descriptors = F.normalize(sampled(source, cells, weights) - center[:, None], dim=2)
        height, width = (max(side, _GRID) for side in views.grid)
        search = Search((target - center[..., None, None],), (height, width))
        place = torch.cat([largest(cosines) for cosines in search.cosines(descriptors)], 1)
        at = torch.stack([(place % width + 0.5) / width, (place // width + 0.5) / height], -1)
        self.found += ((at - views.batch.moved).square().sum(-1).sqrt() <= NEAR).sum()  # NaN is never near
        self.count += (~views.batch.moved.isnan().any(-1)).sum()

    @property
    def share(self) -> float | None:
        """Share of the points that were found (S3), from 0 to 1."""
        return float(self.found / self.count) if float(self.count) else None
