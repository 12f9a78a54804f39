"""Directions of attributes in a space: along which members differ that have an attribute and that do not.

All vectors are in the coordinates z = beta / sigma (standard deviations), where members are a round cloud. With z_i the
members' coordinates and y_i their labels, less their means:

* conditional (default): regress the coordinates on all labels at once, z_i = sum_j y_ij w_j + rest; w_j is what
  attribute j adds where the others stay the same.
* mean: the difference of the members' means, w_j = cov(z, y_j) / var(y_j).
* normal (paper, section 3.3; published code): regress the labels on the coefficients, y_i = n . beta_i, and move beta
  along n. It classifies best, but leaves the cloud: in z it is cov(z, y) / sigma^2, long where members hardly differ.
* ridge: the same with a penalty; logistic: normal of a logistic regression in z.

The score of an attribute is its least-squares readout y_i = r . z_i; it stays the same under moves orthogonal to r.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.linalg import qr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from diffcore.errors import UserError
from w2w_space.coordinates import Space
from w2w_space.labels import Labels

Estimator = Literal["conditional", "mean", "normal", "ridge", "logistic"]
_ALIASED = 1e-8  # relative size of a label's part that the other labels do not explain


@dataclass(frozen=True, eq=False)
class Direction:
    """The direction of one attribute.

    Attributes:
        name: Name of the attribute.
        vector: Move in coordinates z that changes the place on the axis by 1.
        axis: Weights of the coordinates z that give the place on the direction's axis: the projection onto the unit
            vector, in z, or in coefficients beta for the estimators "normal" and "ridge".
        score: Readout r of the attribute's value from z, relative to the mean.
        std: Standard deviation of the members' places on the axis, the unit of strengths.
        largest: Largest place of a member on the axis, the paper's unit.
        raw: Length of the estimator's vector before it was made a unit vector; strengths of the published code are
            multiples of that vector.
        auc: Area under the ROC curve of places of members that were left out of the fit; for continuous labels the
            correlation with their values.
        counts: Members above and not above the middle of the values.
        estimator: Estimator that found it.
    """

    name: str
    vector: Float64[Tensor, " m"]
    axis: Float64[Tensor, " m"]
    score: Float64[Tensor, " m"]
    std: float
    largest: float
    raw: float
    auc: float
    counts: tuple[int, int]
    estimator: Estimator

    def place(self, z: Float[Tensor, "*b m"]) -> Float64[Tensor, "*b"]:
        """Returns the places of points on the axis, in standard deviations of the members.

        Args:
            z: Coordinates of the points.
        """
        return z.double() @ self.axis / self.std

    def deciles(self) -> list[float]:
        """Returns the share of the vector's squared length in each tenth of the components, largest variance first."""
        shares = self.vector.square() / self.vector.square().sum()
        return [float(part.sum()) for part in np.array_split(shares.numpy(), 10)]


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of a space, by the names of attributes.

    Attributes:
        space: Fingerprint of the space that they belong to.
        rows: One direction for each attribute.
        notes: Sentences about uncertain directions, such as those of rare attributes.
    """

    space: str
    rows: tuple[Direction, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Direction:
        """Returns the direction of an attribute.

        Args:
            name: Name of the attribute.

        Raises:
            UserError: There is none.
        """
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise UserError(f"there is no direction {name!r}; there are {', '.join(row.name for row in self.rows)}")
        return found

    def matrix(self) -> Float64[Tensor, "k m"]:
        """Returns the unit vectors, one row per attribute."""
        return torch.stack([row.vector / row.vector.norm() for row in self.rows])

    def cosines(self) -> Float64[Tensor, "k k"]:
        """Returns the cosine of each pair of directions."""
        return self.matrix() @ self.matrix().T

    def leaks(self) -> Float64[Tensor, "k k"]:
        """Returns the change of each score (column) along each direction (row), relative to that of its own score.

        Scores are compared in units of what their own direction changes in one standard deviation.
        """
        scores = torch.stack([row.score for row in self.rows])
        effects = self.matrix() @ scores.T
        return effects / effects.diagonal().abs().clamp(min=1e-300)[None]


def find_directions(
    space: Space,
    labels: Labels,
    *,
    estimator: Estimator = "conditional",
    ridge: float = 1e3,
    folds: int = 5,
) -> Directions:
    """Returns the directions of all attributes.

    Args:
        space: Space with its members.
        labels: Labels in the order of the members.
        estimator: Way to the vectors; see the module.
        ridge: Penalty of the estimator "ridge", on squared coefficients beta.
        folds: Number of parts of the members that are left out in turn for the figure of merit.

    Raises:
        UserError: The space has no members, labels are the same for all or known of too few members, or two attributes
            say the same.

    Example:
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (6, 6)}, rank=1), torch.Generator().manual_seed(0)
        >>> matrix = torch.randn(60, 12, generator=g)
        >>> names = tuple(str(i) for i in range(60))
        >>> from w2w_space.space import WeightSpace
        >>> space = WeightSpace.build(Population(layout, names, Stacked(matrix)), gauge="raw")
        >>> found = find_directions(space, Labels.of(names, {"tall": (matrix[:, 0] > 0).double().tolist()}))
        >>> found["tall"].auc > 0.8
        True
    """
    if estimator not in get_args(Estimator):
        raise UserError(f"`estimator` is {estimator!r}; give one of {', '.join(get_args(Estimator))}")
    if len(space.members) != len(labels.values) or not len(space.members):
        raise UserError(
            f"there are labels of {len(labels.values)} members, and the space has {len(space.members)}; directions "
            "need a space with its members"
        )
    notes = labels.require()
    z, sigma = space.members.double(), space.variances.sqrt()
    _require_different(labels)
    vectors = _estimated(z, sigma, labels, estimator, ridge)
    axes = _axes(vectors, sigma, estimator)
    scores = _readouts(z, labels)
    held_out = _held_out(z, sigma, labels, estimator, ridge, folds)
    rows = []
    for place, name in enumerate(labels.attributes):
        places = z @ axes[place]
        raw = float(vectors[place] @ axes[place])
        column = labels.values[:, place]
        known = column.isfinite()
        high = column[known] > (column[known].max() + column[known].min()) / 2
        rows.append(
            Direction(
                name,
                vectors[place] / raw,
                axes[place],
                scores[place],
                float(places.std()),
                float(places.max()),
                raw,
                _merit(held_out[known, place], column[known], binary=labels.binary(place)),
                (int(high.sum()), int((~high).sum())),
                estimator,
            )
        )
    return Directions(space.fingerprint, tuple(rows), tuple(notes))


def bootstrapped(
    space: Space, labels: Labels, found: Directions, *, ridge: float = 1e3, resamples: int = 200, seed: int = 0
) -> list[float]:
    """Returns the share of resamples of the members in which each direction points to the same side.

    Args:
        space: Space with its members.
        labels: Labels in the order of the members.
        found: Directions of these labels.
        ridge: Penalty of the estimator "ridge".
        resamples: Number of resamples with replacement.
        seed: Seed of the resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    z, sigma = space.members.double(), space.variances.sqrt()
    agreed = torch.zeros(len(found.rows))
    for _ in range(resamples):
        rows = torch.randint(len(z), (len(z),), generator=generator)
        drawn = replace(labels, values=labels.values[rows])
        vectors = _estimated(z[rows], sigma, drawn, found.rows[0].estimator, ridge)
        agreed += ((vectors * found.matrix()).sum(1) > 0).float()
    return (agreed / resamples).tolist()


