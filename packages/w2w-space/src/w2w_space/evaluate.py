"""What edits and samples are worth, by their pictures: effect, leak, identity, background, distance and diversity.

The same prompts and noise are drawn before and after an edit (paper, section 4.3). Identity is the cosine of features
of pictures from different noise, so that it compares with two levels measured in the same way: pictures of one subject,
and pictures of two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from w2w_space.diagnose import nearest_among_members, nearest_members
from w2w_space.directions import Directions
from w2w_space.edit import edit
from w2w_space.probe import Scorer
from w2w_space.render import render
from w2w_space.space import Point, WeightSpace

Features = Callable[[Tensor], Tensor]
"""Function from pictures in [0, 1] to one row of features each, such as `diffcore.metrics.feature_extractor` gives."""


@dataclass(frozen=True, eq=False)
class EditScore:
    """What an edit did to several subjects, mean over subjects, prompts and seeds.

    Attributes:
        name: Name of the direction.
        strength: Strength of the edit in standard deviations.
        before: Score of the attribute before the edit.
        after: Score of the attribute after the edit.
        changes: Mean absolute change of each attribute of the scorer, by name.
        leaked: Name of the attribute, apart from the edited one, that changed most.
        identity: Cosine of features before and after, from different noise; NaN without features.
        difference: Mean absolute change of the pictures' values.
        background: The same where the mask is; NaN without a mask.
    """

    name: str
    strength: float | int
    before: float
    after: float
    changes: Mapping[str, float]
    leaked: str
    identity: float
    difference: float
    background: float

    @property
    def effect(self) -> float:
        """Change of the attribute's own score."""
        return self.after - self.before

    @property
    def leak(self) -> float:
        """Mean absolute change of the attribute that changed most, apart from the edited one."""
        return self.changes.get(self.leaked, 0.0)


@dataclass(frozen=True, eq=False)
class EditScores:
    """Scores of several edits of the same subjects, with the levels that identities compare with.

    Attributes:
        rows: Score of each edit.
        same: Cosine of features of two pictures of one subject, from different noise.
        different: Cosine of features of pictures of two subjects, from different noise.
    """

    rows: tuple[EditScore, ...]
    same: float
    different: float

    def kept(self, row: EditScore) -> float:
        """Returns the share of a subject's identity that an edit keeps: 1 is one subject, 0 are two.

        Args:
            row: Score of an edit.
        """
        return (row.identity - self.different) / (self.same - self.different)


