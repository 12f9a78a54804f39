"""Classifiers of single feature vectors: logistic regression, and votes of nearest neighbours."""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Generator, Tensor
from torch.nn import functional as F

from diffusion_featsel.gram import IGNORED
from diffusion_featsel.ridge import LinearHead

_CHUNK = 2**25  # cosines that are held at one time


def pixels_of(
    maps: Float[Tensor, "b c h w"],
    classes: Int[Tensor, "b h w"],
    most: int | None = None,
    balanced: bool = False,
    generator: Generator | None = None,
) -> tuple[Float[Tensor, "pixels c"], Int[Tensor, " pixels"]]:
    """Returns the pixels of images that count, with their classes.

    Args:
        maps: Features of the images.
        classes: Class of each pixel, or 255 for pixels that do not count.
        most: Largest number of pixels of one image, drawn at random; all by default.
        balanced: Whether each class of an image has the same number of drawn pixels, where it has so many.
        generator: Source of the random numbers; needed where pixels are drawn.
    """
    rows, kept_classes = [], []
    for image, label in zip(maps.flatten(2), classes.flatten(1), strict=True):
        kept = (label != IGNORED).nonzero().flatten()
        if most is not None and len(kept) > most:
            kept = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
            kept = _balanced(kept, label, most) if balanced else kept[:most]
        rows.append(image[:, kept].T)
        kept_classes.append(label[kept])
    return torch.cat(rows), torch.cat(kept_classes)


def _balanced(kept: Tensor, label: Tensor, most: int) -> Tensor:
    present = label[kept].unique()
    return torch.cat([kept[label[kept] == index][: most // len(present)] for index in present])


def nearest_votes(
    x: Float[Tensor, "pixels c"],
    y: Int[Tensor, " pixels"],
    rows: Float[Tensor, "*rows c"],
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "*rows classes"]:
    """Returns the votes exp(cosine / temperature) of the nearest neighbours for each class.

    Args:
        x: Feature vectors of known class.
        y: Class of each of them.
        rows: Feature vectors to classify.
        num_classes: Number of classes of the labels.
        neighbours: Number of neighbours that vote.
        temperature: Scale of the cosines; the smaller, the more the nearest weigh.

    Raises:
        ValueError: There are fewer known vectors than neighbours.

    References:
        Wu et al. 2018, section 3.4 (weighted k-NN).

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> nearest_votes(x, y, torch.tensor([[0.9, 0.1]]), num_classes=2, neighbours=1).argmax().item()
        0
    """
    if neighbours > len(x):
        raise ValueError(f"`neighbours` is {neighbours}, and there are {len(x)} known vectors; give fewer")
    known = F.normalize(x, dim=1).T
    flat = rows.flatten(0, -2)
    votes = []
    for some in flat.split(max(_CHUNK // len(x), 1)):
        cosines, nearest = (F.normalize(some, dim=1) @ known).topk(neighbours, dim=1)
        # The largest possible exponent is taken away: only ratios of votes matter.
        weights = ((cosines - 1) / temperature).exp()
        votes.append(weights.new_zeros(len(some), num_classes).scatter_add_(1, y[nearest].long(), weights))
    return torch.cat(votes).unflatten(0, rows.shape[:-1])


def fit_logistic(
    x: Float[Tensor, "pixels c"],
    y: Int[Tensor, " pixels"],
    start: LinearHead,
    decay: float = 1e-4,
    iterations: int = 100,
) -> LinearHead:
    """Fits a logistic regression by L-BFGS: mean cross-entropy + decay / 2 |weights|^2 of standardised features.

    Args:
        x: Feature vectors, one for each row.
        y: Class of each vector.
        start: Classifier to start from.
        decay: Factor of half the squared weights.
        iterations: Largest number of iterations.

    Example:
        >>> x, y = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> fit_logistic(x, y, LinearHead(torch.zeros(1, 2), torch.zeros(2)))(x).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    z = (x - mean) * scale
    first = torch.cat([start.weight.to(x) * deviation[:, None], (start.bias.to(x) + mean @ start.weight.to(x))[None]])

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(values).to(x).view_as(first).requires_grad_()
        with torch.enable_grad():
            weight, bias = parameters[:-1], parameters[-1]
            value = F.cross_entropy(z @ weight + bias, y.long()) + decay / 2 * weight.square().sum()
            (gradient,) = torch.autograd.grad(value, parameters)
        return value.item(), gradient.flatten().double().cpu().numpy()

    options = {"maxiter": iterations, "gtol": 1e-6}
    found = minimize(loss, first.flatten().double().cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    solved = torch.from_numpy(found.x).to(x).view_as(first)
    weight = solved[:-1] * scale[:, None]
    return LinearHead(weight, solved[-1] - mean @ weight)
