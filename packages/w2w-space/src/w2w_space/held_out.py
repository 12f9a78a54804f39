"""How much of a subject a space holds, by the model itself: the denoising gain that is kept after projection.

On new pictures of a subject, with fixed timesteps and noise, the denoising loss is measured of the base model, of the
mean of the population, of the subject's own adapter, and of its projection on the first m components:

    gain kept = (base - projected) / (base - own).

The norm of what a projection leaves out says little: most of it is noise of the training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.train.timesteps import default_time_sampler
from w2w_space.bank import bank
from w2w_space.instance import Deck, Instance, held_out_loss, instances_by_name
from w2w_space.space import WeightSpace


@dataclass(frozen=True, eq=False)
class Kept:
    """Denoising losses of subjects that a space was not fitted to, on pictures that their adapters did not see.

    Attributes:
        components: Numbers of components that were looked at.
        factors: Factors by which projections were lengthened, since those of new adapters come out too short.
        base: Loss of the base model for each subject.
        mean: Loss of the mean of the population.
        own: Loss of each subject's own adapter.
        projected: Loss of its projection, for each number of components and each factor.
    """

    components: tuple[int, ...]
    factors: tuple[float, ...]
    base: Float64[Tensor, " n"]
    mean: Float64[Tensor, " n"]
    own: Float64[Tensor, " n"]
    projected: Float64[Tensor, "components factors n"]

    @property
    def gain_kept(self) -> Float64[Tensor, "components factors"]:
        """Share of the adapters' gain over the base model that their projections keep, over all subjects."""
        return (self.base - self.projected).sum(2) / (self.base - self.own).sum()

    @property
    def gain(self) -> float:
        """Share of the base model's loss that the own adapters remove; 0 where that is less than two standard errors.

        What is kept of a gain that may be chance says nothing.
        """
        gains = self.base - self.own
        chance = 2 * float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return float(gains.sum() / self.base.sum()) if float(gains.mean()) > chance else 0.0

    @property
    def gain_of_mean(self) -> float:
        """Share of the gain that the mean of the population has already."""
        return float((self.base - self.mean).sum() / (self.base - self.own).sum())

    @property
    def chosen(self) -> tuple[int, float]:
        """Fewest components whose gain is within 1 % of the best, and their best factor."""
        best = self.gain_kept.amax(1)
        place = int((best >= best.max() - 0.01 * best.max().abs()).nonzero()[0, 0])
        return self.components[place], self.factors[int(self.gain_kept[place].argmax())]


def gain_kept(
    space: WeightSpace,
    model: DiffusionModel,
    vectors: Float[Tensor, "n size"],
    subjects: Sequence[Instance],
    *,
    components: Sequence[int] | None = None,
    factors: Sequence[float] = (1.0, 1.5, 2.0),
    num_pairs: int = 32,
    group_size: int = 16,
    seed: int = 0,
) -> Kept:
    """Returns what the projections of new adapters are worth on new pictures of their subjects.

    Args:
        space: Space that was fitted without these subjects.
        model: Base model of the adapters.
        vectors: Own adapter of each subject, as a vector in any gauge.
        subjects: New pictures of each subject, with their conditions.
        components: Numbers of components to look at; by default 1, 2, 5, 10 and so on.
        factors: Factors of the projected coordinates.
        num_pairs: Number of pairs of timestep and noise for each subject.
        group_size: Number of subjects in a forward pass.
        seed: Seed of timesteps and noise.

    Raises:
        UserError: A number of components is larger than the space's.
    """
    instances_by_name(subjects)
    if len(vectors) != len(subjects):
        raise ValueError(f"there are {len(vectors)} `vectors` for {len(subjects)} `subjects`; give one each")
    most = space.num_components
    looked = components or sorted({k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k < most} | {most})
    if not all(1 <= k <= most for k in looked):
        raise UserError(f"`components` are {list(looked)}; the space has {most}")
    denoiser = model.denoiser
    like = torch.empty((), device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
    sampler = default_time_sampler(denoiser.schedule)
    rows = list[Tensor]()
    z, gauged = space.coordinates(vectors), space.gauge(vectors)
    for start in range(0, len(subjects), group_size):
        group = slice(start, start + group_size)
        deck = Deck(subjects[group], sampler, seed=seed, antithetic=False, like=like)
        own, count = z[group], len(subjects[group])

        def measured(adapters: Tensor, deck: Deck = deck) -> Tensor:
            with bank(model.backbone, space.layout, adapters.to(like)):
                return held_out_loss(denoiser, deck, num_pairs=num_pairs, at_once=4).double().cpu()

        losses = [held_out_loss(denoiser, deck, num_pairs=num_pairs, at_once=4).double().cpu()]
        losses += [measured(space.mean.expand(count, -1)), measured(gauged[group])]
        for k in looked:
            cut = space.truncated(k)
            losses += [measured(cut.vectors(factor * own[:, :k])) for factor in factors]
        rows.append(torch.stack(losses))
    table = torch.cat(rows, 1)
    projected = table[3:].unflatten(0, (len(looked), len(factors)))
    return Kept(tuple(looked), tuple(factors), table[0], table[1], table[2], projected)
