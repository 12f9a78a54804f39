"""Moments merge exactly, and ridge from them equals refitting with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from diffusion_featsel.gram import Gram, GramAccumulator, labels_on_grid, on_grid
from diffusion_featsel.ridge import STRENGTHS, fit_ridge, left_out_errors, left_out_fits

CHANNELS = {"a": 3, "b": 5, "c": 2}
GRID = (6, 5)


def data(num_images: int = 5, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Returns features with large means and labels that depend on them, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images, 12, 10), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    sizes = {"a": (6, 5), "b": (3, 5), "c": (12, 10)}
    features = {
        name: 20 + torch.randn(num_images, channels, *sizes[name], generator=generator)
        for name, channels in CHANNELS.items()
    }
    features["a"][:, 1] += (labels_on_grid(labels, GRID) == 2).float()
    return features, labels


def gram_of(features: dict[str, Tensor], labels: Tensor, sizes: list[int], num_pieces: int | None = None) -> Gram:
    """Returns the moments, added in batches of some sizes."""
    sums = GramAccumulator(CHANNELS, 4, GRID, num_pieces)
    for rows in torch.arange(len(labels)).split(sizes):
        sums.update({name: maps[rows] for name, maps in features.items()}, labels[rows])
    return sums.compute()


def rows_of(features: dict[str, Tensor], labels: Tensor, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the counted pixels of an image and their labels as one-hot vectors."""
    classes = labels_on_grid(labels, GRID)[image]
    counted = classes != 255
    rows = on_grid(features, GRID)[image][:, counted].T.double()
    return rows.numpy(), F.one_hot(classes[counted], 4).double().numpy()


def refitted(parts: list[tuple[np.ndarray, np.ndarray]], strength: float) -> tuple[StandardScaler, Ridge]:
    """Returns scikit-learn's fit, whose lambda is a sum over pixels and not their mean."""
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    scaler = StandardScaler().fit(x)
    return scaler, Ridge(alpha=strength * len(x)).fit(scaler.transform(x), y)


def test_batches_and_merging_do_not_matter() -> None:
    features, labels = data()
    whole = gram_of(features, labels, [5])
    torch.testing.assert_close(gram_of(features, labels, [2, 3]).moments, whole.moments, rtol=1e-13, atol=0)
    first = gram_of({name: maps[:2] for name, maps in features.items()}, labels[:2], [2])
    second = gram_of({name: maps[2:] for name, maps in features.items()}, labels[2:], [3])
    assert torch.equal(first.merged(second).moments, whole.moments)
    dealt = gram_of(features, labels, [5], num_pieces=2).moments
    torch.testing.assert_close(dealt[1], whole.moments[[1, 3]].sum(0))
    assert len(dealt) == 2
    with pytest.raises(ValueError, match="merge those of the same"):
        whole.merged(whole.subset(["a"]))


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_ridge_equals_scikit_learn(strength: float) -> None:
    features, labels = data()
    parts = [rows_of(features, labels, image) for image in range(5)]
    scaler, reference = refitted(parts, strength)
    fit = fit_ridge(gram_of(features, labels, [5]), strength)
    x = parts[0][0]
    np.testing.assert_allclose(fit(torch.from_numpy(x)), reference.predict(scaler.transform(x)), atol=1e-9)


def test_a_subset_is_what_the_activations_alone_give() -> None:
    features, labels = data()
    picked = gram_of(features, labels, [5]).subset(["c", "a"])
    some = {name: features[name] for name in ("c", "a")}
    scaler, reference = refitted([rows_of(some, labels, image) for image in range(5)], 0.1)
    x = rows_of(some, labels, 0)[0]
    fit = fit_ridge(picked, 0.1)
    np.testing.assert_allclose(fit(torch.from_numpy(x)), reference.predict(scaler.transform(x)), atol=1e-9)
    with pytest.raises(ValueError, match="'d'"):
        picked.subset(["d"])


def test_leaving_an_image_out_by_subtraction_equals_refitting() -> None:
    features, labels = data()
    gram = gram_of(features, labels, [5])
    parts = [rows_of(features, labels, image) for image in range(5)]
    errors = left_out_errors(gram)
    for image in range(5):
        others = [part for other, part in enumerate(parts) if other != image]
        x, y = parts[image]
        for column, strength in enumerate(STRENGTHS):
            scaler, reference = refitted(others, strength)
            predicted = reference.predict(scaler.transform(x))
            assert float(errors[image, column]) == pytest.approx(((predicted - y) ** 2).sum(), rel=1e-9)
        scaler, reference = refitted(others, 1.0)
        fit = left_out_fits(gram, 1.0)[image]
        np.testing.assert_allclose(fit(torch.from_numpy(x)), reference.predict(scaler.transform(x)), atol=1e-9)
    assert fit_ridge(gram).strength == STRENGTHS[int(errors.sum(0).argmin())]
    with pytest.raises(ValueError, match="at least two images"):
        left_out_errors(Gram(gram.channels, 4, gram.moments[:1]))


def test_constant_channels_get_no_weight() -> None:
    features, labels = data()
    features["b"][:, 2] = 7.0
    fit = fit_ridge(gram_of(features, labels, [5]), 1e-4)
    assert bool((fit.weight[5] == 0).all())
    assert bool(fit.weight.isfinite().all())


def test_cka_is_that_of_the_kernels() -> None:
    features, labels = data()
    gram = gram_of(features, labels, [5])
    rows = torch.cat([torch.from_numpy(rows_of(features, labels, image)[0]) for image in range(5)])
    rows = rows - rows.mean(0)
    parts = dict(zip(CHANNELS, rows.split(list(CHANNELS.values()), 1), strict=True))
    kernels = {name: part @ part.T for name, part in parts.items()}
    for i, one in enumerate(CHANNELS):
        for j, other in enumerate(CHANNELS):
            expected = (kernels[one] * kernels[other]).sum() / (kernels[one].norm() * kernels[other].norm())
            torch.testing.assert_close(gram.cka()[i, j], expected)


def test_labels_that_do_not_exist_are_named() -> None:
    features, labels = data()
    labels[3, 0, 0] = 9
    with pytest.raises(ValueError, match="image 3 have the class 9"):
        gram_of(features, labels, [2, 3])
    with pytest.raises(ValueError, match="announced"):
        GramAccumulator({"a": 4}, 4, GRID).update(features, labels)
    with pytest.raises(ValueError, match="call `update`"):
        GramAccumulator(CHANNELS, 4, GRID).compute()