def evaluate_edits(
    model: DiffusionModel,
    subjects: Sequence[Point],
    directions: Directions,
    scorer: Scorer,
    *,
    strengths: Mapping[str, float | int] | float | int = 2.0,
    keep_others: bool = False,
    scored_as: Mapping[str, str] | None = None,
    features: Features | None = None,
    mask: Float[Tensor, "h w"] | None = None,
    seeds: Sequence[int] = range(4),
    on_edit: Callable[[str, Tensor], None] | None = None,
    **options: Any,
) -> EditScores:
    """Edits each subject along each direction, draws it before and after, and scores the pictures.

    Args:
        model: Base model of the space.
        subjects: Points of one space.
        directions: Directions of that space; those that the scorer does not know are left out.
        scorer: Judge of the attributes.
        strengths: Strength in standard deviations, for all directions or by name.
        keep_others: Whether the scores of all other directions are held in each edit.
        scored_as: Name of the scorer's attribute for directions that are named otherwise.
        features: Features that tell subjects apart; None leaves identity out.
        mask: Weight of each place of the pictures in [0, 1], 1 for background that an edit should leave alone.
        seeds: Seeds of the initial noise, at least two where there are features.
        on_edit: Called with the name of each direction and its pictures after the edit; "" for those before.
        **options: Prompts or labels, and more arguments of `render`.

    Raises:
        UserError: The scorer knows none of the directions, or identity is asked for with a single seed.
    """
    named = {row.name: (scored_as or {}).get(row.name, row.name) for row in directions.rows}
    known = [name for name, as_name in named.items() if as_name in scorer.attributes]
    if isinstance(strengths, Mapping):
        known = [name for name in known if name in strengths]
    if not known:
        raise UserError(
            f"the scorer knows {', '.join(scorer.attributes)}, and the directions are {', '.join(named)}; "
            "name them alike"
        )
    if features is not None and len(list(seeds)) < 2:
        raise UserError("`seeds` has a single seed, and identity compares pictures from different noise; give two")
    before = render(model, subjects, seeds=seeds, **options)
    if on_edit is not None:
        on_edit("", before)
    start = _scores(scorer, before)
    shown = None if features is None else _features(features, before)
    rows = []
    for name in known:
        strength = strengths[name] if isinstance(strengths, Mapping) else strengths
        others = [row.name for row in directions.rows if row.name != name] if keep_others else []
        moved = [edit(point, {name: strength}, directions, keep=others).point for point in subjects]
        after = render(model, moved, seeds=seeds, **options)
        if on_edit is not None:
            on_edit(name, after)
        end = _scores(scorer, after)
        changes = dict(zip(scorer.attributes, (end - start).abs().mean(0).tolist(), strict=True))
        own = scorer.attributes.index(named[name])
        others_changed = {other: change for other, change in changes.items() if other != named[name]}
        rows.append(
            EditScore(
                name,
                strength,
                float(start[:, own].mean()),
                float(end[:, own].mean()),
                changes,
                max(others_changed, key=lambda other: others_changed[other], default=""),
                float("nan") if features is None or shown is None else _across(shown, _features(features, after)),
                float((after - before).abs().mean()),
                float("nan") if mask is None else _masked(after - before, mask),
            )
        )
    same, different = (float("nan"),) * 2 if shown is None else (_across(shown, shown), _between(shown))
    return EditScores(tuple(rows), same, different)


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Where samples lie among the members, and how varied their pictures are.

    Attributes:
        nearest: Distance of each sample to its nearest member, in standard deviations.
        members_nearest: The same of each member to the others.
        lengths: Distance of each sample from the mean.
        reference_lengths: Distances of the members from the mean.
        diversity: Mean distance (1 - cosine) of features of two samples' pictures from the same noise; NaN without
            pictures.
        members_diversity: The same of as many members.
    """

    nearest: Float[Tensor, " n"]
    members_nearest: Float[Tensor, " members"]
    lengths: Float[Tensor, " n"]
    reference_lengths: Float[Tensor, " reference"]
    diversity: float
    members_diversity: float


def evaluate_samples(
    space: WeightSpace,
    points: Sequence[Point],
    model: DiffusionModel | None = None,
    *,
    features: Features | None = None,
    seed: int = 0,
    **options: Any,
) -> SampleScores:
    """Returns where samples lie among the members and, given a model and features, how varied their pictures are.

    Args:
        space: Space with its members.
        points: Samples of the space.
        model: Base model that draws samples and as many members; None leaves pictures out.
        features: Features that tell subjects apart.
        seed: Seed by which members are chosen.
        **options: Seeds, prompts or labels, and more arguments of `render`.

    Raises:
        UserError: The space was written without its members.
    """
    z = torch.stack([point.z for point in points])
    _, distances, _ = nearest_members(space, z)
    varied = [float("nan")] * 2
    if model is not None and features is not None and len(points) > 1:
        order = torch.randperm(len(space.members), generator=torch.Generator().manual_seed(seed))
        some = [space.point(space.members[place]) for place in order[: len(points)].tolist()]
        varied = [1 - _alike(_features(features, render(model, each, **options))) for each in (points, some)]
    return SampleScores(
        distances,
        nearest_among_members(space),
        z.norm(dim=1),
        space.members.float().norm(dim=1),
        varied[0],
        varied[1],
    )


def _scores(scorer: Scorer, pictures: Tensor) -> Float64[Tensor, "n attributes"]:
    """Returns the scores of each subject, mean over its pictures."""
    return scorer(pictures.flatten(0, 2)).unflatten(0, (len(pictures), -1)).mean(1)


def _features(features: Features, pictures: Tensor) -> Float[Tensor, "n conditions seeds d"]:
    """Returns unit features of pictures."""
    rows = torch.cat([features(part).float().cpu() for part in pictures.flatten(0, 2).split(64)])
    return functional.normalize(rows, dim=1).unflatten(0, pictures.shape[:3])


def _across(one: Tensor, other: Tensor) -> float:
    """Returns the mean cosine of a subject's pictures of two kinds, of one condition and different noise."""
    cosines = torch.einsum("ncsd,nctd->ncst", one, other)
    seeds = cosines.shape[-1]
    return float((cosines.sum((2, 3)) - cosines.diagonal(dim1=2, dim2=3).sum(2)).mean() / (seeds * (seeds - 1)))


def _between(shown: Tensor) -> float:
    """Returns the mean cosine of two subjects' pictures, of one condition and different noise."""
    n, _, seeds, _ = shown.shape
    if n < 2:
        return float("nan")
    cosines = torch.einsum("ncsd,mctd->nmcst", shown, shown)
    apart = cosines.sum((3, 4)) - cosines.diagonal(dim1=3, dim2=4).sum(3)
    total = apart.sum() - apart.diagonal(dim1=0, dim2=1).sum()
    return float(total / (n * (n - 1) * shown.shape[1] * seeds * (seeds - 1)))


def _alike(shown: Tensor) -> float:
    """Returns the mean cosine of two subjects' pictures from the same noise."""
    n = len(shown)
    cosines = torch.einsum("ncsd,mcsd->nmcs", shown, shown).mean((2, 3))
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))


def _masked(change: Tensor, mask: Tensor) -> float:
    if change.shape[-2:] != mask.shape:
        raise UserError(
            f"`mask` has {tuple(mask.shape)} pixels, and the pictures have {tuple(change.shape[-2:])}; scale it"
        )
    if not bool(mask.any()):
        raise UserError("`mask` is empty; mark the background with white")
    return float((change.abs().mean(-3) * mask).sum() / (mask.sum() * change[..., 0, 0, 0].numel()))


def recognised(
    model: DiffusionModel,
    points: Sequence[Point],
    truth: Float[Tensor, "n conditions seeds *image"],
    *,
    features: Features,
    **options: Any,
) -> Float[Tensor, " n"]:
    """Returns how alike the pictures of points are to true ones of their subjects: mean cosine, different noise.

    Args:
        model: Base model of the points.
        points: Points that stand for the subjects, such as inverted ones.
        truth: Pictures of each subject, by condition and seed.
        features: Features that tell subjects apart.
        **options: Seeds, at least two, prompts or labels, and more arguments of `render`.
    """
    drawn, true = _features(features, render(model, points, **options)), _features(features, truth)
    return torch.stack([torch.tensor(_across(one[None], other[None])) for one, other in zip(drawn, true, strict=True)])
