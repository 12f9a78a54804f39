"""Structural similarity of all pairs of a prompt's seeds at once: SSIM, and MS-SSIM over several scales.

The Gaussian window is applied as two banded matrices that hold the reflected border too, so a filter is two small
matrix products. Means and variances are filtered once per image; what remains for a pair is one filtered product.

References:
    SSIM: Wang et al. 2004, equation 13; MS-SSIM: Wang et al. 2003, equation 7, with 2x2 averages between scales.
    Borders and exponents are those of torchmetrics 1.9.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffcore.metrics.estimate import Estimate
from diffcore.stats import ExactMetric, require_finite

WANG_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
_SIGMA = 1.5  # of the window, in pixels
_K1, _K2 = 0.01, 0.03
_NUMBERS = 2**20  # products per chunk: what stays in a processor's cache, and fills an accelerator


def pairwise_ssim(
    images: Float[Tensor, "prompts seeds channels height width"],
    *,
    data_range: float,
    scales: int = 1,
    betas: Sequence[float] | None = None,
    window: int = 11,
) -> Float[Tensor, "prompts pairs"]:
    """Returns the similarity of every pair of a prompt's images, in the order (0, 1), (0, 2), … (1, 2), ….

    Args:
        images: Any range; float16 and bfloat16 are computed in float32.
        data_range: Largest minus smallest possible value. Never taken from the images: a pair's similarity must not
            depend on what else is in the batch, and constant images have no range.
        scales: 1 is SSIM, in [-1, 1]; more are MS-SSIM, in [0, 1], with negative terms cut at 0. Images too small for
            that many take as many as fit, with a warning: thresholds found at more scales do not hold then.
        betas: Exponent of each scale, finest first; by default those of Wang et al. up to `scales`, of unchanged sum.
        window: Width of the Gaussian window in pixels, odd; its standard deviation is 1.5 pixels.

    Raises:
        ValueError: Images hold NaN or infinity or are smaller than the reflected border allows, or an option makes no
            sense.
    """
    _check_options(data_range, scales, betas, window)
    prompts, seeds, _, height, width = images.shape
    require_finite("images", images.flatten(1))
    if seeds < 2:
        raise ValueError(f"`images` has {seeds} seeds per prompt; pairs need at least 2")
    fitting = _fitting_scales(min(height, width), scales, window)
    x = images.detach() if images.dtype == torch.float64 else images.detach().float()
    first, second = torch.triu_indices(seeds, seeds, offset=1, device=x.device)
    if not prompts:
        return x.new_empty(0, len(first))
    offsets = seeds * torch.arange(prompts, device=x.device)[:, None]
    first, second = (offsets + first).flatten(), (offsets + second).flatten()
    x = x.flatten(0, 1)
    if scales == 1:
        return _compare(x, first, second, data_range, window).full.view(prompts, -1)
    similarity = torch.ones_like(first, dtype=x.dtype)
    for scale, beta in enumerate(_exponents(scales, betas)[:fitting]):
        terms = _compare(x, first, second, data_range, window)
        similarity *= (terms.full if scale == fitting - 1 else terms.contrast).relu() ** beta
        x = functional.avg_pool2d(x, 2) if scale < fitting - 1 else x
    return similarity.view(prompts, -1)


class PairwiseSSIM(ExactMetric):
    """Mean over prompts of the mean similarity of a prompt's seeds; `compute` returns an `Estimate` over prompts.

    Args:
        data_range: Largest minus smallest possible value; all four as in `pairwise_ssim`.
        scales: Number of scales; 1 is plain SSIM.
        betas: Exponent of each scale, finest first.
        window: Width of the Gaussian window in pixels, odd.
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    num_prompts: Tensor

    def __init__(
        self,
        *,
        data_range: float,
        scales: int = 1,
        betas: Sequence[float] | None = None,
        window: int = 11,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _check_options(data_range, scales, betas, window)
        self.data_range, self.scales, self.betas, self.window = data_range, scales, betas, window
        for name in ("total", "squares", "num_prompts"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Float[Tensor, "prompts seeds channels height width"]) -> None:
        """Adds prompts, each with all of its seeds.

        Raises:
            ValueError: As `pairwise_ssim`.
        """
        similarities = pairwise_ssim(
            images, data_range=self.data_range, scales=self.scales, betas=self.betas, window=self.window
        )
        means = similarities.double().mean(1)
        self.total += means.sum()
        self.squares += means.square().sum()
        self.num_prompts += len(means)

    def compute(self) -> Estimate:
        """Returns the mean over all prompts seen, over all processes.

        Raises:
            ValueError: No prompts were added.
        """
        n = int(self.num_prompts)
        if not n:
            raise ValueError("no prompts were compared; update with images first")
        mean = float(self.total) / n
        variance = max(float(self.squares) / n - mean**2, 0.0) / (n - 1) if n > 1 else math.nan
        return Estimate(mean, math.sqrt(variance), n)


class _Terms(NamedTuple):
    """Means over channels and pixels: the whole index, and its contrast factor away from the border."""

    full: Float[Tensor, " pairs"]
    contrast: Float[Tensor, " pairs"]


def _compare(x: Tensor, first: Tensor, second: Tensor, data_range: float, window: int) -> _Terms:
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    rows, columns = (_filter_matrix(side, window, x) for side in x.shape[-2:])
    # Differences of large squares would cost digits that a common level of an image does not have to.
    level = x.mean((2, 3), keepdim=True)
    x = x - level
    offset = rows @ x @ columns.T
    mean = offset + level
    squared_mean = mean.square()
    variance = (rows @ x.square() @ columns.T - offset.square()).clamp(min=0)
    border, full, contrast = window // 2, [], []
    for i, j in _chunks(first, second, x[0].numel()):
        means = mean[i] * mean[j]
        covariance = rows @ (x[i] * x[j]) @ columns.T - offset[i] * offset[j]
        similar = (2 * covariance + c2) / (variance[i] + variance[j] + c2)
        inner = similar[..., border : -border or None, border : -border or None]
        contrast.append(inner.mean((1, 2, 3)))
        full.append(((2 * means + c1) * similar / (squared_mean[i] + squared_mean[j] + c1)).mean((1, 2, 3)))
    return _Terms(torch.cat(full), torch.cat(contrast))


def _chunks(first: Tensor, second: Tensor, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    pairs = max(_NUMBERS // numbers, 1)
    return zip(first.split(pairs), second.split(pairs), strict=True)


def _filter_matrix(side: int, window: int, like: Tensor) -> Float[Tensor, "side side"]:
    """Returns the Gaussian filter along one side, its border reflected without repeating the edge."""
    reach = window // 2
    offsets = torch.arange(-reach, reach + 1)
    taps = torch.exp(-(offsets.double() ** 2) / (2 * _SIGMA**2))
    sources = (torch.arange(side)[:, None] + offsets).abs()
    sources = torch.where(sources >= side, 2 * (side - 1) - sources, sources)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    matrix.scatter_add_(1, sources, (taps / taps.sum()).expand(side, window))
    return matrix.to(like)


def _fitting_scales(side: int, scales: int, window: int) -> int:
    if side <= window // 2:
        raise ValueError(f"images have a side of {side}; a window of {window} needs at least {window // 2 + 1}")
    fitting = next(k for k in range(scales, 0, -1) if side >= smallest_side(k, window))
    if fitting < scales:
        warnings.warn(
            f"images with a side of {side} allow {fitting} of {scales} scales; similarities are not comparable with "
            f"those of sides from {smallest_side(scales, window)}",
            stacklevel=4,
        )
    return fitting


def smallest_side(scales: int, window: int = 11) -> int:
    """Returns the smallest side of images that allows as many scales: 6, 12, 44, 99, 176 with 11 taps."""
    return max(window * (scales - 1) ** 2, 2 ** (scales - 1) * (window // 2 + 1))


def _exponents(scales: int, betas: Sequence[float] | None) -> tuple[float, ...]:
    if betas is not None:
        return tuple(betas)
    chosen = WANG_BETAS[:scales]
    return tuple(beta * sum(WANG_BETAS) / sum(chosen) for beta in chosen)


def _check_options(data_range: float, scales: int, betas: Sequence[float] | None, window: int) -> None:
    if not 0 < data_range < math.inf:
        raise ValueError(f"`data_range` is {data_range}; give the largest minus the smallest possible value")
    if window < 3 or window % 2 == 0:
        raise ValueError(f"`window` is {window}; it must be odd and at least 3")
    if scales < 1 or (betas is None and scales > len(WANG_BETAS)):
        raise ValueError(f"`scales` is {scales}; without `betas` it must be from 1 to {len(WANG_BETAS)}")
    if betas is not None and (len(betas) != scales or scales == 1):
        raise ValueError(f"`betas` has {len(betas)} numbers for {scales} scales; give one per scale, for two or more")
