"""Values of sets of activations by labels: cross-validated ridge for pixel classes, and PCK for key points.

Both touch each image once. Ridge is fitted to any set from the joint moments; its mIoU is counted on some kept pixels.
Similarities of a concatenation are sums over its activations, so any set is matched from stored sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from diffusion_featsel.gram import Gram, GramAccumulator, labels_on_grid, on_grid
from diffusion_featsel.heads import pixels_of
from diffusion_featsel.interpolation import centres, squared_norms, values_at, weights_at
from diffusion_featsel.match import shares
from diffusion_featsel.ridge import STRENGTHS, left_out_errors, left_out_fits, squared_error


@dataclass(frozen=True)
class LabelledPixels:
    """Moments of all pixels of each fold, and some of its pixels themselves.

    Attributes:
        gram: Moments of activations and labels, one piece for each fold of images.
        rows: Features of kept pixels of each fold, all activations side by side.
        classes: Class of each kept pixel.
    """

    gram: Gram
    rows: tuple[Float[Tensor, "_ channels"], ...]
    classes: tuple[Int[Tensor, " _"], ...]

    def strength(self, names: Sequence[str]) -> float:
        """Returns the regularisation with the smallest squared error on left-out folds, for a set of activations."""
        return STRENGTHS[int(left_out_errors(self.gram.subset(names)).sum(0).argmin())]

    def fold_values(self, names: Sequence[str], strength: float) -> Float64[Tensor, " folds"]:
        """Returns the mIoU on the kept pixels of each fold, of ridge fitted to all other folds.

        Args:
            names: Activations whose channels are concatenated.
            strength: Regularisation, as a share of the mean eigenvalue.
        """
        num_classes, chosen = self.gram.num_classes, self.gram.subset(names)
        values = []
        for fit, rows, classes in zip(left_out_fits(chosen, strength), self.rows, self.classes, strict=True):
            # One product for each activation: picking columns would copy the rows.
            scores = fit.bias.to(rows.dtype)
            for name, weight in zip(names, fit.weight.split(list(chosen.channels.values())), strict=True):
                first = int(self.gram.columns([name])[0])
                scores = scores + rows[:, first : first + len(weight)] @ weight.to(rows.dtype)
            predicted = scores.argmax(1)
            pairs = torch.bincount(classes.long() * num_classes + predicted, minlength=num_classes**2)
            confusion = pairs.view(num_classes, num_classes).double()
            hit, present = confusion.diagonal(), confusion.sum(1) > 0
            values.append((hit / (confusion.sum(0) + confusion.sum(1) - hit))[present].mean())
        return torch.stack(values)


def explained(gram: Gram, strength: float) -> Float64[Tensor, " pieces"]:
    """Returns the share of each piece's label variance that ridge explains when fitted to all other pieces.

    Needs no pixel: errors follow from the moments. Negative where it is worse than the piece's own mean.
    """
    n = gram.num_channels
    values = []
    for fit, piece in zip(left_out_fits(gram, strength), gram.moments, strict=True):
        count, per_class = piece[n, n], piece[n, n + 1 :]
        spread = per_class.sum() - per_class.square().sum() / count
        values.append(1 - squared_error(fit, piece) / spread)
    return torch.stack(values)


class LabelledPixelsAccumulator:
    """Adds up moments of images and keeps some of their pixels, batch after batch.

    Args:
        channels: Name of each activation to its number of channels.
        num_classes: Number of classes of the labels.
        grid: Rows and columns of the common grid.
        num_folds: Number of folds that images are dealt to in turn.
        pixels_per_image: Largest number of pixels of an image that are kept.
        seed: Seed of the choice of these pixels.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        num_classes: int,
        grid: tuple[int, int],
        *,
        num_folds: int = 5,
        pixels_per_image: int = 256,
        seed: int = 0,
    ) -> None:
        self._sums = GramAccumulator(channels, num_classes, grid, num_folds)
        self._pixels_per_image, self._num_folds = pixels_per_image, num_folds
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Mapping[str, Float[Tensor, "b _ _ _"]], labels: Int[Tensor, "b h w"]) -> None:
        """Adds a batch of images; arguments and errors are those of `GramAccumulator.update`."""
        self._sums.update(features, labels)
        maps = on_grid({name: features[name] for name in self._sums.channels}, self._sums.grid)
        classes = labels_on_grid(labels, self._sums.grid)
        for image in range(len(maps)):
            part = slice(image, image + 1)
            kept = pixels_of(maps[part], classes[part], self._pixels_per_image, generator=self._generator)
            self._rows.append(kept)

    def compute(self) -> LabelledPixels:
        """Returns the moments and kept pixels of all images so far.

        Raises:
            ValueError: There were fewer images than folds.
        """
        if len(self._rows) < self._num_folds:
            raise ValueError(f"there are {len(self._rows)} images for {self._num_folds} folds; give fewer folds")
        folds = [self._rows[fold :: self._num_folds] for fold in range(self._num_folds)]
        rows, classes = zip(*(map(torch.cat, zip(*fold, strict=True)) for fold in folds), strict=True)
        return LabelledPixels(self._sums.compute(), tuple(rows), tuple(classes))


