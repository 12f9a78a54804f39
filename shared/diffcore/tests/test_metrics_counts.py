"""Metrics that are sums of counts: keypoints, segmentation, CLIP score."""

import math

import pytest
import torch

from diffcore.metrics import ClipScore, DataSetIoU, PercentageCorrectKeypoints
from diffcore.testing.metrics import check_metric


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def keypoints() -> tuple[torch.Tensor, ...]:
    """Twelve images of five points on whole pixels, which float16 holds exactly; the first has none visible."""
    target, offset = (random(0, 12, 5, 2) * 100).round(), (random(1, 12, 5, 2) * 30 - 15).round()
    box = (50 + random(2, 12, 2) * 50).round()
    visible = random(3, 12, 5) > 0.4
    visible[0] = False
    return target + offset, target, box, visible


def brute_keypoints(predicted, target, box, visible, alpha) -> tuple[float, float]:
    every, images = [], []
    for p, q, (h, w), seen in zip(predicted, target, box, visible, strict=True):
        hits = [math.dist(p[i], q[i]) <= alpha * max(h, w) for i in range(len(p)) if seen[i]]
        every += hits
        images += [sum(hits) / len(hits)] if hits else []
    return sum(every) / len(every), sum(images) / len(images)


def test_keypoints_however_the_rows_arrive():
    data = keypoints()
    pairs = [brute_keypoints(*(x.tolist() for x in data), alpha) for alpha in (0.1, 0.15)]
    reference = [[point for point, _ in pairs], [image for _, image in pairs]]
    batches = [tuple(x[:5] for x in data), tuple(x[5:] for x in data)]
    check_metric(lambda: PercentageCorrectKeypoints((0.1, 0.15)), batches, reference, atol=1e-10, half_atol=1e-10)


def test_keypoints_by_hand():
    metric = PercentageCorrectKeypoints([0.1])
    target = torch.zeros(1, 3, 2)
    predicted = torch.tensor([[[0.0, 5.0], [10.0, 0.0], [10.1, 0.0]]])  # the border counts
    metric.update(predicted, target, torch.tensor([[40.0, 100.0]]))
    found = metric.compute()
    assert float(found.per_point) == float(found.per_image) == pytest.approx(2 / 3)
    one = torch.tensor([[True, False, False]])
    metric.update(predicted, target, torch.tensor([[40.0, 100.0]]), one)
    found = metric.compute()
    assert float(found.per_point) == pytest.approx(3 / 4)  # over points, and over images
    assert float(found.per_image) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("pixels", [29, 57, 58])
def test_keypoints_on_the_border_count_whatever_rounding_does(pixels):
    alpha = pixels / 100
    assert alpha * 100 < pixels  # in floating point
    metric = PercentageCorrectKeypoints([alpha])
    metric.update(torch.tensor([[[float(pixels), 0.0]]]), torch.zeros(1, 1, 2), torch.tensor([[100.0, 60.0]]))
    assert float(metric.compute().per_point) == 1


def test_bad_keypoints_are_named():
    metric = PercentageCorrectKeypoints()
    predicted, target, box, visible = keypoints()
    hidden = predicted.clone()
    hidden[~visible] = torch.nan  # what is not visible may be anything
    metric.update(hidden, target, box, visible)
    with pytest.raises(ValueError, match=r"keypoints has NaN or infinity in \d+ of 12 rows"):
        metric.update(hidden, target, box)
    with pytest.raises(ValueError, match="box 7 has no size"):
        metric.update(predicted, target, torch.where(torch.arange(12)[:, None] == 7, 0.0, box), visible)
    with pytest.raises(ValueError, match="`alphas` are"):
        PercentageCorrectKeypoints((0.1, -1.0))
    assert math.isnan(PercentageCorrectKeypoints().compute().per_point)


def labels(seed: int) -> torch.Tensor:
    return (random(seed, 9, 6, 5) ** 2 * 4).long()


def brute_iou(predicted: torch.Tensor, label: torch.Tensor, classes: int) -> list[float]:
    pixels = list(zip(predicted.flatten().tolist(), label.flatten().tolist(), strict=True))
    found = []
    for c in range(classes):
        union = sum(p == c or q == c for p, q in pixels)
        found.append(sum(p == c and q == c for p, q in pixels) / union if union else math.nan)
    return found


def test_segmentation_however_the_rows_arrive():
    predicted, label = labels(0), labels(1)
    per_class = brute_iou(predicted, label, 4)
    batches = [(predicted[:4], label[:4]), (predicted[4:], label[4:])]
    check_metric(lambda: DataSetIoU(4), batches, (sum(per_class) / 4, per_class), atol=1e-10, half_atol=1e-10)


def test_segmentation_sums_before_it_divides_and_leaves_absent_classes_out():
    metric = DataSetIoU(4, ignore_label=255)
    metric.update(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 0, 0]]))
    metric.update(torch.tensor([[1, 1, 3, 0]]), torch.tensor([[1, 0, 255, 255]]))
    found = metric.compute()
    # Class 0: 3 of 5; class 1: 1 of 3; per image their means were .75 and .5 or so.
    torch.testing.assert_close(
        found.per_class, torch.tensor([3 / 5, 1 / 3, math.nan, math.nan]).double(), equal_nan=True
    )
    assert float(found.mean) == pytest.approx((3 / 5 + 1 / 3) / 2)
    with pytest.raises(ValueError, match="predicted has classes from 0 to 4; they must be from 0 to 3"):
        metric.update(torch.tensor([[0, 4]]), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="label has classes from -1"):
        metric.update(torch.tensor([[0, 0]]), torch.tensor([[0, -1]]))
    assert math.isnan(DataSetIoU(2).compute().mean)


def embeddings() -> tuple[torch.Tensor, ...]:
    text = (random(5, 20, 16) - 0.5).half().float()
    return (text + 0.8 * (random(6, 20, 16) - 0.5)).half().float(), text, random(7, 20) > 0.7


def test_clip_score_however_the_rows_arrive():
    images, texts, truncated = embeddings()
    images[3] = -texts[3]  # cut off at 0
    scores = [
        max(100 * float(torch.cosine_similarity(a.double(), b.double(), dim=0)), 0.0)
        for a, b in zip(images, texts, strict=True)
    ]
    mean = sum(scores) / 20
    error = math.sqrt(sum((score - mean) ** 2 for score in scores) / 19 / 20)
    batches = [(images[:7], texts[:7], truncated[:7]), (images[7:], texts[7:], truncated[7:])]
    check_metric(ClipScore, batches, (mean, error, 20, int(truncated.sum())), atol=1e-10, half_atol=1e-10)


def test_clip_score_in_closed_form():
    metric = ClipScore()
    metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert metric.compute().value == pytest.approx(100 / 2**0.5)
    assert math.isnan(metric.compute().standard_error)
    metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    assert metric.compute().value == pytest.approx(50 / 2**0.5)


def test_bad_embeddings_are_named():
    metric, (images, texts, _) = ClipScore(), embeddings()
    metric.update(images, texts)
    texts[4] = 0
    with pytest.raises(ValueError, match="text features are all 0 in row 24"):
        metric.update(images, texts)
    images[1, 1] = torch.inf
    with pytest.raises(ValueError, match="image features has NaN or infinity in 1 of 20 rows: 21;"):
        metric.update(images, texts)
    with pytest.raises(ValueError, match="no pairs"):
        ClipScore().compute()
