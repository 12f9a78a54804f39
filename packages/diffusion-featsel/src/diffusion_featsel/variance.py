"""What an activation's values vary with: position, content, or the injected noise (section 3.2).

At position p of image i under noise draw k, a map is f_ikp = mu + P_p + S_ip + E_ikp, channel by channel: a mean, a
template that all images share, the image's content, and the noise's part. With two draws an image, products of
different draws hold no noise, and products of different images hold no content:

    E[f_ik f_ik'] - mu^2 = P + S          (k and k' are different draws)
    E[f_ik f_jk'] - mu^2 = P              (i and j are different images)

so that each part is a difference of means, without bias. Reliability is S / (S + E). On covariances instead of traces,
the same differences give the content's Fisher score, J = tr[(Sigma_E + lambda I)^-1 Sigma_S] / C', its information,
log det(I + (Sigma_E + lambda I)^-1 Sigma_S) / 2, and the effective rank of Sigma_S (section 9, S1, S1b and S2).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.sums import Sums, zeros
from diffusion_featsel.views import DIMENSIONS, Views

# Content and noise below these shares of the template's variance and of the mean square are rounding errors of float32.
_LEAST_OF_TEMPLATE, _LEAST_OF_SQUARE = 1e-6, 1e-12


@dataclass(frozen=True)
class Split:
    """Parts of the variance of an activation, and what follows from them; None where they cannot be told.

    All are those of at most 64 channels after the fixed random projection of `views`, which keeps variances on average.
    A constant, and a template that neither image nor noise changes, have no reliability and no scores.

    Attributes:
        position: Variance of the template that all images share, summed over channels.
        content: Variance of the images' content, summed over channels.
        noise: Variance of the noise's part, summed over channels.
        reliability: Share of the content in content and noise, from 0 to 1; None for a constant activation.
        snr_db: Ratio of content and noise in decibels.
        position_share: Share of the template in template and content, from 0 to 1.
        fisher: The content's Fisher score J (S1).
        information: The content's information in nats (S1b).
        effective_rank: Exponential of the entropy of the content's normalised eigenvalues (S2).
    """

    position: float
    content: float
    noise: float
    reliability: float | None
    snr_db: float | None
    position_share: float | None
    fisher: float | None
    information: float | None
    effective_rank: float | None


@dataclass
class VarianceSums(Sums):
    """Sums of products of an activation's projected values.

    Attributes:
        second: Sum over images, draws and positions of the products of channels, for even and odd images apart.
        difference: The same sum for the difference of the two draws of an image.
        position: Sum over images of the mean of both draws, at each position.
        image_means: Sum over images of the squared mean over positions and draws, of each channel.
        images: Number of images so far.
    """

    second: Float[Tensor, "2 d d"]
    difference: Float[Tensor, "d d"]
    position: Float[Tensor, "d places"]
    image_means: Float[Tensor, " d"]
    images: Float[Tensor, ""]

    @classmethod
    def empty(cls, channels: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> "VarianceSums":
        """Returns sums over no image.

        Args:
            channels: Number of channels of the activation.
            grid: Rows and columns of the activation.
            device: Device that the sums are kept on.
        """
        d = min(channels, DIMENSIONS)
        shapes = ((2, d, d), (d, d), (d, math.prod(grid)), (d,), ())
        return cls(*(zeros(*shape, device=device) for shape in shapes))

    def add(self, views: Views) -> None:
        """Adds a batch of images.

        Args:
            views: Maps of the activation.
        """
        x, shift = views.centered, views.shift.to(self.second)
        rows, places = x.flatten(0, 1), x.shape[3]
        products = torch.bmm(rows, rows.transpose(1, 2)).unflatten(0, x.shape[:2])
        totals = rows.sum(2).unflatten(0, x.shape[:2])
        means = (totals[0] + totals[1]) / (2 * places)
        start = views.batch.first % 2
        for half in range(2):
            mine = slice((half + start) % 2, None, 2)
            count = 2 * products[:, mine].shape[1] * places
            rest = torch.outer(totals[:, mine].sum((0, 1)).to(shift) + count * shift / 2, shift)
            self.second[half] += products[:, mine].sum((0, 1)) + rest + rest.T
        self.position += x.sum((0, 1)) / 2 + len(means) * shift[:, None]
        self.image_means += (means + shift).square().sum(0)
        self.images += len(means)
        apart = x[0] - x[1]
        self.difference += torch.bmm(apart, apart.transpose(1, 2)).sum(0)

    def split(self) -> Split:
        """Returns the parts of the variance.

        Raises:
            ValueError: There are fewer than two images, so that content cannot be told from template.
        """
        n, places = float(self.images), self.position.shape[1]
        if n < 2:
            raise ValueError(f"{n:.0f} image has no variance of content; give at least 2")
        cov_noise = self.difference / (2 * n * places)
        means = (self.second.sum(0) - self.difference / 2) / 2  # sum of products of the mean of both draws
        cross_draw = means / (n * places) - cov_noise / 2
        cross_image = (self.position @ self.position.T - means) / (n * (n - 1) * places)
        cov_content = cross_draw - cross_image
        mean_square = (self.position.mean(1).square() - self.image_means).sum() / (n * (n - 1))
        position = float(cross_image.trace() - mean_square)
        content, noise = float(cov_content.trace()), float(cov_noise.trace())
        scale = float(self.second.diagonal(dim1=1, dim2=2).sum()) / (2 * n * places)
        varies = content + noise > _LEAST_OF_TEMPLATE * max(position, 0.0) + _LEAST_OF_SQUARE * scale
        reliability = min(max(content / (content + noise), 0.0), 1.0) if varies else None
        shared = position + content
        return Split(
            position,
            content,
            noise,
            reliability,
            10 * math.log10(content / noise) if varies and content > 0 and noise > 0 else None,
            min(max(position / shared, 0.0), 1.0) if varies and shared > 0 else None,
            *(_content_scores(cov_content, cov_noise) if varies else (None, None, None)),
        )


def _content_scores(content: Tensor, noise: Tensor) -> tuple[float, float, float | None]:
    """Returns Fisher score, information and effective rank from the covariances of content and noise."""
    d = len(noise)
    eye = torch.eye(d, dtype=noise.dtype, device=noise.device)
    ridge = 1e-3 * float((content + noise).trace()) / d
    factor = torch.linalg.cholesky(noise + max(ridge, torch.finfo(noise.dtype).tiny) * eye)
    left = torch.linalg.solve_triangular(factor, content, upper=False)
    whitened = torch.linalg.solve_triangular(factor, left.T, upper=False)
    ratios = torch.linalg.eigvalsh((whitened + whitened.T) / 2)
    powers = torch.linalg.eigvalsh((content + content.T) / 2).clamp(min=0)
    p = powers / powers.sum()
    rank = float(torch.exp(-(p * p.clamp(min=1e-300).log()).sum())) if float(powers.sum()) > 0 else None
    return float(ratios.sum()) / d, float(0.5 * torch.log1p(ratios.clamp(min=0)).sum()), rank
