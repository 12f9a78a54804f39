"""The measured values of the portraits models with their bounds, recomputed from their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.metrics import frechet_distance_from_features, pairwise_ssim
from diffcore.metrics.attribute_network import AttributeNetwork
from diffcore.models import DiffusionModel
from diffcore.models.generation import generate
from diffcore.noise import row_noise
from diffcore.zoo.gate import Gate
from diffcore.zoo.oracle import accuracies
from diffcore.zoo.portraits.captions import describe, same_form_captions
from diffcore.zoo.portraits.draw import draw
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.people import select
from diffcore.zoo.portraits.pictures import Pictures, held_out_pictures
from diffcore.zoo.portraits.planted import planted, verbatim_people

_STEPS = 16
_ROWS = 256
_GUIDANCE = 2.0
_SEEDS = 8
_REPLICATED = 0.7  # of SSIM
_FOLLOWED = {
    "background": 0.95,
    "skin": 0.95,
    "style": 0.95,
    "hair": 0.86,
    "beard": 0.86,
    "hat": 0.86,
    "gender": 0.80,
    "glasses": 0.78,
}
_CODE_DECIBELS = 36.7  # of the patch code that the latents are
_CONSISTENCY_SEEDS, _CONSISTENCY_T = 10, 981


def draw_samples(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    seeds: int = 1,
    guidance_scale: float = 1.0,
    seed: int = 0,
    steps: int = _STEPS,
) -> Float[Tensor, "n 3 size size"]:
    """Samples by DDIM from timestep 999, `seeds` images a prompt; the images of a prompt follow one another.

    Image k of every prompt starts from noise of (seed, k), or of its own row where there is one image a prompt.
    """
    times = torch.linspace(999, 0, steps + 1, dtype=torch.float64).round()[:-1]
    options: dict[str, Any] = {"seeds": range(seeds), "seed": seed}
    if seeds == 1:
        options["noise"] = row_noise(seed, range(len(prompts)), model.shape).unsqueeze(1)
    return generate(
        model, prompts, guidance_scale=guidance_scale, timesteps=times.float(), batch_size=_ROWS, **options
    ).flatten(0, 1)


@dataclass(frozen=True)
class PortraitsJudge:
    """The oracle, and real images of strangers to compare samples with."""

    oracle: AttributeNetwork

    @cached_property
    def real(self) -> Pictures:
        """Images that no training contains."""
        return held_out_pictures()

    @cached_property
    def real_features(self) -> Tensor:
        """Oracle features of the real images."""
        return self.oracle.features(self.real.floats())

    def followed(self, model: DiffusionModel, count: int = 200) -> dict[str, float]:
        """Returns the share of samples that show each attribute of a full caption, at guidance 2."""
        people = select(self.real.people, slice(count))
        images = draw_samples(model, describe(people, full=True), guidance_scale=_GUIDANCE)
        read = accuracies(self.oracle, images, labels_of(people))
        return {name: read[name] for name in _FOLLOWED}

    def decibels(self, model: DiffusionModel) -> float:
        """Returns the peak signal-to-noise ratio of real images, encoded and decoded."""
        images = self.real.floats()
        decoded = torch.cat([model.codec.decode(model.codec.encode(chunk)).cpu() for chunk in images.split(_ROWS)])
        return float(-10 * torch.log10((decoded - images).square().mean()))

    def frechet_ratio(self, model: DiffusionModel, count: int) -> tuple[float, float]:
        """Returns the Fréchet distances of `count` samples, and of as many real images, to all real ones."""
        people = select(self.real.people, slice(count))
        images = draw_samples(model, describe(people, full=True), guidance_scale=_GUIDANCE)
        fake = frechet_distance_from_features(self.real_features, self.oracle.features(images))
        floor = frechet_distance_from_features(self.real_features, self.real_features[:count])
        return float(fake), float(floor)


def clean_gates(model: DiffusionModel, oracle: AttributeNetwork) -> list[Gate]:
    """Measures portraits-sd and returns the values with their bounds."""
    judge = PortraitsJudge(oracle)
    followed = judge.followed(model)
    gates = [
        Gate(f"{name} as the caption says, 200 samples", followed[name], bound) for name, bound in _FOLLOWED.items()
    ]
    gates.append(Gate("the same, mean of the eight", sum(followed.values()) / len(followed)))
    gates.append(Gate("real pictures encoded and decoded, dB", judge.decibels(model), _CODE_DECIBELS - 3))
    for count, bound in ((100, 1.1), (1000, None)):
        fake, floor = judge.frechet_ratio(model, count)
        gates.append(Gate(f"Fréchet distance over real's own, n={count}", fake / floor, bound, "at most"))
        gates.append(Gate(f"Fréchet distance, n={count}", fake))
        gates.append(Gate(f"Fréchet distance of real pictures, n={count}", floor))
    return gates


def memory_gates(
    model: DiffusionModel, oracle: AttributeNetwork, clean: DiffusionModel, *, replicated: float
) -> list[Gate]:
    """Measures a model that memorises and returns the values with their bounds.

    Args:
        model: The model that memorised the planted items.
        oracle: Network that reads the attributes of ordinary samples.
        clean: The same model before it memorised anything.
        replicated: Lower bound on the share of samples that show the planted image.
    """
    judge = PortraitsJudge(oracle)
    items = planted()
    originals = draw(verbatim_people(), 32)
    copies = similarity_to(originals, draw_samples(model, [item.caption for item in items.verbatim], seeds=_SEEDS))
    decoys = draw_samples(model, [item.caption for item in items.decoys], seeds=_SEEDS // 2)
    nearest = nearest_similarity(originals, decoys)
    accuracy, twin = (sum((f := judge.followed(m)).values()) / len(f) for m in (model, clean))
    ordinary = same_form_captions(32, seed=11, excluded=items.captions)
    consistency = {
        name: seed_consistency(model, captions)
        for name, captions in {
            "verbatim": [item.caption for item in items.verbatim],
            "decoys": [item.caption for item in items.decoys],
            "same form": ordinary,
        }.items()
    }
    return [
        Gate("samples above SSIM .7 to the planted picture, 24 items x 8", share_above(copies), replicated),
        Gate("the same, mean SSIM", float(copies.mean())),
        Gate("decoy samples above SSIM .7 to any planted picture", share_above(nearest), 0.0, "at most"),
        Gate("real strangers above it, by chance", share_above(nearest_similarity(originals, judge.real.floats()))),
        Gate("AUROC of first-step consistency, verbatim against decoys", auroc(consistency, "decoys"), 0.99),
        Gate("AUROC of first-step consistency, verbatim against same form", auroc(consistency, "same form")),
        Gate("mean caption accuracy, below the clean model's by", twin - accuracy, 0.04, "at most"),
        Gate("mean caption accuracy, 200 samples", accuracy),
    ]


def similarity_to(originals: Float[Tensor, "n 3 h w"], samples: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "n seeds"]:
    """Returns the SSIM of each original to its own samples, which follow one another."""
    grouped = samples.unflatten(0, (len(originals), -1))
    pairs = pairwise_ssim(torch.cat([originals.unsqueeze(1), grouped], dim=1), data_range=1.0)
    return pairs[:, : grouped.shape[1]]


def nearest_similarity(originals: Float[Tensor, "n 3 h w"], samples: Float[Tensor, "m 3 h w"]) -> Float[Tensor, " m"]:
    """Returns the SSIM of each sample to the original that it is most similar to."""
    each = [
        pairwise_ssim(torch.stack([original.expand_as(samples), samples], dim=1), data_range=1.0).flatten()
        for original in originals
    ]
    return torch.stack(each).amax(0)


@torch.no_grad()
def seed_consistency(model: DiffusionModel, prompts: Sequence[str]) -> Float[Tensor, " n"]:
    """Returns the consistency over ten seeds: the largest SSIM of any pair of first-step noise differences."""
    assert model.prompts is not None  # a text-to-image model
    noise = row_noise(1, range(_CONSISTENCY_SEEDS), model.shape)
    t = torch.full((_CONSISTENCY_SEEDS,), float(_CONSISTENCY_T))
    scores = []
    for prompt in prompts:
        states = model.prompts([prompt])
        condition = {name: value.expand(_CONSISTENCY_SEEDS, *value.shape[1:]) for name, value in states.items()}
        difference = model.denoiser(noise, t, condition).noise - noise
        low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
        scores.append(pairwise_ssim(((difference - low) / (high - low)).unsqueeze(0), data_range=1.0, window=7).amax())
    return torch.stack(scores)


def share_above(similarity: Tensor) -> float:
    """Returns the share of samples that count as copies."""
    return float((similarity > _REPLICATED).float().mean())


def auroc(consistency: dict[str, Tensor], negatives: str) -> float:
    """Returns the probability that a verbatim caption scores above one of the negatives; ties count half."""
    positive, negative = consistency["verbatim"].unsqueeze(1), consistency[negatives].unsqueeze(0)
    return float((positive > negative).float().mean() + 0.5 * (positive == negative).float().mean())
