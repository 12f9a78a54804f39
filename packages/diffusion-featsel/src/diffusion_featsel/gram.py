"""Second moments of all activations and labels together, from which any subset is fitted without the images.

Each pixel of a common grid is a row z = (x, 1, y): the channels of all activations one after the other, the number 1,
and the label as one-hot vector. The sum of z z' over pixels holds all that a ridge regression of y on any of the
channels needs: picking activations is picking rows and columns. One sum is kept for each piece of the data, mostly an
image, so that any piece can be left out by subtraction.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
"""Label of pixels that do not count."""


@dataclass(frozen=True)
class Gram:
    """Second moments of the rows z = (x, 1, y), for each piece of the data.

    Attributes:
        channels: Name of each activation to its number of channels, in the order of the columns.
        num_classes: Number of classes of the labels.
        moments: Sum of z z' over the pixels of each piece.
    """

    channels: Mapping[str, int]
    num_classes: int
    moments: Float64[Tensor, "pieces d d"]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the activations, in the order of the columns."""
        return tuple(self.channels)

    @property
    def num_channels(self) -> int:
        """Number of channels of all activations together."""
        return sum(self.channels.values())

    def columns(self, names: Sequence[str]) -> Int[Tensor, " channels"]:
        """Returns the columns of some activations.

        Raises:
            ValueError: A name is not among the activations.
        """
        if unknown := set(names) - set(self.channels):
            raise ValueError(f"{sorted(unknown)} are not among the activations; there are {list(self.channels)}")
        starts = dict(zip(self.channels, _starts(self.channels.values()), strict=True))
        parts = [torch.arange(starts[name], starts[name] + self.channels[name]) for name in names]
        return torch.cat(parts).to(self.moments.device) if parts else torch.arange(0, device=self.moments.device)

    def subset(self, names: Sequence[str]) -> "Gram":
        """Returns the moments of some of the activations, with the labels.

        Args:
            names: Names of the activations, each once.

        Raises:
            ValueError: A name is not among the activations.
        """
        rest = torch.arange(self.num_channels, self.moments.shape[1], device=self.moments.device)
        kept = torch.cat([self.columns(names), rest])
        moments = self.moments[:, kept[:, None], kept]
        return Gram({name: self.channels[name] for name in names}, self.num_classes, moments)

    def merged(self, other: "Gram") -> "Gram":
        """Returns the moments of the pieces of both, those of `self` first.

        Raises:
            ValueError: Activations or classes differ.
        """
        if list(self.channels.items()) != list(other.channels.items()) or self.num_classes != other.num_classes:
            raise ValueError("the moments are of other activations or classes; merge those of the same")
        return Gram(self.channels, self.num_classes, torch.cat([self.moments, other.moments]))

    def covariance(self) -> Float64[Tensor, "channels channels"]:
        """Returns the covariance of all channels over all pixels."""
        total, n = self.moments.sum(0), self.num_channels
        mean = total[:n, n] / total[n, n]
        return total[:n, :n] / total[n, n] - torch.outer(mean, mean)

    def cka(self) -> Float64[Tensor, "names names"]:
        """Returns the linear centred kernel alignment (CKA) of each pair of activations, from 0 to 1.

        References:
            Kornblith et al. 2019, section 3.

        Example:
            >>> x = torch.randn(2, 3, 4, 4)
            >>> sums = GramAccumulator({"a": 3, "b": 3}, num_classes=1, grid=(4, 4))
            >>> sums.update({"a": x, "b": 2 * x}, torch.zeros(2, 4, 4, dtype=torch.long))
            >>> round(float(sums.compute().cka()[0, 1]), 6)
            1.0
        """
        squares = self.covariance().square()
        starts = [*_starts(self.channels.values()), self.num_channels]
        sums = F.pad(squares.cumsum(0).cumsum(1), (1, 0, 1, 0))[starts][:, starts]
        blocks = sums.diff(dim=0).diff(dim=1).clamp(min=0)
        own = blocks.diagonal().sqrt()
        return torch.where(blocks > 0, blocks / torch.outer(own, own), 0.0)


