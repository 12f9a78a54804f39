"""The label-scarce protocol of the paper: ten small networks classify each pixel from its features and vote.

The networks see one pixel at a time. All ten are trained side by side, as one batch of weights; each has its own order
of the pixels and stops by its own losses, so that the result is that of training them one after the other. Features
stay at their native size and are interpolated at the pixels of each batch.

References:
    Meng et al. 2024, appendix G; Zhang et al. 2021 (DatasetGAN), section 3.2; Baranchuk et al. 2022, section 4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from diffusion_featsel.gram import IGNORED, labels_on_grid
from diffusion_featsel.interpolation import centres, values_at
from diffusion_featsel.segmentation import SegmentationScores, segmentation_scores
from diffusion_featsel.splits import Split, image_splits

_CHUNK = 2**24  # feature values that are interpolated at one time
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_NORM_EPSILON, _MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class ScarceSettings:
    """Settings of the protocol; the defaults are the paper's.

    Attributes:
        grid: Rows and columns of pixels that features and labels are brought to.
        num_networks: Number of networks that vote.
        learning_rate: Size of the steps of Adam.
        batch_size: Number of pixels in a batch; a smaller last batch is left out.
        max_epochs: Largest number of passes over the training pixels.
        first_watched: Number of epochs before the losses are watched.
        patience: Training stops when more than this many batches in a row have not beaten the smallest loss.
        rare: Classes with fewer pixels than this in a training image are ignored there.
        seed: Seed of splits, first weights and orders.
    """

    grid: tuple[int, int] = (256, 256)
    num_networks: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 64
    max_epochs: int = 100
    first_watched: int = 4
    patience: int = 50
    rare: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Vote:
    """What the networks say about images.

    Attributes:
        classes: Class that most networks choose at each pixel; the smallest of them where several are even.
        uncertainty: Disagreement of each image: the mean over its most disputed tenth of pixels of the entropy of the
            mean distribution minus the mean entropy, in nats.
    """

    classes: Int[Tensor, "b h w"]
    uncertainty: Float[Tensor, " b"]


class Ensemble:
    """Networks of two hidden layers with the same shape and their own weights.

    Each is C, 128, 32, K (or C, 256, 128, K from 30 classes on), with a ReLU and then a batch normalisation after each
    hidden layer. Weights start from a normal distribution with deviation 0.02, biases from 0.

    Args:
        num_channels: Number of channels of a pixel, C.
        num_classes: Number of classes, K.
        num_networks: Number of networks side by side.
        generator: Source of the first weights; a generator on the CPU.
        device: Device of the weights.
    """

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        num_networks: int,
        generator: Generator,
        device: torch.device | None = None,
    ) -> None:
        hidden = (128, 32) if num_classes < 30 else (256, 128)
        widths = (num_channels, *hidden, num_classes)
        self.parameters: list[Tensor] = []
        for inner, outer in pairwise(widths):
            weight = 0.02 * torch.randn(num_networks, inner, outer, generator=generator)
            self.parameters += [weight.to(device), torch.zeros(num_networks, 1, outer, device=device)]
        for width in hidden:
            self.parameters += [torch.ones(num_networks, 1, width, device=device)]
            self.parameters += [torch.zeros(num_networks, 1, width, device=device)]
        self.running = [
            [torch.zeros(num_networks, 1, width, device=device), torch.ones(num_networks, 1, width, device=device)]
            for width in hidden
        ]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(
        self, x: Float[Tensor, "networks pixels c"], training: Tensor | None = None
    ) -> Float[Tensor, "networks pixels classes"]:
        """Returns the scores of pixels, by each network.

        Args:
            x: Features of the pixels that each network sees.
            training: Which networks are still trained (networks, 1, 1): batches are then normalised by themselves, and
                the running means of these networks follow them. None for trained networks.
        """
        for layer in range(2):
            weight, bias = self.parameters[2 * layer : 2 * layer + 2]
            x = torch.baddbmm(bias, x, weight).relu()
            if training is None:
                mean, variance = self.running[layer]
            else:
                variance, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
                unbiased = variance.detach() * (x.shape[1] / (x.shape[1] - 1))
                for state, value in zip(self.running[layer], (mean.detach(), unbiased), strict=True):
                    state += training * _MOMENTUM * (value - state)
            scale, shift = self.parameters[6 + 2 * layer : 8 + 2 * layer]
            x = (x - mean) * (variance + _NORM_EPSILON).rsqrt() * scale + shift
        return torch.baddbmm(self.parameters[5], x, self.parameters[4])


def fit_ensemble(
    features: Mapping[str, Float[Tensor, "b _ _ _"]],
    labels: Int[Tensor, "b h w"],
    num_classes: int,
    settings: ScarceSettings | None = None,
) -> Ensemble:
    """Trains the networks on all pixels of the training images.

    Args:
        features: Maps (b, c, h, w) of each activation, at native size.
        labels: Class of each pixel at any size, or 255 for pixels that do not count.
        num_classes: Number of classes of the labels.
        settings: Settings of the protocol; the paper's by default.

    Raises:
        ValueError: There are fewer pixels than one batch holds.
    """
    settings = settings or ScarceSettings()
    maps = list(features.values())
    device = maps[0].device
    classes = without_rare(labels_on_grid(labels, settings.grid), num_classes, settings.rare).flatten()
    pixels = (classes != IGNORED).nonzero().flatten()
    if len(pixels) < settings.batch_size:
        raise ValueError(f"there are {len(pixels)} labelled pixels, fewer than one batch of {settings.batch_size}")
    generator = torch.Generator().manual_seed(settings.seed)
    num_networks = settings.num_networks
    networks = Ensemble(sum(m.shape[1] for m in maps), num_classes, num_networks, generator, device)
    adam = _Adam(networks.parameters, settings.learning_rate)
    active = torch.ones(num_networks, dtype=torch.bool, device=device)
    smallest = torch.full((num_networks,), torch.inf, device=device)
    waited = torch.zeros(num_networks, dtype=torch.int64, device=device)
    for epoch in range(settings.max_epochs):
        orders = torch.stack([torch.randperm(len(pixels), generator=generator) for _ in range(num_networks)])
        for batch in orders.to(device).split(settings.batch_size, 1)[: len(pixels) // settings.batch_size]:
            chosen = pixels[batch]
            training = active[:, None, None].float()
            scores = networks(_pixel_features(maps, chosen, settings.grid), training)
            losses = F.cross_entropy(scores.movedim(2, 1), classes[chosen].long(), reduction="none").mean(1)
            adam.step(losses.sum(), training)
            if epoch >= settings.first_watched:
                better = losses.detach() < smallest
                smallest = torch.where(better, losses.detach(), smallest)
                waited = torch.where(better, 0, waited + 1)
                active = active & (waited <= settings.patience)
        if not bool(active.any()):
            break
    return networks


class _Adam:
    """Adam, with a step for the networks that are still trained only."""

    def __init__(self, parameters: list[Tensor], learning_rate: float) -> None:
        self.parameters, self.learning_rate, self.steps = parameters, learning_rate, 0
        self.means, self.squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def step(self, loss: Tensor, training: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in _BETAS)
        with torch.no_grad():
            for parameter, gradient, mean, square in zip(
                self.parameters, gradients, self.means, self.squares, strict=True
            ):
                mean.lerp_(gradient, 1 - _BETAS[0])
                square.lerp_(gradient.square(), 1 - _BETAS[1])
                step = mean / first / ((square / second).sqrt() + _EPSILON)
                parameter -= self.learning_rate * training * step


def _pixel_features(maps: list[Tensor], pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the features (networks, pixels, c) at pixels of the grid, numbered over all images."""
    height, width = grid
    image, place = pixels // (height * width), pixels % (height * width)
    x, y = centres(width).to(place.device)[place % width], centres(height).to(place.device)[place // width]
    rows = torch.stack([x, y], -1).flatten(0, 1)
    return torch.cat([_values_of(m, image.flatten(), rows) for m in maps], 1).unflatten(0, pixels.shape)


def _values_of(maps: Tensor, image: Tensor, rows: Tensor) -> Tensor:
    """Returns the interpolated columns (n, c) of maps at one position of one image each."""
    height, width = maps.shape[2:]
    x = (rows[:, 0] * width - 0.5).clamp(0, width - 1)
    y = (rows[:, 1] * height - 0.5).clamp(0, height - 1)
    left, above = x.floor().long(), y.floor().long()
    right, below = (left + 1).clamp(max=width - 1), (above + 1).clamp(max=height - 1)
    share_x, share_y = (x - left).to(maps.dtype)[:, None], (y - above).to(maps.dtype)[:, None]
    top = maps[image, :, above, left].float() * (1 - share_x) + maps[image, :, above, right].float() * share_x
    bottom = maps[image, :, below, left].float() * (1 - share_x) + maps[image, :, below, right].float() * share_x
    return top * (1 - share_y) + bottom * share_y


def without_rare(classes: Int[Tensor, "b h w"], num_classes: int, fewest: int) -> Int[Tensor, "b h w"]:
    """Returns labels where classes with too few pixels in an image are set to 255 in this image.

    Example:
        >>> without_rare(torch.tensor([[[0, 0, 1]]]), 2, fewest=2).tolist()
        [[[0, 0, 255]]]
    """
    flat = classes.flatten(1).long()
    inside = torch.where(flat == IGNORED, num_classes, flat)
    counts = torch.zeros(len(flat), num_classes + 1, dtype=torch.long, device=flat.device)
    counts.scatter_add_(1, inside, torch.ones_like(inside))
    rare = counts.gather(1, inside) < fewest
    return torch.where(rare, IGNORED, flat).view_as(classes)


@torch.no_grad()
def vote(
    networks: Ensemble, features: Mapping[str, Float[Tensor, "b _ _ _"]], grid: tuple[int, int] = (256, 256)
) -> Vote:
    """Returns the class that most networks choose at each pixel, and the uncertainty of each image.

    Args:
        networks: Networks that `fit_ensemble` has trained.
        features: Maps (b, c, h, w) of each activation, at native size.
        grid: Rows and columns of pixels.
    """
    maps = list(features.values())
    channels = sum(m.shape[1] for m in maps)
    positions = torch.stack(torch.meshgrid(centres(grid[0]), centres(grid[1]), indexing="ij")[::-1], -1).flatten(0, 1)
    classes, uncertainty = [], []
    for image in range(len(maps[0])):
        parts = [
            _voted(networks, torch.cat([values_at(m[image : image + 1].float(), some[None]) for m in maps], 2)[0])
            for some in positions.to(maps[0].device).split(max(_CHUNK // channels, 1))
        ]
        classes.append(torch.cat([part[0] for part in parts]).view(grid))
        disputed = torch.cat([part[1] for part in parts]).sort(descending=True).values
        uncertainty.append(disputed[: max(math.ceil(len(disputed) / 10), 1)].mean())
    return Vote(torch.stack(classes), torch.stack(uncertainty))


def _voted(networks: Ensemble, x: Tensor) -> tuple[Tensor, Tensor]:
    num_networks = len(networks.parameters[0])
    shares = networks(x.expand(num_networks, -1, -1)).softmax(2)
    mean = shares.mean(0)
    disagreement = torch.special.entr(mean).sum(1) - torch.special.entr(shares).sum(2).mean(0)
    return most_frequent(shares.argmax(2), shares.shape[2]), disagreement


def most_frequent(choices: Int[Tensor, "networks pixels"], num_classes: int) -> Int[Tensor, " pixels"]:
    """Returns the most frequent choice of each pixel, the smallest of them where several are even.

    Example:
        >>> most_frequent(torch.tensor([[2], [1], [2]]), num_classes=3).tolist()
        [2]
    """
    return F.one_hot(choices.long(), num_classes).sum(0).argmax(1)


def scarce_scores(
    features: Mapping[str, Float[Tensor, "b _ _ _"]],
    labels: Int[Tensor, "b h w"],
    num_classes: int,
    *,
    num_splits: int = 5,
    num_train: int | None = None,
    settings: ScarceSettings | None = None,
) -> tuple[tuple[SegmentationScores, ...], tuple[Split, ...]]:
    """Trains and tests the networks on several random splits of the images.

    Args:
        features: Maps (b, c, h, w) of each activation, at native size.
        labels: Class of each pixel at any size, or 255 for pixels that do not count.
        num_classes: Number of classes of the labels.
        num_splits: Number of random splits.
        num_train: Number of training images; two thirds of all by default.
        settings: Settings of the protocol; the paper's by default.
    """
    settings = settings or ScarceSettings()
    classes = labels_on_grid(labels, settings.grid)
    splits = image_splits(classes, num_classes, num_train=num_train, num_splits=num_splits, seed=settings.seed)
    scores = []
    for split in splits:
        train, test = list(split.train), list(split.test)
        networks = fit_ensemble({n: m[train] for n, m in features.items()}, labels[train], num_classes, settings)
        voted = vote(networks, {n: m[test] for n, m in features.items()}, settings.grid)
        scores.append(segmentation_scores(voted.classes, classes[test], num_classes))
    return tuple(scores), splits
