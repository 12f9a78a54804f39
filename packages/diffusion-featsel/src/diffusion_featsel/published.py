"""The paper's tables of single activations, and how well other scores agree with them.

Each activation was scored alone, by the mean IoU (in percent) of a pixel classifier trained on few labels: on Horse-21
("simple" scenes) and on Bedroom-28 ("complex" scenes), at timestep 50.

References:
    Meng et al. 2024, tables 4 and 5 (SDXL and Playground v2) and 6 (Stable Diffusion 1.5).
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from scipy.stats import spearmanr

from diffcore.errors import UserError

PublishedModel = Literal["sd15", "sdxl", "pgv2"]

DOUBTFUL: Mapping[PublishedModel, tuple[str, ...]] = {
    "sdxl": ("up-level0-repeat0-vit-block3-out", "up-level0-repeat0-vit-block7-out")
}
"""Rows of table 4 that carry the same pair of numbers, 58.95 and 44.83: one of them may be a slip in copying."""


@dataclass(frozen=True)
class Published:
    """The paper's scores of one activation, in percent.

    Attributes:
        name: The paper's name of the activation.
        simple: Mean IoU on Horse-21.
        complex: Mean IoU on Bedroom-28.
    """

    name: str
    simple: float
    complex: float


@dataclass(frozen=True)
class Agreement:
    """How well scores agree with the paper's.

    Attributes:
        model: Model of the paper that was compared with.
        n: Number of activations that both have scored.
        simple: Spearman's rank correlation with the paper's scores on simple scenes.
        complex: The same on complex scenes.
        regret_simple: By how many points of mean IoU the best activation by these scores is below the paper's best of
            those compared, on simple scenes.
        regret_complex: The same on complex scenes.
        best: Name of the best activation by these scores.
        missing: Names in the paper's tables without a finite score.
        doubtful: Names among those compared whose published numbers may be a slip.
    """

    model: PublishedModel
    n: int
    simple: float
    complex: float
    regret_simple: float
    regret_complex: float
    best: str
    missing: tuple[str, ...]
    doubtful: tuple[str, ...]


def published(model: PublishedModel) -> tuple[Published, ...]:
    """Returns the paper's scores of every activation of a model that it reports.

    Args:
        model: Model of the paper: "sd15", "sdxl", or "pgv2" (Playground v2).

    Example:
        >>> best = max(published("sdxl"), key=lambda row: row.complex)
        >>> best.name, best.complex
        ('up-level0-repeat0-vit-block5-out', 45.26)
    """
    return tuple(row for name, row in _rows() if name == model)


def against_paper(scores: Mapping[str, float], model: PublishedModel) -> Agreement:
    """Compares scores of activations with the paper's: rank correlation, and what the choice of the best one loses.

    Args:
        scores: Score of each activation by the paper's name, higher for better; names that the paper does not report,
            and scores that are not finite, are left out.
        model: Model of the paper that the scores belong to.

    Raises:
        UserError: Fewer than three of the names are in the paper's tables, or they have fewer different scores.

    Example:
        >>> scores = {row.name: row.simple for row in published("sd15")}
        >>> found = against_paper(scores, "sd15")
        >>> found.n, round(found.simple, 3), round(found.complex, 3), found.regret_complex
        (33, 1.0, 0.689, 2.98)
    """
    table = published(model)
    rows = [row for row in table if math.isfinite(scores.get(row.name, math.nan))]
    ours = [scores[row.name] for row in rows]
    if len(set(ours)) < 3:
        raise UserError(
            f"`scores` has {len(rows)} of the {len(table)} activations in the paper's tables of {model}, with "
            f"{len(set(ours))} different values; score at least three of them, by their names there"
        )
    best = rows[max(range(len(rows)), key=lambda place: ours[place])]
    simple, complex_ = ([getattr(row, scene) for row in rows] for scene in ("simple", "complex"))
    return Agreement(
        model=model,
        n=len(rows),
        simple=_rank_correlation(ours, simple),
        complex=_rank_correlation(ours, complex_),
        regret_simple=round(max(simple) - best.simple, 2),
        regret_complex=round(max(complex_) - best.complex, 2),
        best=best.name,
        missing=tuple(row.name for row in table if row not in rows),
        doubtful=tuple(row.name for row in rows if row.name in DOUBTFUL.get(model, ())),
    )


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    result: Any = spearmanr(a, b)
    return float(result.statistic)


@cache
def _rows() -> tuple[tuple[str, Published], ...]:
    text = files("diffusion_featsel").joinpath("data", "paper_tables.csv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple((row["model"], Published(row["name"], float(row["simple"]), float(row["complex"]))) for row in rows)
