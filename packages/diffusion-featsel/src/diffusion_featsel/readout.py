"""How much of the injected noise, and of the position, a linear map reads out of an activation (section 3.2).

The map is fitted by ridge regression on the even images and tested on the odd ones, from sums of products alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import DIMENSIONS, Views

_RIDGE = 1e-4  # share of the mean square of a channel


@dataclass(frozen=True)
class Targets:
    """What is read out at each place of a batch's images under both draws, with its sums over even and odd images.

    Attributes:
        columns: The targets and a column of ones, for each place, with both draws one after the other.
        total: Sum of the targets.
        squares: Sum of the squared targets.
        count: Number of rows: images times draws times places.
    """

    columns: Float[Tensor, "rows places columns"]
    total: Float[Tensor, "2 k"]
    squares: Float[Tensor, "2 k"]
    count: Float[Tensor, " 2"]

    @classmethod
    def of(cls, values: Float[Tensor, "2 n k h w"], first: int = 0) -> "Targets":
        """Returns the targets with these values.

        Args:
            values: Values at each place, for both draws.
            first: Index of the first image in the data set.
        """
        rows, dtype = values.flatten(3).transpose(2, 3), zeros(device=values.device).dtype
        halves = [rows[:, (half + first) % 2 :: 2].flatten(0, 2) for half in range(2)]
        return cls(
            torch.cat([rows, torch.ones_like(rows[..., :1])], 3).flatten(0, 1),
            torch.stack([half.sum(0, dtype=dtype) for half in halves]),
            torch.stack([half.square().sum(0, dtype=dtype) for half in halves]),
            torch.tensor([float(len(half)) for half in halves], device=values.device),
        )


@dataclass
class ReadoutSums(Sums):
    """Sums of products of channels with what is read out, for even and odd images apart.

    Attributes:
        values: Sum of the channels.
        cross: Sum of the products of channels and targets.
        targets: Sum of the targets.
        squares: Sum of the squared targets.
        count: Number of rows: images times draws times places.
    """

    values: Float[Tensor, "2 d"]
    cross: Float[Tensor, "2 d k"]
    targets: Float[Tensor, "2 k"]
    squares: Float[Tensor, "2 k"]
    count: Float[Tensor, " 2"]

    @classmethod
    def empty(cls, channels: int, num_targets: int, device: torch.device | str = "cpu") -> "ReadoutSums":
        """Returns sums over no image.

        Args:
            channels: Number of channels of the activation.
            num_targets: Number of channels that are read out.
            device: Device that the sums are kept on.
        """
        d, k = min(channels, DIMENSIONS), num_targets
        return cls(*(zeros(*shape, device=device) for shape in ((2, d), (2, d, k), (2, k), (2, k), (2,))))

    def add(self, views: Views, targets: "Targets") -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation.
            targets: Values to be read out at each place, for both draws.
        """
        x, shift = views.centered, views.shift.to(self.values)
        products = torch.bmm(x.flatten(0, 1), targets.columns).unflatten(0, x.shape[:2])
        start = views.batch.first % 2
        for half in range(2):
            total = products[:, (half + start) % 2 :: 2].sum((0, 1))
            self.cross[half] += total[:, :-1] + torch.outer(shift, targets.total[half].to(shift))
            self.values[half] += total[:, -1] + targets.count[half].to(shift) * shift
        self.targets += targets.total
        self.squares += targets.squares
        self.count += targets.count

    def r2(self, second: Float[Tensor, "2 d d"], among: slice = slice(None)) -> float | None:
        """Returns the coefficient of determination on the odd images, averaged over the targets; at least 0.

        Args:
            second: Sums of the products of channels, for even and odd images apart.
            among: Slice of the targets that are averaged over.
        """
        if float(self.count.min()) == 0:
            return None
        counts = self.count[:, None]
        mean_x, mean_y = self.values / counts, self.targets[:, among] / counts
        gram = second / counts[..., None] - mean_x[:, :, None] * mean_x[:, None]
        cross = self.cross[..., among] / counts[..., None] - mean_x[:, :, None] * mean_y[:, None]
        variance = self.squares[:, among] / counts - mean_y.square()
        eye = torch.eye(len(gram[0]), dtype=gram.dtype, device=gram.device)
        scale = float(gram[0].diagonal().mean())
        if scale <= 0 or float(variance.min()) <= 0:
            return None
        weights = torch.linalg.solve(gram[0] + _RIDGE * scale * eye, cross[0])
        # Squared error on the odd images of the map with its own offset: their means may differ from the even ones'.
        shift = (mean_x[1] - mean_x[0]) @ weights - (mean_y[1] - mean_y[0])
        error = variance[1] - 2 * (weights * cross[1]).sum(0) + (weights * (gram[1] @ weights)).sum(0) + shift.square()
        return float((1 - error / variance[1]).clamp(min=0).mean())


def places_of(grid: tuple[int, int], count: int, device: torch.device) -> Float[Tensor, "2 n 2 h w"]:
    """Returns the (y, x) of each place from -1 to 1, as targets for both draws of some images.

    Args:
        grid: Rows and columns of the places.
        count: Number of images in the batch.
        device: Device of the result.
    """
    y, x = (torch.linspace(-1, 1, side, device=device) if side > 1 else torch.zeros(1, device=device) for side in grid)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(2, count, 2, *grid)
