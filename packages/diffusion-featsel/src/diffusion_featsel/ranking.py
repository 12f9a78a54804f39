"""The result of measuring all activations of a model: their numbers, and their order under each score."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.activation import Activation
from diffusion_featsel.alignment import Alignment

Score = Literal["self_match", "fisher_rank", "fisher", "information", "effective_rank"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class Scored:
    """The measurements of one activation; None where one was not made, or says nothing about this activation.

    Attributes:
        activation: The activation that was measured.
        rms: Root mean square of its values.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        massive: Largest mean magnitude of a channel divided by the median; above 20 a few channels rule the cosine.
        reliability: Share of content in content and noise, from 0 to 1.
        snr_db: Content over noise, in decibels.
        position_share: Share of the template that all images have in common, from 0 to 1.
        noise_leak: Share of the injected noise that a linear map reads out, from 0 to 1.
        position_r2: Share of the position that a linear map reads out, beyond what it reads out of the image itself.
        granularity: Mean radial frequency of content, in cycles per image.
        over_refinement: Mean radial frequency of a single draw divided by `granularity`.
        high_frequency: Share of power above a quarter cycle per cell.
        locality: Cosine of neighboring cells beyond that of distant cells.
        t_dependence: One minus the CKA with the same activation at another timestep.
        fisher: The content's Fisher score (S1).
        information: The content's information in nats (S1b).
        effective_rank: Number of dimensions that the content fills (S2).
        self_match: Share of points found again in a moved copy of the image (S3), from 0 to 1.
    """

    activation: Activation
    rms: float
    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]
    massive: float
    reliability: float | None = None
    snr_db: float | None = None
    position_share: float | None = None
    noise_leak: float | None = None
    position_r2: float | None = None
    granularity: float | None = None
    over_refinement: float | None = None
    high_frequency: float | None = None
    locality: float | None = None
    t_dependence: float | None = None
    fisher: float | None = None
    information: float | None = None
    effective_rank: float | None = None
    self_match: float | None = None

    @property
    def name(self) -> str:
        """The activation's name."""
        return self.activation.name

    @property
    def fisher_rank(self) -> float | None:
        """Logarithms of Fisher score and effective rank, added (S1 with S2)."""
        if self.fisher is None or self.effective_rank is None:
            return None
        return math.log(max(self.fisher, 1e-12)) + math.log(max(self.effective_rank, 1e-12))

    def numbers(self) -> dict[str, float | None]:
        """Returns all measurements that are single numbers, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: value for key, value in values.items() if key not in ("activation", "mean", "std")}


@dataclass(frozen=True, eq=False)
class Ranking:
    """All activations of a model with their measurements, in order of execution.

    Attributes:
        rows: One entry per activation.
        t: Timestep of the noise.
        num_images: Number of images that were seen.
        similarity: Linear CKA of each pair of activations, in the order of the rows; None where it was not measured.
        broken: Reason by name of activation for those that could not be measured.
    """

    rows: tuple[Scored, ...]
    t: float
    num_images: int
    similarity: Float[Tensor, "a a"] | None = None
    broken: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Scored:
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            raise KeyError(f"no activation is called '{name}'; names are: {', '.join(row.name for row in self.rows)}")
        return found

    @property
    def default(self) -> Score:
        """The first score, in the order of `SCORES`, that was measured."""
        for score in SCORES:
            if any(getattr(row, score) is not None for row in self.rows):
                return score
        return "fisher"

    @property
    def alignment(self) -> Alignment | None:
        """The similarities with the names of their rows; None where they were not measured."""
        return None if self.similarity is None else Alignment(tuple(row.name for row in self.rows), self.similarity)

    def scores(self, score: Score = "self_match") -> dict[str, float]:
        """Returns one score by name, best first; activations without it are left out.

        Args:
            score: Name of the score; equal values are put in the order of Fisher score and effective rank.
        """
        rows = [row for row in self.rows if getattr(row, score) is not None]
        rows.sort(key=lambda row: (getattr(row, score), row.fisher_rank or -math.inf), reverse=True)
        return {row.name: float(getattr(row, score)) for row in rows}

    def to_rows(self) -> list[dict[str, Any]]:
        """Returns plain values, one dictionary per activation, with its place in the default ranking."""
        place = {name: index + 1 for index, name in enumerate(self.scores(self.default))}
        return [
            {"rank": place.get(row.name), **row.activation.to_json(), **row.numbers(), "fisher_rank": row.fisher_rank}
            for row in self.rows
        ]
