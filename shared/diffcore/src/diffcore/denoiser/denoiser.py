"""Denoisers: a network, its schedule and its parameterisation behind one call, `(x_t, t, cond) -> Prediction`."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from diffcore.denoiser.prediction import Prediction, PredictionType
from diffcore.denoiser.schedule import DiscreteSchedule, EDMSchedule, NoiseSchedule

Condition = Mapping[str, Tensor]
"""Keyword arguments of a backbone; the first dimension of each tensor is the batch."""

BackboneCall = Callable[[nn.Module, Tensor, Tensor, Condition], Any]
"""How a backbone wants to be called: (backbone, x_t, t, cond) -> output."""


class Denoiser(nn.Module, ABC):
    """A network or formula that predicts the clean sample x0 from a noisy sample x_t."""

    schedule: NoiseSchedule

    @abstractmethod
    def forward(self, x_t: Float[Tensor, "b *data"], t: Num[Tensor, " b"], cond: Condition | None = None) -> Prediction:
        """Predicts from `x_t` at `t`, in the units of `schedule`, under a condition."""


class NetworkDenoiser(Denoiser):
    """A bare network with its schedule and prediction type.

    Args:
        backbone: Called as `backbone(x_t, t, **cond)` unless `call` says otherwise. It returns a tensor, a tuple that
            starts with one, or an object that has one as `.sample`. Twice the channels of `x_t` mean learned variance:
            the first half is the prediction, the second `Prediction.extra`.
        schedule: The noise schedule of the training; its `t` is fed to the backbone.
        prediction_type: Quantity that the output stands for. "edm" needs an `EDMSchedule`; the backbone then sees the
            scaled input c_in x_t and c_noise = log(sigma) / 4 instead of `t`.
        sigma_data: Standard deviation of the data; used by "edm" alone.
        call: Calls backbones that take other arguments: (backbone, x_t, t, cond) to output.

    References:
        The preconditioning: Karras et al. 2022, table 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        *,
        sigma_data: float = 0.5,
        call: BackboneCall | None = None,
    ) -> None:
        super().__init__()
        if prediction_type == "edm" and not isinstance(schedule, EDMSchedule):
            raise ValueError(f"prediction type edm needs an EDMSchedule, not {type(schedule).__name__}")
        zero_snr = isinstance(schedule, DiscreteSchedule) and schedule.rescale_betas_zero_snr
        if prediction_type == "epsilon" and zero_snr:
            warnings.warn("epsilon says nothing about x0 at the zero-SNR timestep; use v_prediction", stacklevel=2)
        self.backbone = backbone
        self.schedule = schedule
        self.prediction_type: PredictionType = prediction_type
        self.sigma_data = sigma_data
        self.call = call

    def forward(self, x_t: Float[Tensor, "b *data"], t: Num[Tensor, " b"], cond: Condition | None = None) -> Prediction:
        """Calls the backbone once, in its own precision, and returns its output as a prediction."""
        alpha, sigma = (level.view(-1, *[1] * (x_t.ndim - 1)) for level in self.schedule.alpha_sigma(t))
        x_in, t_in = x_t, t
        if self.prediction_type == "edm":
            x_in = x_t / (sigma.square() + self.sigma_data**2).sqrt()
            # At sigma = 0 the output has no weight (c_out = 0), but it must be finite to vanish.
            t_in = sigma.flatten().clamp(min=torch.finfo(sigma.dtype).tiny).log() / 4
        parameter = next(self.backbone.parameters(), None)
        if parameter is not None and parameter.is_floating_point():
            x_in = x_in.to(parameter.dtype)
        cond = cond or {}
        raw = self.backbone(x_in, t_in, **cond) if self.call is None else self.call(self.backbone, x_in, t_in, cond)
        output, extra = _split_variance(_unwrap(raw), x_t)
        return Prediction(output, x_t, alpha, sigma, self.prediction_type, self.sigma_data, extra)


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance, `uncond + guidance_scale (cond - uncond)`, in one pass of 2b rows.

    Args:
        denoiser: The denoiser that is called under both conditions.
        guidance_scale: Weight of the condition; 1 is off, and costs nothing.
        uncond: The condition without a prompt or label; each tensor has one row, or as many as the batch.

    References:
        Ho and Salimans 2022, equation 6 (their w is `guidance_scale` - 1).
    """

    def __init__(self, denoiser: Denoiser, guidance_scale: float, uncond: Condition | None) -> None:
        super().__init__()
        if guidance_scale != 1 and not uncond:
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but there is no `uncond`; pass one")
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.guidance_scale = guidance_scale
        self.uncond = dict(uncond or {})

    def forward(self, x_t: Float[Tensor, "b *data"], t: Num[Tensor, " b"], cond: Condition | None = None) -> Prediction:
        """Predicts under both conditions at once; learned variance comes from the conditional rows."""
        if self.guidance_scale == 1:
            return self.denoiser(x_t, t, cond)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), self._stacked(cond or {}, len(x_t)))
        rows = slice(len(x_t), None)
        without, with_ = both.output.float().chunk(2) if both.output.dtype != torch.float64 else both.output.chunk(2)
        return replace(
            both,
            output=without + self.guidance_scale * (with_ - without),
            x_t=x_t,
            alpha=both.alpha[rows],
            sigma=both.sigma[rows],
            extra=None if both.extra is None else both.extra[rows],
        )

    def _stacked(self, cond: Condition, count: int) -> dict[str, Tensor]:
        if cond.keys() != self.uncond.keys():
            raise ValueError(f"`cond` has {sorted(cond)}, `uncond` has {sorted(self.uncond)}; both need the same keys")
        stacked = {}
        for key, value in cond.items():
            uncond = self.uncond[key].to(value)
            stacked[key] = torch.cat([uncond.expand(count, *uncond.shape[1:]), value])
        return stacked


class GaussianMixtureDenoiser(Denoiser):
    """The exact denoiser of a Gaussian mixture, under any schedule: E[x0 | x_t] in closed form.

    Samples of any shape are treated as flat vectors of length d. Computed in float64.

    Args:
        means: Mean of each component, one row per component.
        covariances: Covariance matrix of each component, or standard deviation of each spherical one.
        weights: Weight of each component, at least 0; the sum need not be 1.
        schedule: Noise schedule of any kind.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    means: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Float[Tensor, "k d"],
        covariances: Float[Tensor, "k d d"] | Float[Tensor, " k"],
        weights: Float[Tensor, " k"],
        schedule: NoiseSchedule,
    ) -> None:
        super().__init__()
        count, dim = means.shape
        if covariances.ndim == 1:
            covariances = torch.eye(dim).to(covariances) * covariances.square().view(count, 1, 1)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances.double())
        self.schedule = schedule
        self.register_buffer("means", means.double())
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0))
        self.register_buffer("eigenvectors", eigenvectors)
        self.register_buffer("log_weights", (weights.double() / weights.sum()).log())

    def forward(self, x_t: Float[Tensor, "b *data"], t: Num[Tensor, " b"], cond: Condition | None = None) -> Prediction:
        """Returns the posterior mean of x0; a condition is ignored."""
        alpha, sigma = (level.double().view(-1, 1, 1) for level in self.schedule.alpha_sigma(t))
        variance = alpha.square() * self.eigenvalues + sigma.square()
        centred = x_t.double().flatten(1).unsqueeze(1) - alpha * self.means
        rotated = torch.einsum("kde,bkd->bke", self.eigenvectors, centred)
        log_density = -0.5 * (rotated.square() / variance + variance.log()).sum(-1)
        responsibility = torch.softmax(self.log_weights + log_density, dim=1)
        shrunk = torch.einsum("kde,bke->bkd", self.eigenvectors, alpha * self.eigenvalues / variance * rotated)
        x0 = (responsibility.unsqueeze(-1) * (self.means + shrunk)).sum(1).view_as(x_t).to(x_t.dtype)
        ones = (-1, *[1] * (x_t.ndim - 1))
        return Prediction(x0, x_t, alpha.view(ones).to(x_t.dtype), sigma.view(ones).to(x_t.dtype), "sample")


def _unwrap(raw: Any) -> Tensor:
    output = raw[0] if isinstance(raw, tuple | list) else getattr(raw, "sample", raw)
    if not isinstance(output, Tensor):
        raise TypeError(f"the backbone returned {type(raw).__name__}; expected a tensor, a tuple of them or a .sample")
    return output


def _split_variance(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    if output.shape == x_t.shape:
        return output, None
    if output.ndim == x_t.ndim > 1 and output.shape[1] == 2 * x_t.shape[1]:
        output, extra = output.chunk(2, dim=1)
        if output.shape == x_t.shape:
            return output, extra
    raise ValueError(f"the backbone returned shape {tuple(output.shape)} for x_t of shape {tuple(x_t.shape)}")
