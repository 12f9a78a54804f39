"""Candidate sets: the neurons that stand out for a prompt, more of them in each round (algorithms 2 and 3).

References:
    Hintersdorf, Struppek et al. 2024, section 3.2; |z| as in the text, not z as in algorithm 2.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from diffcore.denoiser import Condition
from nemo_localize.activations import mean_activations
from nemo_localize.first_step import FirstStep
from nemo_localize.settings import SearchSettings
from nemo_localize.sites import ValueSites
from nemo_localize.statistics import Statistics

Neurons = frozenset[int]
"""Neurons by their number, counted through all searched layers."""


@dataclass(frozen=True)
class Candidates:
    """The candidate sets of one prompt, all known before any pass through the U-Net (algorithm 2).

    Attributes:
        rounds: Thresholds (theta, k) of each round.
        sets: Neurons of each round: those with |z| > theta, and the k most active of each layer. Each set contains the
            one before.
        activation: Mean absolute activation of each neuron for the prompt.
        magnitude: Distance |z| of each neuron from its usual activation.
        sites: Value layers that are searched.
    """

    rounds: tuple[tuple[float, int], ...]
    sets: tuple[Neurons, ...]
    activation: Float64[Tensor, " neurons"]
    magnitude: Float64[Tensor, " neurons"]
    sites: ValueSites

    def layers(self, index: int, *, twice: bool = False) -> list[list[int]]:
        """Returns a round's layers, shallowest first, each with its neurons in the order in which they are tested.

        Outliers that are not among the k most active come first, ascending; then those, by falling activation.

        Args:
            index: Number of the round, from 0.
            twice: List outliers that are among the k most active in both places, as the published code does.
        """
        theta, k = self.rounds[index]
        layers = []
        for span in self.sites.spans:
            top = [span[place] for place in _by_activation(self.activation[span.start : span.stop])[:k]]
            outliers = [number for number in span if float(self.magnitude[number]) > theta]
            layers.append([number for number in outliers if twice or number not in top] + top)
        return layers


def candidates_of(step: FirstStep, cond: Condition, statistics: Statistics, search: SearchSettings) -> list[Candidates]:
    """Returns the candidate sets of each prompt of a condition (algorithms 2 and 3)."""
    activations = mean_activations(step.model.backbone, step.sites, cond["encoder_hidden_states"])
    rounds = tuple(search.rounds(max(step.sites.widths)))
    return [
        _candidates(z, activation, step.sites, rounds)
        for z, activation in zip(statistics.z_scores(activations), activations, strict=True)
    ]


def _candidates(z: Tensor, activation: Tensor, sites: ValueSites, rounds: tuple[tuple[float, int], ...]) -> Candidates:
    rank = torch.empty(sites.num_neurons, dtype=torch.long)
    for span in sites.spans:
        order = _by_activation(activation[span.start : span.stop])
        rank[torch.tensor(order, dtype=torch.long) + span.start] = torch.arange(len(span))
    magnitude = z.abs()
    sets = [frozenset(((magnitude > theta) | (rank < k)).nonzero().flatten().tolist()) for theta, k in rounds]
    return Candidates(rounds, tuple(sets), activation, magnitude, sites)


def _by_activation(activation: Tensor) -> list[int]:
    return torch.sort(activation, descending=True, stable=True).indices.tolist()
