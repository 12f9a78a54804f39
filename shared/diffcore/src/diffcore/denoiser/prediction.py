"""One network output seen as x0, noise, velocity, flow or score.

Every prediction type is a fixed mixture of clean sample and noise, `o = p x0 + q noise`. Together with
`x_t = alpha x0 + sigma noise` this is a two by two system: its forward direction is the training target, its inverse
gives every view.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm"]


def mixture(
    kind: PredictionType, alpha: Float[Tensor, "*b"], sigma: Float[Tensor, "*b"], sigma_data: float = 0.5
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Returns (p, q) of `o = p x0 + q noise`, the quantity a network of this kind predicts.

    For "edm" (alpha = 1) this is `(x0 - c_skip x_t) / c_out`, written without its division by sigma.

    References:
        Karras et al. 2022, equations 7 and 8; velocity: Salimans and Ho 2022, appendix D.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if kind == "epsilon":
        return zero, one
    if kind == "sample":
        return one, zero
    if kind == "v_prediction":
        return -sigma, alpha
    if kind == "flow_prediction":
        return -one, one
    if kind == "edm":
        total = (sigma.square() + sigma_data**2).sqrt()
        return sigma / (sigma_data * total), -sigma_data / total
    raise ValueError(f"prediction type is {kind!r}; it must be one of {', '.join(get_args(PredictionType))}")


def unmix(
    output: Float[Tensor, "b *data"],
    x_t: Float[Tensor, "b *data"],
    alpha: Float[Tensor, "b *ones"],
    sigma: Float[Tensor, "b *ones"],
    p: Float[Tensor, "b *ones"],
    q: Float[Tensor, "b *ones"],
) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
    """Solves `o = p x0 + q noise`, `x_t = alpha x0 + sigma noise` for x0 and noise; needs sigma p != alpha q."""
    determinant = sigma * p - alpha * q
    return (sigma * output - q * x_t) / determinant, (p * x_t - alpha * output) / determinant


@dataclass(frozen=True)
class Prediction:
    """A denoiser's output for `x_t`. Views are computed once, in float32 (float64 for float64 inputs).

    Attributes:
        output: The network's output, in the parameterisation that `kind` names.
        x_t: The noisy sample it was given, before any input scaling.
        alpha: Factor of x0 in `x_t`.
        sigma: Factor of the noise in `x_t`.
        kind: Prediction type: the quantity that `output` stands for.
        sigma_data: Standard deviation of the data; read by kind "edm" alone.
        extra: The channels of learned variance, where a network has them.
        in_range: Whether the caller guarantees that no view divides by zero. The check reads alpha or sigma, which on
            an accelerator waits for all queued work; loops that know their noise levels skip it.

    Raises:
        ValueError: A view does not exist at this noise level: x0 of "epsilon" at alpha = 0, noise of "sample" and "edm"
            and every score at sigma = 0.
    """

    output: Float[Tensor, "b *data"]
    x_t: Float[Tensor, "b *data"]
    alpha: Float[Tensor, "b *ones"]
    sigma: Float[Tensor, "b *ones"]
    kind: PredictionType
    sigma_data: float = 0.5
    extra: Tensor | None = None
    in_range: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(PredictionType):
            mixture(self.kind, self.alpha, self.sigma)  # raises, naming the kinds

    @cached_property
    def x0(self) -> Float[Tensor, "b *data"]:
        """The clean sample."""
        if self.kind == "sample":
            return _wide(self.output)
        if self.kind == "epsilon":
            self._require_positive("alpha", "x0")
        return self._unmixed[0]

    @cached_property
    def noise(self) -> Float[Tensor, "b *data"]:
        """The unit normal noise."""
        if self.kind == "epsilon":
            return _wide(self.output)
        if self.kind in ("sample", "edm"):
            self._require_positive("sigma", "noise")
        return self._unmixed[1]

    @cached_property
    def velocity(self) -> Float[Tensor, "b *data"]:
        """Salimans and Ho's v = alpha noise - sigma x0."""
        if self.kind == "v_prediction":
            return _wide(self.output)
        alpha, sigma = self._levels
        return alpha * self.noise - sigma * self.x0

    @cached_property
    def flow(self) -> Float[Tensor, "b *data"]:
        """The flow field noise - x0."""
        if self.kind == "flow_prediction":
            return _wide(self.output)
        return self.noise - self.x0

    @cached_property
    def score(self) -> Float[Tensor, "b *data"]:
        """The gradient of log p(x_t), -noise / sigma."""
        self._require_positive("sigma", "score")
        return -self.noise / self._levels[1]

    def noise_minus(self, other: "Prediction") -> Float[Tensor, "b *data"]:
        """Returns the difference of two predicted noises for the same `x_t`.

        Between outputs of one kind `x_t` cancels, so that predictions that are nearly equal keep the digits in which
        they differ.

        Args:
            other: Prediction that is subtracted, at the same noise level.

        Example:
            >>> x, level = torch.zeros(1, 2), torch.full((1, 1), 0.6)
            >>> alpha = torch.full((1, 1), 0.8)
            >>> one, other = (Prediction(torch.full((1, 2), o), x, alpha, level, "sample") for o in (1.0, 4.0))
            >>> one.noise_minus(other).tolist()
            [[4.0, 4.0]]
        """
        if self.kind == "epsilon" or self.kind != other.kind or self.sigma_data != other.sigma_data:
            return self.noise - other.noise
        alpha, sigma = self._levels
        p, q = mixture(self.kind, alpha, sigma, self.sigma_data)
        return alpha * (_wide(other.output) - _wide(self.output)) / (sigma * p - alpha * q)

    def target(self, x0: Float[Tensor, "b *data"], noise: Float[Tensor, "b *data"]) -> Float[Tensor, "b *data"]:
        """Returns what `output` should have been for this clean sample and noise: the regression target.

        epsilon: noise; sample: x0; v_prediction: alpha noise - sigma x0; flow_prediction: noise - x0;
        edm: (x0 - c_skip x_t) / c_out. Defined at every noise level.
        """
        p, q = mixture(self.kind, *self._levels, self.sigma_data)
        return p * _wide(x0) + q * _wide(noise)

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        return _wide(self.alpha), _wide(self.sigma)

    @cached_property
    def _unmixed(self) -> tuple[Tensor, Tensor]:
        p, q = mixture(self.kind, *self._levels, self.sigma_data)
        return unmix(_wide(self.output), _wide(self.x_t), *self._levels, p, q)

    def _require_positive(self, level: Literal["alpha", "sigma"], view: str) -> None:
        if self.in_range:
            return
        rows = (getattr(self, level) <= 0).nonzero()
        if len(rows):
            raise ValueError(f"{view} of kind {self.kind} needs {level} > 0; it is 0 in row {int(rows[0, 0])}")


def _wide(x: Tensor) -> Tensor:
    """Returns `x` in float32 or wider: alpha near 0 multiplies the errors of half precision."""
    return x if x.dtype == torch.float64 else x.float()
