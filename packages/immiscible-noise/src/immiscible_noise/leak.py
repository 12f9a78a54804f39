"""How much the noise that images meet tells of their class: the accuracy of a linear probe."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ClassLeak:
    """Cross-validated accuracy of guessing the class of an image from its noise alone."""

    accuracy: float
    """Mean over classes of the share guessed right, so that class sizes do not matter."""
    chance: float
    """What noise that knows nothing about the class gives: one over the number of classes."""
    standard_error: float
    num_samples: int

    @property
    def exceeds_chance(self) -> bool:
        """Tells whether accuracy is more than 2 points and more than 2 standard errors above chance."""
        excess = self.accuracy - self.chance
        return excess > 0.02 and excess > 2 * self.standard_error


def pool_noise(noise: Float[Tensor, "b *data"], size: int = 8) -> Float[Tensor, "b features"]:
    """Returns noise averaged over space to at most ``size`` positions per axis, flattened.

    The first data axis is channels where there are two to four data axes; other shapes are only flattened. An
    assignment follows the coarse content of an image, so pooling keeps the leak and makes the probe sharper.
    """
    noise = noise.float()
    pools = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
    if pool := pools.get(noise.ndim):
        noise = pool(noise, tuple(min(size, extent) for extent in noise.shape[2:]))
    return noise.reshape(len(noise), -1)


def class_leak(features: Float[Tensor, "b features"], labels: Int[Tensor, "b"], *, folds: int = 5) -> ClassLeak:
    """Returns how well a linear discriminant tells the classes apart, each sample judged by a fit without it.

    The discriminant has one ridge-regularised covariance and equal class priors, all in closed form.

    Args:
        features: Noise, pooled by `pool_noise` or only flattened.
        labels: Classes as any integers; the rows should be in random order.
        folds: Number of parts of the cross-validation. Classes with fewer samples are left out.

    Raises:
        ValueError: Fewer than two classes have ``folds`` samples.

    Example:
        >>> import torch
        >>> labels = torch.arange(400) % 2
        >>> noise = torch.randn(400, 6) + labels[:, None]
        >>> class_leak(noise, labels).exceeds_chance
        True
    """
    values, counts = labels.unique(return_counts=True)
    kept = values[counts >= folds]
    if len(kept) < 2:
        raise ValueError(f"labels has {len(kept)} classes of at least {folds} samples; the probe needs two")
    inside = torch.isin(labels, kept)
    features, classes = features[inside].double(), torch.searchsorted(kept, labels[inside])
    fold = _deal(classes, folds)
    guesses = torch.empty_like(classes)
    for held_out in (fold == part for part in range(folds)):
        scores = _discriminant(features[~held_out], classes[~held_out], len(kept))
        guesses[held_out] = scores(features[held_out]).argmax(1)
    sizes = torch.bincount(classes).double()
    shares = torch.bincount(classes[guesses == classes], minlength=len(kept)) / sizes
    variance = (shares * (1 - shares) / sizes).sum() / len(kept) ** 2
    return ClassLeak(float(shares.mean()), 1 / len(kept), math.sqrt(float(variance)), len(classes))


def _deal(classes: Tensor, folds: int) -> Tensor:
    """Returns a fold for each sample, every class spread evenly."""
    order = classes.argsort(stable=True)
    fold = torch.empty_like(classes)
    fold[order] = torch.arange(len(classes), device=classes.device) % folds
    return fold


def _discriminant(features: Tensor, classes: Tensor, num_classes: int):
    membership = F.one_hot(classes, num_classes).double()
    means = membership.T @ features / membership.sum(0)[:, None]
    within = features - means[classes]
    covariance = within.T @ within / len(features)
    # As many samples' worth of an isotropic prior as there are features: needed where samples are few.
    ridge = covariance.diagonal().mean() * features.shape[1] / len(features)
    covariance.diagonal().add_(ridge)
    weights = torch.linalg.solve(covariance, means.T)
    offsets = 0.5 * (means.T * weights).sum(0)
    return lambda x: x @ weights - offsets
