"""Teachers and generators whose scores, marginals and gradients are known in closed form."""

import torch
from torch import Tensor, nn

from diffcore.denoiser import Condition, Denoiser, EDMSchedule, GaussianMixtureDenoiser, NoiseSchedule, Prediction
from emd_distill.chain import ChainNoise


class Affine(nn.Module):
    """The generator g(z) = a z + b, number by number."""

    def __init__(self, a: float, b: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([value], dtype=dtype)) for value in (a, b))

    def forward(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        return self.a * z + self.b


class Modes(Denoiser):
    """The exact denoiser of a mixture of one-dimensional normals, with as few operations as there can be."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, schedule: NoiseSchedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or EDMSchedule()
        self.means, self.variances, self.logs = means, stds.square(), weights.log()

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        alpha, sigma = (level.view(-1, 1).to(x_t) for level in self.schedule.alpha_sigma(t))
        total = alpha.square() * self.variances + sigma.square()
        apart = x_t - alpha * self.means
        share = torch.softmax(self.logs - 0.5 * (apart.square() / total + total.log()), 1)
        x0 = (share * (self.means + alpha * self.variances / total * apart)).sum(1, keepdim=True)
        return Prediction(x0, x_t, alpha, sigma, "sample")


def normal(mean: float, std: float, schedule: NoiseSchedule | None = None) -> GaussianMixtureDenoiser:
    """The denoiser of one normal distribution in one dimension."""
    parts = (torch.tensor(part, dtype=torch.float64) for part in ([[mean]], [std], [1.0]))
    return GaussianMixtureDenoiser(*parts, schedule or EDMSchedule())


def drawn(rows: int, steps: int, seed: int = 0, dim: int = 1) -> tuple[Tensor, Tensor, ChainNoise]:
    """Latents, noise, and the noise of a chain, in float64."""
    g = torch.Generator().manual_seed(seed)
    shape = [(rows, dim), (rows, dim), (rows, steps, dim), (rows, steps, dim)]
    z, eps, n_e, n_z = (torch.randn(size, generator=g, dtype=torch.float64) for size in shape)
    return z, eps, ChainNoise(n_e, n_z)
