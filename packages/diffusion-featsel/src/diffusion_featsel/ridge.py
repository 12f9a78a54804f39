"""Ridge regression of one-hot labels on standardised features, in closed form from second moments.

With A the centred and standardised X'X, B the same of X'Y, and C channels, the weights are (A + lambda I)^-1 B, and
lambda = strength * tr(A) / C. The strength is chosen by leaving out one piece of the data (an image) at a time: its
moments are subtracted, the rest is centred and standardised anew, and the squared error on the piece follows from its
moments, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_featsel.gram import Gram

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
_CONSTANT = 1e-10  # variance, as a share of the mean square, below which a channel is constant


@dataclass(frozen=True)
class LinearHead:
    """A linear map from features to one score for each class.

    Attributes:
        weight: Factor of each channel for each class.
        bias: Constant of each class.
        strength: Regularisation that it was fitted with, as a share of the mean eigenvalue.
    """

    weight: Float[Tensor, "channels classes"]
    bias: Float[Tensor, " classes"]
    strength: float = 0.0

    def __call__(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows classes"]:
        """Returns the scores of each row; the largest is the predicted class."""
        return x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


def fit_ridge(gram: Gram, strength: float | None = None, strengths: Sequence[float] = STRENGTHS) -> LinearHead:
    """Fits a ridge regression to all pieces of a Gram.

    Args:
        gram: Moments of the activations and labels.
        strength: Regularisation, as a share of the mean eigenvalue; chosen by leave-one-piece-out by default.
        strengths: Values among which it is chosen.

    Raises:
        ValueError: The strength is chosen, and there is only one piece.

    Example:
        >>> import torch
        >>> from diffusion_featsel.gram import GramAccumulator
        >>> x, classes = torch.randn(4, 3, 8, 8), torch.randint(2, (4, 8, 8))
        >>> x[:, 0] += 5 * classes
        >>> sums = GramAccumulator({"a": 3}, num_classes=2, grid=(8, 8))
        >>> sums.update({"a": x}, classes)
        >>> fit = fit_ridge(sums.compute())
        >>> accuracy = (fit(x.permute(0, 2, 3, 1)).argmax(-1) == classes).float().mean()
        >>> bool(accuracy > 0.9)
        True
    """
    if strength is None:
        errors = left_out_errors(gram, strengths).sum(0)
        strength = tuple(strengths)[int(errors.argmin())]
    return _solved(gram.moments.sum(0), gram.num_channels, (strength,))[0]


def left_out_errors(gram: Gram, strengths: Sequence[float] = STRENGTHS) -> Float64[Tensor, "pieces strengths"]:
    """Returns the sum of squared errors over each piece's pixels and classes, of fits to all other pieces.

    Args:
        gram: Moments of the activations and labels, with at least two pieces.
        strengths: Regularisations, as shares of the mean eigenvalue.

    Raises:
        ValueError: There is only one piece.
    """
    if len(gram.moments) < 2:
        raise ValueError("one piece cannot be left out, there is no other; add labels of at least two images")
    total = gram.moments.sum(0)
    return torch.stack(
        [
            torch.stack([squared_error(fit, piece) for fit in _solved(total - piece, gram.num_channels, strengths)])
            for piece in gram.moments
        ]
    )


def left_out_fits(gram: Gram, strength: float) -> list[LinearHead]:
    """Returns, for each piece, the fit to all other pieces."""
    total = gram.moments.sum(0)
    return [_solved(total - piece, gram.num_channels, (strength,))[0] for piece in gram.moments]


def squared_error(fit: LinearHead, moments: Float64[Tensor, "d d"]) -> Float64[Tensor, ""]:
    """Returns the sum of squared errors over the pixels whose moments are given."""
    n = len(fit.weight)
    w = torch.cat([fit.weight, fit.bias[None]])
    xx, xy, yy = moments[: n + 1, : n + 1], moments[: n + 1, n + 1 :], moments[n + 1 :, n + 1 :]
    return yy.trace() - 2 * (w * xy).sum() + (w * (xx @ w)).sum()


def _solved(moments: Tensor, n: int, strengths: Sequence[float]) -> list[LinearHead]:
    count = moments[n, n]
    mean, mean_y = moments[:n, n] / count, moments[n, n + 1 :] / count
    second = moments[:n, :n].diagonal() / count
    variance = second - mean.square()
    # Channels that are constant on this part carry nothing: their weight becomes 0.
    scale = torch.where(variance > _CONSTANT * second, variance.rsqrt(), 0.0)
    a = (moments[:n, :n] / count - torch.outer(mean, mean)) * torch.outer(scale, scale)
    b = (moments[:n, n + 1 :] / count - torch.outer(mean, mean_y)) * scale[:, None]
    size = a.diagonal().mean()
    size = torch.where(size > 0, size, 1.0)
    fits = []
    for strength in strengths:
        lifted = a + torch.diag_embed((strength * size).expand(n))
        weight = torch.cholesky_solve(b, torch.linalg.cholesky(lifted)) * scale[:, None]
        fits.append(LinearHead(weight, mean_y - mean @ weight, strength))
    return fits
