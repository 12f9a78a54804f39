"""Percentage of correct key points (PCK), in the four forms that the literature mixes.

A point is correct at threshold alpha if it lies within alpha times the longer side of the target image ("image") or of
the object's box in it ("box"). The share is taken over all points of all pairs ("points"), or as the mean over pairs of
each pair's share ("pairs"). The forms differ by several percent points on the same predictions; all four are always
given together.

References:
    Yang and Ramanan 2013; per point and per image: Min et al. 2019 (SPair-71k).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diffcore.metrics.keypoints import count_correct
from diffusion_featsel.pairs import Pair

RelativeTo = Literal["image", "box"]
MeanOver = Literal["points", "pairs"]
THRESHOLDS = (0.05, 0.1, 0.15)
_FORMS: tuple[tuple[RelativeTo, MeanOver], ...] = (
    ("image", "points"),
    ("image", "pairs"),
    ("box", "points"),
    ("box", "pairs"),
)


@dataclass(frozen=True)
class Interval:
    """A share with its 95 % interval, from resampling the pairs.

    Attributes:
        value: Share over the data set, from 0 to 1; NaN without any point.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CorrectShares:
    """The shares of correct points in one of the four forms, one for each threshold.

    Attributes:
        relative_to: Whose longer side the thresholds are shares of: the target image's or the object's box's.
        mean_over: Whether all points weigh the same, or all pairs.
        overall: Share over the whole data set.
        by_category: Share of each category.
        category_mean: Mean of the categories' shares, in which rare ones weigh as much as frequent ones.
    """

    relative_to: RelativeTo
    mean_over: MeanOver
    overall: tuple[Interval, ...]
    by_category: Mapping[str, tuple[float, ...]]
    category_mean: tuple[Interval, ...]


@dataclass(frozen=True)
class KeypointScores:
    """All four forms of PCK over a data set, with what was left out.

    Attributes:
        thresholds: Radii, as shares of the longer side.
        forms: Shares relative to the image and to the box, over points and over pairs.
        num_pairs: Number of pairs with at least one counted point.
        num_points: Number of counted points.
        num_invisible: Number of points left out because they are not shown.
        num_outside: Number of shown points left out because they are outside the frame of either image.
        num_without_box: Number of pairs left out because the object's box has no size.
        num_without_points: Number of pairs left out because no point of them counts.
    """

    thresholds: tuple[float, ...]
    forms: tuple[CorrectShares, ...]
    num_pairs: int
    num_points: int
    num_invisible: int
    num_outside: int
    num_without_box: int
    num_without_points: int

    def form(self, relative_to: RelativeTo, mean_over: MeanOver) -> CorrectShares:
        """Returns the shares of one form."""
        return next(f for f in self.forms if (f.relative_to, f.mean_over) == (relative_to, mean_over))

    def share(
        self, relative_to: RelativeTo = "image", mean_over: MeanOver = "points", threshold: float = 0.1
    ) -> Interval:
        """Returns the share over the whole data set in one form at one threshold.

        Raises:
            ValueError: It was not computed for this threshold.
        """
        if threshold not in self.thresholds:
            raise ValueError(f"`threshold` is {threshold}, and the scores are for {self.thresholds}; give one of them")
        return self.form(relative_to, mean_over).overall[self.thresholds.index(threshold)]


def keypoint_scores(
    pairs: Sequence[Pair],
    predicted: Sequence[Float[Tensor, "_ 2"]],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    num_resamples: int = 1000,
    seed: int = 0,
) -> KeypointScores:
    """Compares predicted positions with the true ones, in all four forms.

    Points that are invisible, or outside the frame of either image, do not count; a point on the border of its circle
    is correct. Pairs whose box has no size are left out of all forms, so that these are over the same pairs.

    Args:
        pairs: Pairs with their true positions.
        predicted: Predicted positions (x, y) of each pair's points, in pixels of the original target image.
        thresholds: Radii, as shares of the longer side.
        num_resamples: Number of resamplings of the pairs for the intervals.
        seed: Seed of the resamplings.

    Raises:
        ValueError: There is not one prediction per pair, with one position per point, or one that counts is not finite.

    Example:
        >>> points = torch.tensor([[10.0, 10.0], [20.0, 30.0]])
        >>> pair = Pair("a.png", "b.png", points, points, (100, 100), (100, 100), target_box=(0.0, 0.0, 40.0, 50.0))
        >>> scores = keypoint_scores([pair], [points + torch.tensor([[9.0, 0.0], [0.0, 4.0]])])
        >>> scores.share("image", "points").value, scores.share("box", "points").value
        (1.0, 0.5)
    """
    if len(pairs) != len(predicted):
        raise ValueError(f"there are {len(predicted)} predictions for {len(pairs)} pairs; give one for each")
    if wrong := [pair for pair, found in zip(pairs, predicted, strict=True) if found.shape != pair.target_points.shape]:
        raise ValueError(f"the pair {wrong[0].source}, {wrong[0].target} has no prediction for each of its points")
    padded = _Padded.of(pairs, predicted)
    num_counted, num_shown = padded.counted.sum(1), padded.shown.sum(1)
    has_box = padded.box.amax(1) > 0
    kept = ((num_counted > 0) & has_box).nonzero().flatten()
    kept = torch.tensor(sorted(kept.tolist(), key=lambda i: pairs[i].category), dtype=torch.long)
    categories = Counter(pairs[i].category for i in kept.tolist())
    sums = _resampled(padded.sums(kept, tuple(thresholds)), list(categories.values()), num_resamples, seed)
    forms = tuple(
        CorrectShares(
            form[0],
            form[1],
            _intervals(_shares(sums.sum(1), number)),
            dict(zip(categories, map(tuple, _shares(sums[0], number).tolist()), strict=False)),
            _intervals(_shares(sums, number).nanmean(1)),
        )
        for number, form in enumerate(_FORMS)
    )
    return KeypointScores(
        tuple(thresholds),
        forms,
        len(kept),
        int(num_counted[kept].sum()),
        sum(len(pair.source_points) for pair in pairs) - int(num_shown.sum()),
        int((num_shown - num_counted).sum()),
        int(((num_counted > 0) & ~has_box).sum()),
        int((num_counted == 0).sum()),
    )


