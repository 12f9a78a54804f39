"""Which neurons stand out for a caption: nested sets, one per round, all known before the U-Net is first called.

References:
    Hintersdorf, Struppek et al. 2024, section 3.2 and algorithms 2 and 3; |z| as in the text, not z as in algorithm 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from nemo_localize.sites import ValueSites


@dataclass(frozen=True)
class Candidates:
    """The candidate sets of one caption, as numbers of neurons.

    Attributes:
        rounds: (theta, k) of each round.
        sets: Its neurons; each set contains the one before.
        activation: Mean absolute activations of the caption.
        magnitude: Its |z|.
        sites: The layers.
    """

    rounds: tuple[tuple[float, int], ...]
    sets: tuple[frozenset[int], ...]
    activation: Float64[Tensor, " neurons"]
    magnitude: Float64[Tensor, " neurons"]
    sites: ValueSites

    def order(self, index: int, *, twice: bool = False) -> list[list[int]]:
        """Returns the layers of a round, deepest first, each with its neurons in the order in which they are tested.

        Outliers that are not among the k most active come first, ascending; then those, by falling activation.

        Args:
            index: Of the round.
            twice: List the outliers that are among the k most active in both places, as the published code does.
        """
        theta, k = self.rounds[index]
        layers = []
        for span in reversed(self.sites.spans):
            top = [span[place] for place in _by_activation(self.activation[span.start : span.stop])[:k]]
            outliers = [number for number in span if float(self.magnitude[number]) > theta]
            layers.append([number for number in outliers if twice or number not in top] + top)
        return layers


def candidate_sets(
    z: Float64[Tensor, " neurons"],
    activation: Float64[Tensor, " neurons"],
    sites: ValueSites,
    rounds: Sequence[tuple[float, int]],
) -> Candidates:
    """Returns, for each round, the neurons with |z| > theta and the k most active of each layer.

    Args:
        z: Of one caption.
        activation: Its mean absolute activations.
        sites: The layers.
        rounds: (theta, k), with theta falling and k rising; k beyond a layer's width takes all of it.
    """
    rank = torch.empty(sites.num_neurons, dtype=torch.long)
    for span in sites.spans:
        order = _by_activation(activation[span.start : span.stop])
        rank[torch.tensor(order, dtype=torch.long) + span.start] = torch.arange(len(span))
    magnitude = z.abs()
    sets = [frozenset(((magnitude > theta) | (rank < k)).nonzero().flatten().tolist()) for theta, k in rounds]
    return Candidates(tuple(rounds), tuple(sets), activation, magnitude, sites)


def _by_activation(activation: Tensor) -> list[int]:
    return torch.sort(activation, descending=True, stable=True).indices.tolist()
