"""How fine the structure of an activation is, by the radial frequencies of its maps (section 3.2).

The spectrum of a map holds the injected noise too. In the cross-spectrum of two draws, Re F_1 conj(F_2), it cancels on
average, so that granularity is the mean radial frequency of what both draws agree on. Frequencies are in cycles per
image; maps are multiplied by a Hann window after their mean was subtracted.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import Views

_SMALLEST = 4  # rows and columns, below which a window leaves nothing


@dataclass(frozen=True)
class Granularity:
    """Frequencies of an activation; None where the grid is too small or the draws share nothing.

    Attributes:
        frequency: Mean radial frequency of what two noise draws share, in cycles per image.
        over_refinement: Mean radial frequency of a single draw, divided by `frequency`; above 1 detail is noise.
        high_frequency: Share of a draw's power, without its mean, above a quarter cycle per cell.
    """

    frequency: float | None = None
    over_refinement: float | None = None
    high_frequency: float | None = None


@dataclass
class SpectrumSums(Sums):
    """Sums of the power of an activation's maps over images and channels.

    Attributes:
        cross: Cross-spectrum of the two draws, on the half plane of `torch.fft.rfft2`.
        plain: Mean power of the two draws.
        columns: Number of columns of the maps, which the half plane does not tell.
    """

    cross: Float[Tensor, "h half"]
    plain: Float[Tensor, "h half"]
    columns: int

    @classmethod
    def empty(cls, grid: tuple[int, int], device: torch.device | str = "cpu") -> "SpectrumSums":
        """Returns sums over no image.

        Args:
            grid: Rows and columns of the activation.
            device: Device that the sums are kept on.
        """
        cross, plain = (zeros(grid[0], grid[1] // 2 + 1, device=device) for _ in range(2))
        return cls(cross, plain, grid[1])

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation.
        """
        if min(views.grid) < _SMALLEST:
            return
        g = views.centered.unflatten(3, views.grid)
        window = views.batch.kept("window", views.grid, lambda: _window(views.grid, g.device))
        waves = torch.fft.rfft2((g - g.mean((3, 4), keepdim=True)).mul_(window)).flatten(1, 2)
        parts = torch.view_as_real(waves)  # real and imaginary parts side by side
        self.cross += (parts[0] * parts[1]).sum(0).sum(2)
        self.plain += parts.square().flatten(0, 1).sum(0).sum(2) / 2

    def granularity(self) -> Granularity:
        """Returns the frequencies of all images together."""
        height, width = len(self.cross), self.columns
        if min(height, width) < _SMALLEST:
            return Granularity()
        y = torch.fft.fftfreq(height, device=self.cross.device, dtype=torch.float64)[:, None]
        x = torch.fft.rfftfreq(width, device=self.cross.device, dtype=torch.float64)[None]
        per_image = ((height * y).square() + (width * x).square()).sqrt()
        per_cell = (y.square() + x.square()).sqrt()
        # A column in the middle of the half plane stands for two frequencies.
        both = 2.0 - ((x == 0) | (x == 0.5)).double()
        cross, plain = self.cross * both, self.plain * both
        plain[0, 0] = cross[0, 0] = 0.0  # what the window leaves of the mean
        power, shared = float(plain.sum()), float(cross.sum())
        if power <= 0:
            return Granularity()
        alone = float((per_image * plain).sum()) / power
        together = float((per_image * cross).sum()) / shared if shared > 1e-3 * power else None
        high = float(plain[per_cell > 0.25].sum()) / power
        return Granularity(together, alone / together if together and together > 0 else None, high)


def _window(grid: tuple[int, int], device: torch.device) -> Tensor:
    return torch.outer(*(torch.hann_window(side, periodic=False, device=device) for side in grid))