@dataclass(frozen=True)
class _Padded:
    """The positions of all pairs, padded to the same number of points, and sizes of images and objects."""

    found: Float64[Tensor, "pairs points 2"]
    true: Float64[Tensor, "pairs points 2"]
    shown: Bool[Tensor, "pairs points"]
    counted: Bool[Tensor, "pairs points"]
    image: Float64[Tensor, "pairs 2"]
    box: Float64[Tensor, "pairs 2"]

    @classmethod
    def of(cls, pairs: Sequence[Pair], predicted: Sequence[Tensor]) -> "_Padded":
        most = max((len(pair.target_points) for pair in pairs), default=0)
        found, true, source = torch.zeros(3, len(pairs), most, 2, dtype=torch.float64)
        shown = torch.zeros(len(pairs), most, dtype=torch.bool)
        for row, (pair, points) in enumerate(zip(pairs, predicted, strict=True)):
            number = len(points)
            found[row, :number], true[row, :number] = points, pair.target_points
            source[row, :number] = pair.source_points
            shown[row, :number] = pair.shown
        image = _stacked([pair.target_size for pair in pairs])
        inside = _inside(true, image) & _inside(source, _stacked([pair.source_size for pair in pairs]))
        box = _stacked([pair.box for pair in pairs])
        return cls(found, true, shown, shown & inside, image, box)

    def sums(self, kept: Tensor, thresholds: tuple[float, ...]) -> Tensor:
        """Returns what is summed over pairs: correct points in each form and threshold, then points, then pairs."""
        counted = self.counted[kept]
        points = counted.double().sum(1, keepdim=True)
        parts = []
        for size in (self.image[kept], self.box[kept]):
            correct = count_correct(self.found[kept], self.true[kept], size, thresholds, counted)
            parts += [correct, correct / points]
        return torch.cat([*parts, points, torch.ones_like(points)], 1)


def _stacked(sizes: Sequence[Sequence[float | int]]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.float64).view(-1, 2)


def _inside(points: Tensor, sizes: Tensor) -> Tensor:
    return ((points >= -0.5) & (points <= sizes.flip(1)[:, None] - 0.5)).all(2)


def _resampled(values: Tensor, group_sizes: Sequence[int], num_resamples: int, seed: int) -> Tensor:
    """Returns sums of values (1 + resamples, groups, values) over each group of pairs.

    The first are over the pairs as they are; the others over as many pairs, drawn with replacement.
    """
    num_pairs, generator = len(values), torch.Generator().manual_seed(seed)
    sizes = list(group_sizes)

    def summed(counts: Tensor) -> Tensor:
        parts = zip(counts.split(sizes, 1), values.split(sizes), strict=True)
        return torch.stack([some @ rows for some, rows in parts], 1)

    if not sizes:
        return values.new_full((1, 1, values.shape[1]), torch.nan)
    found = [summed(torch.ones(1, num_pairs, dtype=torch.float64))]
    each = max(2**22 // num_pairs, 1)
    for start in range(0, num_resamples, each):
        drawn = torch.randint(num_pairs, (min(each, num_resamples - start), num_pairs), generator=generator)
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        found.append(summed(counts.scatter_add_(1, drawn, torch.ones_like(counts))))
    return torch.cat(found)


def _shares(sums: Tensor, form: int) -> Tensor:
    """Returns the shares at each threshold in one of the forms."""
    num_thresholds = (sums.shape[-1] - 2) // len(_FORMS)
    correct = sums[..., form * num_thresholds : (form + 1) * num_thresholds]
    size = -1 if _FORMS[form][1] == "pairs" else -2
    return correct / sums[..., size, None]


def _intervals(shares: Tensor) -> tuple[Interval, ...]:
    """Returns the value of the pairs as they are, and the middle 95 % of the resamples', for each threshold."""
    resampled = shares[1:] if len(shares) > 1 else shares
    ends = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return tuple(Interval(*row) for row in torch.stack([shares[0], *ends], 1).tolist())
