"""Probes equal those of scikit-learn, and scores are counted as they say."""

import importlib
import math
import warnings
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from diffusion_featsel.gram import GramAccumulator, labels_on_grid, on_grid
from diffusion_featsel.heads import fit_logistic, nearest_votes, pixels_of
from diffusion_featsel.probe import Kind, ProbeResult, ProbeSettings, Spread, pooled_features, probe, probe_images
from diffusion_featsel.ridge import STRENGTHS, LinearHead, fit_ridge
from diffusion_featsel.segmentation import SegmentationScores, boundary_region, segmentation_scores
from diffusion_featsel.splits import Split, image_splits


def scene(num_images: int = 9, noise: float = 1.0, classes: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Returns blocky labels, and features that show them under noise, in unlike units."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(classes, (num_images, 1, 4, 4), generator=generator).float()
    labels = F.interpolate(coarse, size=(32, 32))[:, 0].long()
    shown = F.one_hot(F.interpolate(coarse, size=(16, 16))[:, 0].long(), classes).permute(0, 3, 1, 2).float()
    fine = shown + noise * torch.randn(shown.shape, generator=generator)
    return {"a": 100 * fine[:, :2] + 7, "b": fine[:, 2:].repeat(1, 2, 1, 1)}, labels


def rows(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns feature vectors of three overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (num,), generator=generator)
    return torch.randn(num, 5, generator=generator) + F.one_hot(y, 5), y


def test_votes_equal_scikit_learn() -> None:
    x, y = rows(300, 0)
    test = rows(80, 1)[0].view(4, 20, 5)
    weights: Any = lambda distance: np.exp(-distance / 0.07)  # noqa: E731
    reference = KNeighborsClassifier(20, metric="cosine", weights=weights)
    expected = reference.fit(x.numpy(), y.numpy()).predict_proba(test.flatten(0, 1).numpy())
    votes = nearest_votes(x, y, test, 3).flatten(0, 1)
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), expected, atol=1e-4)
    with pytest.raises(ValueError, match="give fewer"):
        nearest_votes(x[:5], y[:5], test, 3)


def test_logistic_regression_equals_scikit_learn() -> None:
    x, y = rows(300, 0)
    x = x * torch.tensor([1.0, 50.0, 0.1, 1.0, 1.0]) + 3
    decay = 1e-2
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double()
    reference = LogisticRegression(C=1 / (decay * len(x)), tol=1e-7).fit(z.numpy(), y.numpy())
    start = LinearHead(torch.zeros(5, 3).double(), torch.zeros(3).double())
    head = fit_logistic(x.double(), y, start, decay)
    np.testing.assert_allclose(head(x.double()).softmax(1), reference.predict_proba(z.numpy()), atol=1e-4)


def test_logistic_regression_starts_from_ridge() -> None:
    x, y = rows(300, 0)
    sums = GramAccumulator({"a": 5}, 3, (10, 30))
    sums.update({"a": x.T.reshape(1, 5, 10, 30)}, y.view(1, 10, 30))
    ridge = fit_ridge(sums.compute(), 1e-2)
    same = fit_logistic(x, y, ridge, iterations=1)
    loss = [float(F.cross_entropy(head(x), y)) for head in (ridge, same)]
    assert loss[1] < loss[0] < math.log(3)


