"""Normalising features per channel with the statistics of a data set, and the massive channels of transformers.

In diffusion transformers a few fixed channels are so large at every place that they decide every cosine. They show in
`ChannelStatistics.massive`, the largest mean magnitude of a channel over the median one: it is near 1 in most U-Nets,
and above 20 the channels concerned are worth dropping.

References:
    Massive channels and the modulated tensor as cure: Gan et al. 2025, "DiTF" (arXiv 2505.18584). The rule which
    channels to drop, a magnitude above 20 times the median, is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffcore.errors import UserError
from diffcore.stats import RunningMoments

Normalisation = Literal["none", "center", "zscore", "l2", "drop-massive", "adaln"]
"""Rule by which features are normalised; see `normalise`."""

MASSIVE = 20.0
"""Mean magnitude of a channel, over the median channel's, above which it counts as massive."""

_SMALL = 1e-12


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Moments of each channel of one activation over all places of all images of a data set.

    Attributes:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        magnitude: Mean of each channel's absolute value.
        num_places: Number of places that were seen.
    """

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]
    magnitude: Float[Tensor, " c"]
    num_places: int

    @property
    def rms(self) -> float:
        """Root mean square over all channels, by which activations are divided to be comparable."""
        return float((self.mean.square() + self.std.square()).mean().sqrt())

    @property
    def massive(self) -> float:
        """The largest mean magnitude of a channel over the median one; 1 where all channels are equally large."""
        median = float(self.magnitude.median())
        largest = float(self.magnitude.max())
        return largest / median if median > 0 else float("inf") if largest > 0 else 1.0

    @property
    def moderate(self) -> Bool[Tensor, " c"]:
        """Which channels are not massive; all of them where the median channel is always 0."""
        limit = MASSIVE * self.magnitude.median()
        return (self.magnitude <= limit) | (limit == 0)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the statistics as tensors by name, for storing."""
        return {
            "mean": self.mean,
            "std": self.std,
            "magnitude": self.magnitude,
            "num_places": torch.tensor(self.num_places),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "ChannelStatistics":
        """Returns the statistics that `tensors` gave."""
        return cls(tensors["mean"], tensors["std"], tensors["magnitude"], int(tensors["num_places"]))


class ChannelMeter:
    """Measures the statistics of one activation's channels in one pass, in float64.

    Args:
        channels: Number of channels of the activation.
        device: Device that the sums are kept on.

    Example:
        >>> meter = ChannelMeter(2)
        >>> meter.add(torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]]))
        >>> meter.statistics.mean.tolist(), meter.statistics.num_places
        ([2.0, 0.0], 2)
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._signed = RunningMoments(channels).to(device)
        self._magnitude = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "b c h w"]) -> None:
        """Adds the maps of some images."""
        rows = features.detach().movedim(1, -1).flatten(0, -2)
        self._signed.update(rows)
        self._magnitude += rows.abs().sum(0, dtype=torch.float64)

    @property
    def statistics(self) -> ChannelStatistics:
        """The statistics of everything that was added.

        Raises:
            ValueError: Nothing was added.
        """
        count, mean, variance = self._signed.compute()
        if not count:
            raise ValueError("no features were added; statistics need at least one image")
        spread = variance * ((count - 1) / count) if count > 1 else torch.zeros_like(mean)
        return ChannelStatistics(
            mean.float(), spread.sqrt().float(), (self._magnitude / count).float(), int(count.item())
        )


def normalise(
    features: Float[Tensor, "b c h w"],
    how: Normalisation,
    statistics: ChannelStatistics | None = None,
) -> Float[Tensor, "b kept h w"]:
    """Returns features of one activation, normalised.

    Args:
        features: Maps of one activation.
        how: "center" subtracts each channel's mean; "zscore" divides by its standard deviation as well, constant
            channels becoming 0; "l2" gives each place length 1; "drop-massive" drops massive channels, then does the
            same. "adaln" is "drop-massive" on tensors after adaptive layer norm ("norm-out"). "none" changes nothing.
        statistics: Statistics over a data set, needed for all but "none" and "l2".

    Returns:
        The features in float32. Places that are 0 in all channels stay 0.

    Raises:
        UserError: The rule needs statistics, and there are none.
        ValueError: The statistics are those of another number of channels.

    Example:
        >>> normalise(torch.tensor([[[[3.0]], [[4.0]]]]), "l2").flatten().tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    if how == "none":
        return features
    features = features.float()
    if how == "l2":
        return _unit(features)
    if statistics is None:
        raise UserError(
            f"`normalise` is {how!r}, which needs statistics over a data set; measure them first, or use l2"
        )
    if len(statistics.mean) != features.shape[1]:
        raise ValueError(f"the statistics have {len(statistics.mean)} channels, the features {features.shape[1]}")
    if how in ("drop-massive", "adaln"):
        return _unit(features[:, statistics.moderate.to(features.device)])
    mean, std = (value.to(features)[:, None, None] for value in (statistics.mean, statistics.std))
    centred = features - mean
    return centred if how == "center" else torch.where(std > 0, centred / std.clamp(min=_SMALL), 0.0)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True).clamp(min=_SMALL)
