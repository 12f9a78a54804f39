"""How active each value neuron usually is: mu_i and sd_i over ordinary prompts, and z_i = (a_i - mu_i) / sd_i.

The choice of ordinary prompts matters more than any threshold: against plain prompts alone, every prompt in the style
of the memorised ones stands out. So statistics of several lists can be merged, prompts of that style among them, and
prompts that differ from the ordinary ones in length or vocabulary are reported.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffcore.errors import IncompatibleModelError
from diffcore.models import DiffusionModel
from diffcore.models.prompts import Tokens
from diffcore.stats import RunningMoments, require_finite
from nemo_localize.activations import mean_activations, prompt_encoder, text_fingerprint
from nemo_localize.sites import ValueSites, value_sites

_LONGER = 1.5  # ratio of mean lengths, in either direction, above which prompts differ
_UNKNOWN = 0.3  # share of distinct tokens that no ordinary prompt has, above which prompts differ


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and variance of every neuron's activation over ordinary prompts; two statistics of one model merge exactly.

    Attributes:
        num_prompts: Number of prompts behind them.
        mean: Mean over prompts of each neuron's mean absolute activation.
        var: Variance over prompts, divided by num_prompts - 1; NaN below two prompts.
        fingerprint: Digest of the text encoders and value matrices.
        sources: Names of the lists of prompts, each with its number of prompts.
        mean_length: Mean number of tokens per prompt, without padding.
        vocabulary: Ids of the tokens seen; empty where the prompts are not known.
    """

    num_prompts: int
    mean: Float64[Tensor, " neurons"]
    var: Float64[Tensor, " neurons"]
    fingerprint: str
    sources: tuple[tuple[str, int], ...]
    mean_length: float
    vocabulary: frozenset[int]

    @property
    def dead(self) -> Bool[Tensor, " neurons"]:
        """Neurons that never vary, or that were seen for one prompt only: their z-score is 0."""
        return ~(self.var > 0)

    def z_scores(self, activations: Float64[Tensor, "prompts neurons"]) -> Float64[Tensor, "prompts neurons"]:
        """Returns z_i: by how many standard deviations each activation differs from its mean."""
        deviation = torch.where(self.dead, torch.inf, self.var.sqrt())
        return (activations - self.mean) / deviation

    def merge(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both sets of prompts together.

        Raises:
            IncompatibleModelError: The two are of different models.
        """
        if other.fingerprint != self.fingerprint:
            raise IncompatibleModelError("statistics of two models cannot be merged; collect them from one model")
        if not (self.num_prompts and other.num_prompts):
            full = self if self.num_prompts else other
            return replace(full, sources=self.sources + other.sources)
        n, m = self.num_prompts, other.num_prompts
        step = other.mean - self.mean
        known = bool(self.vocabulary and other.vocabulary)
        # Chan, Golub and LeVeque 1983, equation 1.5.
        squares = sum(_squares(part) for part in (self, other)) + step.square() * (n * m / (n + m))
        return Statistics(
            num_prompts=n + m,
            mean=self.mean + step * (m / (n + m)),
            var=squares / (n + m - 1),
            fingerprint=self.fingerprint,
            sources=self.sources + other.sources,
            mean_length=(n * self.mean_length + m * other.mean_length) / (n + m),
            vocabulary=self.vocabulary | other.vocabulary if known else frozenset(),
        )

    def require(self, model: DiffusionModel, sites: ValueSites) -> None:
        """Raises an error where the statistics are another model's.

        Raises:
            IncompatibleModelError: Text encoder, value matrices, layers or their precision differ.
        """
        if self.fingerprint != text_fingerprint(model, sites):
            raise IncompatibleModelError(
                f"these statistics are not of {model.name}: its text encoder, value matrices, searched layers or "
                "precision differ; collect the statistics of this model"
            )

    def differences(self, tokens: Tokens) -> list[str]:
        """Returns in words how prompts differ from the ordinary ones: z-scores may then show style, not memory."""
        if not self.vocabulary or not len(tokens):  # the prompts behind imported statistics are not known
            return []
        length, vocabulary = _profile(tokens)
        found = []
        ratio = length / max(self.mean_length, 1)
        if not 1 / _LONGER <= ratio <= _LONGER:
            found.append(f"the prompts have {length:.1f} tokens on average, the ordinary ones {self.mean_length:.1f}")
        unknown = len(vocabulary - self.vocabulary) / max(len(vocabulary), 1)
        if unknown > _UNKNOWN:
            found.append(f"{100 * unknown:.0f} % of the prompts' distinct tokens never occur in ordinary ones")
        return found


def collect_statistics(
    model: DiffusionModel, prompts: Iterable[str], *, source: str = "", up: bool = False, batch_size: int = 64
) -> Statistics:
    """Returns the statistics of ordinary prompts, which are read once and need not fit into memory together.

    Args:
        model: Model whose text encoder and value matrices are used; its U-Net is not called.
        prompts: Ordinary prompts, none of them memorised, in any number.
        source: Name of the list of prompts, for the record.
        up: Whether the value layers of the up blocks are included.
        batch_size: Number of prompts per pass through the text encoder.

    Raises:
        IncompatibleModelError: The model has no value layers or no text encoder.
        ValueError: An activation is NaN or infinite.

    Example:
        >>> from nemo_localize.planted import ordinary_captions, planted_model
        >>> collect_statistics(planted_model([], side=8).model, ordinary_captions(20)).num_prompts
        20
    """
    sites, encoder = value_sites(model.backbone, up=up), prompt_encoder(model)
    moments, lengths, vocabulary = RunningMoments(sites.num_neurons), 0.0, set[int]()
    moments.update(torch.empty(0, sites.num_neurons))  # an empty list of prompts is allowed
    remaining = iter(prompts)
    while batch := list(islice(remaining, batch_size)):
        tokens = encoder.tokenize(batch)
        rows = mean_activations(model.backbone, sites, encoder.encode(tokens)["encoder_hidden_states"])
        require_finite("activations", rows, first_row=int(moments.num_rows))
        moments.update(rows)
        length, seen = _profile(tokens)
        lengths += length * len(batch)
        vocabulary |= seen
    count, mean, var = moments.compute()
    num_prompts = int(count)
    return Statistics(
        num_prompts=num_prompts,
        mean=mean,
        var=var,
        fingerprint=text_fingerprint(model, sites),
        sources=((source, num_prompts),),
        mean_length=lengths / max(num_prompts, 1),
        vocabulary=frozenset(vocabulary),
    )


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Returns the statistics of all parts together, see `Statistics.merge`."""
    first, *others = parts
    for other in others:
        first = first.merge(other)
    return first


def _squares(part: Statistics) -> Tensor:
    return torch.nan_to_num(part.var) * (part.num_prompts - 1)


def _profile(tokens: Tokens) -> tuple[float, set[int]]:
    """Returns mean length and distinct tokens, as the first tokenizer sees them."""
    ids, mask = tokens.ids[0], tokens.masks[0].bool()
    return float(mask.sum(1).double().mean()), set(ids[mask].tolist())
