"""How much a set of activations tells about an image's content, without labels.

Two passes over the same image with different noise, f_1 = s + e_1 and f_2 = s + e_2, share their content s. Its
covariance over images and places is the covariance between the draws, less that of the mean at each place; the noise's
is half the covariance of their difference. For Gaussian content and noise, a set S of activations holds

    I(S) = 1/2 log det(1 + Sigma_E^-1 Sigma_S)   nats

of information about the content of a place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_featsel.gram import Gram, on_grid

_JITTER = 1e-3  # of the mean variance of content and noise, added to the noise's


@dataclass(frozen=True)
class ContentAndNoise:
    """Joint covariances of content and noise of several activations.

    Attributes:
        channels: Name of each activation to its number of (projected) channels, in the order of the columns.
        content: Covariance of what both draws share, less what every image has at the same place.
        noise: Covariance of what the draws do not share.
    """

    channels: Mapping[str, int]
    content: Float64[Tensor, "channels channels"]
    noise: Float64[Tensor, "channels channels"]

    def information(self, names: Sequence[str]) -> float:
        """Returns I(S) of a set of activations, in nats per place.

        Example:
            >>> eye = torch.eye(2, dtype=torch.float64)
            >>> round(ContentAndNoise({"a": 2}, 3 * eye, eye).information(["a"]), 2)
            1.38
        """
        if not names:
            return 0.0
        columns = Gram(self.channels, 0, self.noise[None]).columns(names)
        content, noise = (part[columns[:, None], columns] for part in (self.content, self.noise))
        size = (content.diagonal().clamp(min=0).mean() + noise.diagonal().mean()).clamp(min=1e-300)
        noise = noise + _JITTER * size * torch.eye(len(columns), dtype=noise.dtype, device=noise.device)
        # An estimate of content can have negative directions: they hold none.
        values, vectors = torch.linalg.eigh(content)
        content = (vectors * values.clamp(min=0)) @ vectors.T
        return float((torch.linalg.slogdet(noise + content)[1] - torch.linalg.slogdet(noise)[1]) / 2)

    def cka(self) -> Float64[Tensor, "names names"]:
        """Returns the linear CKA of content of each pair of activations, from 0 to 1."""
        n = len(self.content)
        moments = torch.zeros(1, n + 1, n + 1, dtype=torch.float64, device=self.content.device)
        moments[0, :n, :n], moments[0, n, n] = self.content, 1.0
        return Gram(self.channels, 0, moments).cka()


class DrawAccumulator:
    """Adds up what content and noise need, batch after batch; nothing of an image is kept.

    Each activation is brought to the common grid, and by a fixed random projection, which its name seeds, to at most
    `width` channels.

    Args:
        grid: Rows and columns of the common grid.
        width: Largest number of channels of an activation.

    Example:
        >>> sums = DrawAccumulator((4, 4))
        >>> content = torch.randn(20, 3, 4, 4)
        >>> first, second = ({"a": content + 0.1 * torch.randn(20, 3, 4, 4)} for _ in range(2))
        >>> sums.update(first, second)
        >>> sums.compute().information(["a"]) > 5
        True
    """

    def __init__(self, grid: tuple[int, int], width: int = 32) -> None:
        self.grid, self.width = grid, width
        self._channels: dict[str, int] = {}
        self._projections: dict[str, Tensor] = {}
        self._same, self._cross, self._places = (torch.zeros(()) for _ in range(3))
        self._images = 0

    def update(
        self, first: Mapping[str, Float[Tensor, "b _ _ _"]], second: Mapping[str, Float[Tensor, "b _ _ _"]]
    ) -> None:
        """Adds a batch of images.

        Args:
            first: Maps (b, c, h, w) of each activation, with one draw of noise.
            second: The same activations of the same images, with another draw.
        """
        one, two = (self._projected(side) for side in (first, second))
        a, b = one.flatten(0, 1), two.flatten(0, 1)
        cross = a.T @ b
        self._same = self._same + a.T @ a + b.T @ b
        self._cross = self._cross + (cross + cross.T) / 2
        self._places = self._places + (one + two).sum(0) / 2
        self._images += len(one)

    def _projected(self, features: Mapping[str, Tensor]) -> Tensor:
        """Returns rows (images, places, channels) in double precision."""
        parts = []
        for name, maps in features.items():
            small = on_grid({name: maps}, self.grid).double().flatten(2).transpose(1, 2)
            if name not in self._projections:
                self._projections[name] = _projection(name, maps.shape[1], self.width).to(small.device)
            parts.append(small @ self._projections[name])
        self._channels = {name: self._projections[name].shape[1] for name in features}
        return torch.cat(parts, 2)

    def compute(self) -> ContentAndNoise:
        """Returns the covariances of all images so far.

        Raises:
            ValueError: There are fewer than two images: content is what differs between them.
        """
        n, places = self._images, self.grid[0] * self.grid[1]
        if n < 2:
            raise ValueError(f"there is content in differences between images only, and there are {n}; add at least 2")
        noise = (self._same - 2 * self._cross) / (2 * n * places)
        # Products of different images at the same place, over all ordered pairs: what every image has there.
        own = (self._same + 2 * self._cross) / 4
        shared = (self._places.T @ self._places - own) / (n * (n - 1) * places)
        return ContentAndNoise(self._channels, self._cross / (n * places) - shared, noise)


def _projection(name: str, channels: int, width: int) -> Tensor:
    if channels <= width:
        return torch.eye(channels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:4], "big"))
    random = torch.randn(channels, width, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(random)[0]