def held_out_leaks(
    space: Space,
    labels: Labels,
    *,
    estimator: Estimator = "conditional",
    ridge: float = 1e3,
    splits: int = 10,
    seed: int = 0,
) -> Float64[Tensor, "k k"]:
    """Returns the change of each score (column) along each direction (row), relative to that of its own score.

    As `Directions.leaks`, with directions from one half of the members and scores from the other, mean over random
    halves: what members have in common by chance is in both, and hides or feigns a leak where both come from one set.

    Args:
        space: Space with its members.
        labels: Labels in the order of the members.
        estimator: Way to the vectors; see the module.
        ridge: Penalty of the estimator "ridge".
        splits: Number of random halves, each of which is used both ways.
        seed: Seed of the halves.

    Example:
        >>> from w2w_space.layout import Layout
        >>> from w2w_space.population import Population, Stacked
        >>> layout, g = Layout.of({"to_q": (6, 6)}, rank=1), torch.Generator().manual_seed(0)
        >>> matrix, names = torch.randn(200, 12, generator=g), tuple(map(str, range(200)))
        >>> from w2w_space.space import WeightSpace
        >>> space = WeightSpace.build(Population(layout, names, Stacked(matrix)), gauge="raw")
        >>> values = {"tall": matrix[:, 0].tolist(), "wide": (matrix[:, 0] + matrix[:, 1]).tolist()}
        >>> held_out_leaks(space, Labels.of(names, values), estimator="mean").round(decimals=1).tolist()
        [[1.0, 0.7], [0.7, 1.0]]
    """
    z, sigma = space.members.double(), space.variances.sqrt()
    generator = torch.Generator().manual_seed(seed)
    effects = torch.zeros(len(labels.attributes), len(labels.attributes), dtype=torch.float64)
    for _ in range(splits):
        order = torch.randperm(len(z), generator=generator)
        for half in order.tensor_split(2):
            mine = torch.zeros(len(z), dtype=torch.bool)
            mine[half] = True
            found, read = (
                replace(labels, values=labels.values.masked_fill(out[:, None], torch.nan)) for out in (~mine, mine)
            )
            if any(len(c[c.isfinite()].unique()) < 2 for part in (found, read) for c in part.values.T):
                continue  # a half in which all members have one label says nothing of it
            vectors = _estimated(z, sigma, found, estimator, ridge)
            effects += vectors / vectors.norm(dim=1, keepdim=True) @ _readouts(z, read).T
    return effects / effects.diagonal().abs().clamp(min=1e-300)[None]