def test_pixels_are_drawn_per_image_and_class() -> None:
    maps = torch.arange(2 * 100.0).view(2, 1, 10, 10)
    classes = torch.zeros(2, 10, 10, dtype=torch.long)
    classes[:, 0] = 1
    classes[:, 1] = 255
    x, y = pixels_of(maps, classes)
    assert len(x) == 180
    assert torch.equal(x[:, 0].long() % 100 // 10 == 0, y == 1)
    generator = torch.Generator().manual_seed(0)
    x, y = pixels_of(maps, classes, 16, False, generator)
    assert (len(x), len(x.unique())) == (32, 32)
    y = pixels_of(maps, classes, 16, True, generator)[1]
    assert y.bincount().tolist() == [16, 16]


@pytest.mark.parametrize("kind", ["ridge", "logistic", "knn"])
def test_probes_read_what_is_there(kind: Kind) -> None:
    settings = ProbeSettings(grid=(16, 16), num_splits=3)
    features, labels = scene(noise=0.2)
    good = probe(features, labels, kind, settings=settings)
    assert good.miou.mean > 0.93
    assert good.pixel_accuracy.mean > 0.95
    worse = probe(scene(noise=1.0)[0], labels, kind, settings=settings)
    assert 0.2 < worse.miou.mean < 0.8
    assert worse.miou.sd > 0
    assert len(worse.per_class) == 3
    assert worse.to_json()["miou"]["mean"] == worse.miou.mean
    again = probe(scene(noise=1.0)[0], labels, kind, settings=settings)
    assert again.scores == worse.scores
    units = {name: 1000 * maps for name, maps in features.items()}
    assert probe(units, labels, kind, settings=settings).miou.mean == pytest.approx(good.miou.mean, abs=0.01)


def test_few_pieces_stand_in_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    module, pieces = importlib.import_module("diffusion_featsel.probe"), []

    def accumulator(*args: Any) -> GramAccumulator:
        pieces.append(args[3])
        return GramAccumulator(*args)

    monkeypatch.setattr(module, "GramAccumulator", accumulator)
    features, labels = scene()
    settings = ProbeSettings(grid=(16, 16), num_splits=1)
    whole = probe(features, labels, settings=settings)
    monkeypatch.setattr(module, "_PIECES_BYTES", 1)
    assert probe(features, labels, settings=settings).miou.mean == pytest.approx(whole.miou.mean, abs=0.02)
    assert pieces == [6, 5]
    one = probe(features, labels, settings=ProbeSettings(grid=(16, 16), num_splits=2, num_train=1))
    assert one.strengths == (STRENGTHS[2],) * 2  # a single image leaves nothing to choose the strength by


@pytest.mark.parametrize("kind", ["logistic", "knn"])
def test_settings_of_a_probe_are_those_of_its_parts(kind: Kind) -> None:
    features, labels = scene(noise=0.7)
    features["constant"] = torch.full((9, 1, 4, 4), 3.0)
    settings = ProbeSettings(
        (16, 16), 2, 4, seed=3, neighbours=5, temperature=0.5, pixels_per_image=40, balanced=True, decay=0.3,
        iterations=2,
    )  # fmt: skip
    maps, classes = on_grid({name: features[name] for name in "ab"}, (16, 16)), labels_on_grid(labels, (16, 16))
    found = probe(features, labels, kind, settings=settings)
    assert found.splits == image_splits(classes, 3, num_train=4, num_splits=2, seed=3)
    for number, (split, scores) in enumerate(zip(found.splits, found.scores, strict=True)):
        train, rows = list(split.train), maps[list(split.test)].movedim(1, 3)
        x, y = pixels_of(maps[train], classes[train])
        mean, deviation = x.mean(0), x.std(0, unbiased=False)
        if kind == "knn":
            generator = torch.Generator().manual_seed(3000 + number)
            some, y = pixels_of(maps[train], classes[train], 40, True, generator)
            votes = nearest_votes((some - mean) / deviation, y, (rows - mean) / deviation, 3, 5, 0.5)
        else:
            sums = GramAccumulator({"all": maps.shape[1]}, 3, (16, 16), 4)
            sums.update({"all": maps[train]}, classes[train])
            votes = fit_logistic(x, y, fit_ridge(sums.compute()), 0.3, 2)(rows)
        expected = segmentation_scores(votes.argmax(-1), classes[list(split.test)], 3)
        assert scores.miou == pytest.approx(expected.miou, abs=2e-3)
    assert len(found.strengths) == (2 if kind == "logistic" else 0)


@pytest.mark.parametrize("kind", ["logistic", "knn"])
def test_settings_of_a_probe_of_images_are_those_of_its_parts(kind: Literal["logistic", "knn"]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(12)
    x = F.one_hot(labels) + 0.7 * torch.randn(36, 3, generator=generator)
    features = {"a": x[:, :, None, None], "constant": torch.ones(36, 2, 1, 1)}
    settings = ProbeSettings(num_splits=3, num_train=12, seed=3, neighbours=2, temperature=0.5, decay=1.0, iterations=3)
    found = probe_images(features, labels, kind, settings=settings)
    assert found.splits == image_splits(labels, 3, num_train=12, num_splits=3, seed=3)
    for split, accuracy in zip(found.splits, found.accuracies, strict=True):
        train, test = list(split.train), list(split.test)
        z = (x - x[train].mean(0)) / x[train].std(0, unbiased=False)
        if kind == "knn":
            votes = nearest_votes(z[train], labels[train], z[test], 3, 2, 0.5)
        else:
            votes = fit_logistic(z[train], labels[train], LinearHead(torch.zeros(3, 3), torch.zeros(3)), 1.0, 3)(
                z[test]
            )
        assert accuracy == pytest.approx(float((votes.argmax(1) == labels[test]).double().mean()), abs=0.01)
    many = ProbeSettings(num_splits=1, num_train=12, neighbours=1000)
    assert probe_images(features, labels, kind, settings=many).accuracy.mean > 0.3


def test_figures_are_means_over_the_splits_that_have_them() -> None:
    scores = SegmentationScores(0.5, 0.6, (0.5, math.nan), 0.3), SegmentationScores(0.7, 0.9, (0.7, 0.2), 0.4)
    told = ProbeResult("ridge", scores, (Split((0,), (1,)), Split((1,), (0,), (1,))), (1.0, 0.1)).to_json()
    assert told.pop("per_class") == pytest.approx([0.6, 0.2])
    means = {name: told.pop(name)["mean"] for name in ("miou", "pixel_accuracy", "boundary_iou")}
    assert means == pytest.approx({"miou": 0.6, "pixel_accuracy": 0.75, "boundary_iou": 0.35})
    assert told == {"kind": "ridge", "strengths": [1.0, 0.1], "num_splits": 2, "missing": [[], [1]]}


def test_miou_equals_torchmetrics_where_all_classes_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (3, 20, 20), generator=generator)
    predicted = torch.where(torch.rand(3, 20, 20, generator=generator) < 0.6, labels, labels.roll(1, 0))
    labels[0, :4] = 255
    scores = segmentation_scores(predicted, labels, 4)
    expected = MulticlassJaccardIndex(4, ignore_index=255)(predicted, labels)
    assert scores.miou == pytest.approx(float(expected))
    assert scores.pixel_accuracy == pytest.approx(float((predicted == labels)[labels != 255].double().mean()))


def test_the_mean_is_over_the_classes_of_the_labels() -> None:
    labels = torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 1]]])
    predicted = torch.tensor([[[0, 0, 0, 2], [1, 1, 1, 1]]])
    scores = segmentation_scores(predicted, labels, 4)
    assert scores.miou == pytest.approx((3 / 4 + 1) / 2)
    assert math.isnan(scores.per_class[2])
    assert math.isnan(scores.per_class[3])


