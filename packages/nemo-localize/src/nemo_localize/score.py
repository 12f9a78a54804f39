"""How similar two first denoising steps are: their noise differences delta, compared by MS-SSIM.

    delta = predicted noise - true noise,   each channel stretched to [0, 1]
    sim(a, b) = cs_1^0.33 cs_2^0.33 ssim_3^0.33,   contrast and structure of scales 1 and 2, SSIM of scale 3

References:
    Hintersdorf, Struppek et al. 2024, section 3.1 and algorithm 1. The paper writes SSIM; its code computes MS-SSIM.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from diffcore.denoiser import NoiseSchedule, Prediction
from diffcore.metrics.pairwise_ssim import pairwise_ssim, smallest_side

BETA = 0.33  # exponent of each scale, as published
MOST_SCALES = 3
PUBLISHED_TORCHMETRICS = "1.3.2"  # pinned by the published code
_WINDOW = 11


def noise_difference(
    prediction: Prediction, noise: Float[Tensor, "rows channels height width"], schedule: NoiseSchedule, t: float
) -> Float[Tensor, "rows channels height width"]:
    """Returns predicted minus true noise up to a positive factor, for any prediction type.

    With `x_t = c noise` the difference is `noise (c / sigma - 1) - (alpha / sigma) x0`. It vanishes where x_t is pure
    noise, so it is multiplied by sigma / alpha, which gives -x0 there.

    Args:
        prediction: Output of the denoiser for `x_t`, the noise at the solver's initial scale.
        noise: Initial noise, of unit variance.
        schedule: Noise schedule of the model.
        t: The timestep, the same for all rows.
    """
    level = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = (float(value) for value in schedule.alpha_sigma(level))
    scale = float(schedule.initial_scale(level))
    x0 = prediction.x0
    return noise.to(x0) * ((scale - sigma) / alpha) - x0 if alpha > 0 else -x0


def stretched(
    delta: Float[Tensor, "rows channels height width"],
) -> tuple[Float[Tensor, "rows channels height width"], Bool[Tensor, "rows channels"]]:
    """Returns each channel stretched to [0, 1], and which channels were constant or not finite: these are set to 0."""
    low, high = delta.amin((2, 3), keepdim=True), delta.amax((2, 3), keepdim=True)
    bad = ~(torch.isfinite(low) & torch.isfinite(high) & (high > low))
    unit = (delta - low) / torch.where(bad, 1.0, high - low)
    return torch.where(bad, 0.0, unit), bad[:, :, 0, 0]


def num_scales(side: int) -> int:
    """Returns how many of the three scales fit latents with this smaller side: 3 from 44, 2 from 12, 1 from 6.

    Raises:
        ValueError: The side is too small for one scale.
    """
    for scales in range(MOST_SCALES, 0, -1):
        if side >= smallest_side(scales, _WINDOW):
            return scales
    raise ValueError(f"latents have a side of {side}; similarity needs at least {smallest_side(1, _WINDOW)}")


def similarity(
    a: Float[Tensor, "rows channels height width"], b: Float[Tensor, "rows channels height width"]
) -> Float[Tensor, " rows"]:
    """Returns the MS-SSIM of pairs, in [0, 1]. A pair's value does not depend on the others: the data range is 1."""
    return _pairs(torch.stack([a, b], 1))[:, 0]


def published_similarity(
    a: Float[Tensor, "rows channels height width"], b: Float[Tensor, "rows channels height width"]
) -> Float[Tensor, " rows"]:
    """Returns the MS-SSIM of pairs as the published code computes it: with a range taken from all of them at once.

    The published threshold was found with torchmetrics 1.3.2, which leaves out the border of the coarsest scale. Where
    the border is all there is, at sides from 12 to 21 and below 11, that version gives NaN and this function counts it.
    """
    scales = num_scales(min(a.shape[-2:]))
    similar = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for _ in range(scales - 1):
        _, contrast = ssim(a, b, kernel_size=_WINDOW, reduction="none", return_contrast_sensitivity=True)
        similar = similar * contrast.relu() ** BETA
        a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
    _, full = ssim(a, b, kernel_size=_WINDOW, reduction="none", return_full_image=True)
    border = _WINDOW // 2
    inner = full[..., border:-border, border:-border]
    return similar * (inner if inner.numel() else full).mean((1, 2, 3)).relu() ** BETA


def consistency(
    deltas: Float[Tensor, "prompts seeds channels height width"], *, published: bool = False
) -> Float[Tensor, "prompts seeds"]:
    """Returns how similar each seed is to the seed most like it; high values for all seeds show a memorised prompt.

    Args:
        deltas: Noise differences stretched to [0, 1], of at least two seeds.
        published: Take the data range from each prompt's own batch of pairs, as the published code does.
    """
    seeds = deltas.shape[1]
    if seeds < 2:
        raise ValueError(f"deltas has {seeds} seeds per prompt; consistency compares seeds and needs at least 2")
    first, second = torch.triu_indices(seeds, seeds, offset=1, device=deltas.device)
    if published:
        rows = [published_similarity(prompt[first], prompt[second]) for prompt in deltas]
        pairs = torch.stack(rows) if rows else deltas.new_zeros(0, len(first))
    else:
        pairs = _pairs(deltas)
    table = pairs.new_zeros(len(deltas), seeds, seeds)
    table[:, first, second] = pairs
    return torch.maximum(table, table.mT).amax(2)


def _pairs(images: Tensor) -> Tensor:
    scales = num_scales(min(images.shape[-2:]))
    if scales == 1:
        return pairwise_ssim(images, data_range=1.0, window=_WINDOW).relu() ** BETA
    return pairwise_ssim(images, data_range=1.0, scales=scales, betas=(BETA,) * scales, window=_WINDOW)