def _estimated(z: Tensor, sigma: Tensor, labels: Labels, estimator: Estimator, ridge: float) -> Float64[Tensor, "k m"]:
    """Returns the vector of each attribute in z."""
    if estimator == "conditional":
        known = labels.known(range(len(labels.attributes)))
        y, x = _centered(labels.values[known]), _centered(z[known])
        return torch.linalg.lstsq(y, x).solution
    found = []
    for place in range(len(labels.attributes)):
        known = labels.known([place])
        y, x = _centered(labels.values[known, place]), _centered(z[known])
        if estimator == "mean":
            found.append(x.T @ y / y.square().sum())
        elif estimator == "logistic":
            if not labels.binary(place):
                raise UserError(
                    f"{labels.attributes[place]!r} is no yes or no; take another `estimator` than 'logistic'"
                )
            model = LogisticRegression(max_iter=1000).fit(x.numpy(), (y > 0).numpy())
            found.append(torch.from_numpy(model.coef_[0]).double())
        else:
            beta = x * sigma
            penalty = ridge if estimator == "ridge" else 0.0
            inner = beta.T @ beta + penalty * torch.eye(len(sigma), dtype=torch.float64)
            # Where there are as many components as members the equations have many solutions: the shortest, as the
            # published code's pseudo-inverse.
            found.append(torch.linalg.pinv(inner, hermitian=True) @ (beta.T @ y) / sigma)
    return torch.stack(found)


def _axes(vectors: Float64[Tensor, "k m"], sigma: Tensor, estimator: Estimator) -> Float64[Tensor, "k m"]:
    """Returns the weights of z that project onto the unit vectors, in the metric that the estimator works in."""
    if estimator not in ("normal", "ridge"):
        return vectors / vectors.norm(dim=1, keepdim=True)
    normals = vectors * sigma
    return normals / normals.norm(dim=1, keepdim=True) * sigma


def _readouts(z: Tensor, labels: Labels) -> Float64[Tensor, "k m"]:
    """Returns the readout of each attribute: the covariance with z, since the members' coordinates are white."""
    found = []
    for place in range(len(labels.attributes)):
        known = labels.known([place])
        found.append(_centered(z[known]).T @ _centered(labels.values[known, place]) / (int(known.sum()) - 1))
    return torch.stack(found)


def _held_out(
    z: Tensor, sigma: Tensor, labels: Labels, estimator: Estimator, ridge: float, folds: int
) -> Float64[Tensor, "n k"]:
    """Returns the place of each member along directions that were found without it."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    places = torch.full_like(labels.values, torch.nan)
    for fold in range(folds):
        out = torch.zeros(len(z), dtype=torch.bool)
        out[order[fold::folds]] = True
        kept = replace(labels, values=labels.values.masked_fill(out[:, None], torch.nan))
        if any(len(column[column.isfinite()].unique()) < 2 for column in kept.values.T):
            continue
        vectors = _estimated(z, sigma, kept, estimator, ridge)
        places[out] = z[out] @ _axes(vectors, sigma, estimator).T
    return places


def _merit(places: Tensor, values: Tensor, *, binary: bool) -> float:
    seen = places.isfinite()
    places, values = places[seen], values[seen]
    if len(values.unique()) < 2:
        return float("nan")
    if binary:
        return float(roc_auc_score((values == values.max()).numpy(), places.numpy()))
    return float(torch.corrcoef(torch.stack([places, values]))[0, 1])


def _require_different(labels: Labels) -> None:
    """Raises an error where an attribute follows from others, so that none can be held while it changes."""
    known = labels.known(range(len(labels.attributes)))
    if int(known.sum()) <= len(labels.attributes):
        raise UserError(
            f"{int(known.sum())} members have all {len(labels.attributes)} labels; so many attributes need more members"
        )
    y = _centered(labels.values[known])
    y = y / y.norm(dim=0, keepdim=True).clamp(min=1e-300)
    factors: Any = qr(y.numpy(), mode="economic", pivoting=True)
    _, triangle, order = factors
    small = np.abs(np.diag(triangle)) < _ALIASED
    if small.any():
        aliased: Sequence[str] = [labels.attributes[place] for place in order[small]]
        raise UserError(f"{', '.join(map(repr, aliased))} follow from the other attributes; leave them out")


def _centered(values: Tensor) -> Tensor:
    return values - values.mean(0)