def test_boundaries_are_near_the_outside() -> None:
    mask = torch.zeros(1, 50, 50, dtype=torch.bool)
    mask[0, 10:30, 10:30] = True
    near = boundary_region(mask)  # 2 % of the diagonal of 70.7 pixels is one pixel
    assert int(near.sum()) == 20**2 - 18**2
    labels = mask.long()
    shifted = labels.roll(1, 2)
    scores = segmentation_scores(shifted, labels, 2)
    assert scores.boundary_iou < scores.miou
    assert segmentation_scores(labels, labels, 2).boundary_iou == 1.0


def test_splits_avoid_missing_classes_or_name_them() -> None:
    labels = torch.zeros(10, 4, 4, dtype=torch.long)
    labels[:3, 0, 0] = 1
    for split in image_splits(labels, 2, num_train=3, num_splits=10):
        assert set(split.train) & {0, 1, 2}
        assert sorted(split.train + split.test) == list(range(10))
    labels[:, 0, 1] = torch.arange(10)
    with pytest.warns(UserWarning, match="no training image has the classes"):
        split = image_splits(labels, 10, num_train=3, num_splits=1)[0]
    assert len(split.missing) >= 5
    with pytest.raises(ValueError, match="`num_train`"):
        image_splits(labels, 10, num_train=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = [image_splits(labels[:, :0], 2, seed=seed) for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_labels_that_do_not_exist_are_refused() -> None:
    features, labels = scene()
    labels[4, 0, 0] = 7
    with pytest.raises(ValueError, match="image 4 have the class 7"):
        probe(features, labels, num_classes=3)
    with pytest.raises(ValueError, match="all are 255"):
        probe(features, torch.full_like(labels, 255))


@pytest.mark.parametrize("kind", ["logistic", "knn"])
@pytest.mark.parametrize("pool", ["mean", "gem"])
def test_images_are_classified(kind: Literal["logistic", "knn"], pool: Literal["mean", "gem"]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(12)
    maps = F.one_hot(labels)[:, :, None, None] + 0.5 * torch.randn(36, 3, 4, 4, generator=generator)
    found = probe_images({"a": maps}, labels, kind, pool=pool, settings=ProbeSettings(neighbours=5))
    assert found.accuracy.mean > 0.95
    assert probe_images({"a": maps[torch.randperm(36, generator=generator)]}, labels, kind).accuracy.mean < 0.7


def test_pooling_keeps_signs() -> None:
    maps = torch.tensor([[[[1.0, 3.0]], [[-1.0, -3.0]]]])
    torch.testing.assert_close(pooled_features({"a": maps}), torch.tensor([[2.0, -2.0]]))
    cube = 14 ** (1 / 3)
    torch.testing.assert_close(pooled_features({"a": maps}, "gem"), torch.tensor([[cube, -cube]]))


def test_one_split_has_no_deviation() -> None:
    assert math.isnan(Spread.of([0.5]).sd)
    assert Spread.of([0.0, 1.0]).sd == pytest.approx(math.sqrt(0.5))


def test_labels_are_those_of_the_nearest_pixel() -> None:
    labels = torch.randint(9, (2, 17, 30))
    expected = F.interpolate(labels[:, None].float(), size=(6, 7), mode="nearest-exact")[:, 0].long()
    assert torch.equal(labels_on_grid(labels, (6, 7)), expected)