class LabelledPairs:
    """Sums from which the matches of any set of activations follow.

    Of each activation and pair of images it keeps the inner products of the source points with the target's cells, and
    the squared norms of the target at the places that are compared.

    Args:
        grid: Rows and columns of the places that are compared.
        weights: Factor of each activation before they are concatenated; 1 where it is missing.
    """

    def __init__(self, grid: tuple[int, int], weights: Mapping[str, float] | None = None) -> None:
        self.grid, self.weights = grid, weights or {}
        self._batches: list[_Batch] = []

    def update(
        self,
        source: Mapping[str, Float[Tensor, "b _ _ _"]],
        target: Mapping[str, Float[Tensor, "b _ _ _"]],
        points: Float[Tensor, "b points 2"],
        true: Float[Tensor, "b points 2"],
        *,
        size: tuple[int, int],
        radius: Float[Tensor, " b"],
        counted: Bool[Tensor, "b points"] | None = None,
    ) -> None:
        """Adds a batch of pairs.

        Args:
            source: Maps (b, c, h, w) of each activation of the source images.
            target: Maps of the same activations of the target images.
            points: Positions (x, y) in pixels of the source images.
            true: Positions of the same key points in pixels of the target images.
            size: Height and width of the images that positions refer to.
            radius: Largest distance in pixels at which a prediction is correct, for each pair.
            counted: Whether each point counts; all by default.
        """
        positions = shares(points, size)
        rows, columns = centres(self.grid[0]).to(points.device), centres(self.grid[1]).to(points.device)
        products, norms = {}, {}
        for name in source:
            factor = self.weights.get(name, 1.0) ** 2
            values = values_at(source[name].float(), positions) * factor
            products[name] = (values @ target[name].float().flatten(2)).unflatten(2, target[name].shape[2:])
            norms[name] = (squared_norms(target[name].float(), rows, columns) * factor).float()
        counted = torch.ones_like(points[..., 0], dtype=torch.bool) if counted is None else counted
        self._batches.append(_Batch(products, norms, true, radius, counted, size))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the activations."""
        return tuple(self._batches[0].norms) if self._batches else ()

    def pair_values(self, names: Sequence[str]) -> Float64[Tensor, " pairs"]:
        """Returns the share of correct points of each pair when a set of activations is concatenated.

        Args:
            names: Activations that are concatenated.
        """
        return torch.cat([batch.shares(names, self.grid) for batch in self._batches])


@dataclass(frozen=True)
class _Batch:
    products: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    true: Tensor
    radius: Tensor
    counted: Tensor
    size: tuple[int, int]

    def shares(self, names: Sequence[str], grid: tuple[int, int]) -> Tensor:
        total = torch.zeros(())
        for name in names:
            products = self.products[name]
            down, along = (
                weights_at(centres(cells).to(products.device), n).to(products.dtype)
                for cells, n in zip(grid, products.shape[2:], strict=True)
            )
            total = total + down @ (products @ along.T)
        norms = torch.stack([self.norms[name] for name in names]).sum(0)
        best = (total * torch.where(norms > 0, norms.rsqrt(), 0.0)[:, None]).flatten(2).argmax(2)
        place = torch.stack([best % grid[1], best // grid[1]], -1).double() + 0.5
        scale = torch.tensor([self.size[1] / grid[1], self.size[0] / grid[0]], dtype=torch.float64, device=place.device)
        near = (place * scale - 0.5 - self.true).norm(dim=2) <= self.radius.double()[:, None] * (1 + 1e-9)
        number = self.counted.sum(1)
        return ((near & self.counted).sum(1).double() / number)[number > 0]