class GramAccumulator:
    """Adds up the moments of activations and labels, batch after batch; nothing of an image is kept.

    Sums are in double precision. Images go to pieces in turn: with as many pieces as images, each is one image.

    Args:
        channels: Name of each activation to its number of channels.
        num_classes: Number of classes of the labels.
        grid: Rows and columns of the common grid that maps and labels are brought to.
        num_pieces: Number of pieces that images are dealt to; None for one piece for each image.

    Example:
        >>> sums = GramAccumulator({"up-level0-repeat0-res-out": 3}, num_classes=2, grid=(8, 8))
        >>> sums.update({"up-level0-repeat0-res-out": torch.randn(5, 3, 4, 4)}, torch.randint(2, (5, 64, 64)))
        >>> tuple(sums.compute().moments.shape)
        (5, 6, 6)
    """

    def __init__(
        self, channels: Mapping[str, int], num_classes: int, grid: tuple[int, int], num_pieces: int | None = None
    ) -> None:
        self.channels, self.num_classes, self.grid, self.num_pieces = dict(channels), num_classes, grid, num_pieces
        self._pieces: list[Tensor] = []
        self._seen = 0

    def update(self, features: Mapping[str, Float[Tensor, "b _ _ _"]], labels: Int[Tensor, "b h w"]) -> None:
        """Adds a batch of images.

        Args:
            features: Maps (b, c, h, w) of each activation, at native size.
            labels: Class of each pixel, or 255 for pixels that do not count, at any size.

        Raises:
            ValueError: A label is too large, or activations have other channels than announced.
        """
        given = {name: maps.shape[1] for name, maps in features.items()}
        if {name: given.get(name) for name in self.channels} != self.channels:
            raise ValueError(f"activations have the channels {given}, and {self.channels} were announced")
        require_labels(labels, self.num_classes, first_image=self._seen)
        small = on_grid({name: features[name] for name in self.channels}, self.grid).double()
        classes = labels_on_grid(labels, self.grid)
        for image in range(len(small)):
            counted = classes[image] != IGNORED
            self._add(augmented(small[image][:, counted].T, classes[image][counted], self.num_classes))

    def _add(self, rows: Tensor) -> None:
        moments = rows.T @ rows
        place = self._seen if self.num_pieces is None else self._seen % self.num_pieces
        self._seen += 1
        if place < len(self._pieces):
            self._pieces[place] = self._pieces[place] + moments
        else:
            self._pieces.append(moments)

    def compute(self) -> Gram:
        """Returns the moments of all images so far.

        Raises:
            ValueError: There were no images.
        """
        if not self._pieces:
            raise ValueError("no image was added; call `update` first")
        return Gram(self.channels, self.num_classes, torch.stack(self._pieces))


def on_grid(features: Mapping[str, Float[Tensor, "b _ _ _"]], grid: tuple[int, int]) -> Float[Tensor, "b c gh gw"]:
    """Returns all activations, interpolated to a grid (or averaged, where they are finer) and concatenated."""
    maps = (values if values.dtype == torch.float64 else values.float() for values in features.values())
    return torch.cat(
        [F.interpolate(m, size=grid, mode="bilinear", antialias=True) if m.shape[2:] != grid else m for m in maps], 1
    )


def labels_on_grid(labels: Int[Tensor, "b h w"], grid: tuple[int, int]) -> Int[Tensor, "b gh gw"]:
    """Returns the label of the pixel nearest to the centre of each cell of a grid."""
    rows, columns = (
        ((torch.arange(cells, device=labels.device) + 0.5) * pixels / cells).long()
        for cells, pixels in zip(grid, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def augmented(
    x: Float[Tensor, "pixels channels"], classes: Int[Tensor, " pixels"], num_classes: int
) -> Float[Tensor, "pixels d"]:
    """Returns the rows z = (x, 1, y), whose sum of z z' a `Gram` holds."""
    return torch.cat([x, torch.ones_like(x[:, :1]), F.one_hot(classes.long(), num_classes).to(x.dtype)], 1)


def require_labels(labels: Int[Tensor, "b *grid"], num_classes: int, first_image: int = 0) -> None:
    """Raises a ValueError that names the first image with a class that does not exist, and the class.

    Args:
        labels: Class of each pixel, or 255 for pixels that do not count.
        num_classes: Number of classes that exist.
        first_image: Index of the first image over the whole data set, for the message.
    """
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        image = int(wrong.flatten(1).any(1).nonzero()[0])
        value = int(labels[image][wrong[image]][0])
        raise ValueError(
            f"the labels of image {first_image + image} have the class {value}; classes are 0 to {num_classes - 1}, "
            f"and {IGNORED} where a pixel does not count"
        )


def _starts(sizes: Iterable[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]
