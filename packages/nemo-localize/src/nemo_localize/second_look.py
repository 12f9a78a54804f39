"""The second look: images decide whether a prompt is memorised, where its first step leaves that open.

Prompts are generated from a few seeds, most consistent prompt first. Where two images agree, more are generated; the
likeness of all pairs of images, compared with that of ordinary prompts, then decides. All prompts above the threshold
are generated, its uncertainty included. The ranking by consistency depends less on the choice of ordinary prompts, so
further prompts follow in its order, for as much computation as the first steps of all prompts took.

References:
    Seeds that generate one image show what is memorised: Carlini et al., "Extracting Training Data from Diffusion
    Models", 2023, section 4.2; Somepalli et al., "Diffusion Art or Digital Forgery?", CVPR 2023.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.models import DiffusionModel
from nemo_localize.activations import prompt_encoder
from nemo_localize.images import generate_latents, images_of
from nemo_localize.likeness import Likeness
from nemo_localize.protocol import COPY_ABOVE
from nemo_localize.settings import ImageSettings

Verdict = Literal["memorised", "undecided", "clean"]

# Seeds of no other part of an audit; every prompt that is looked at is generated from the first four.
SEEDS = range(100_501, 100_511)
FIRST_SEEDS = SEEDS[:4]
STEPS = 5  # memorised images appear in few steps, and all images that are compared have as many
REFERENCES = 24
PATIENCE = 32  # consecutive clean prompts after which the remaining ones are not looked at
_BATCH = 16  # prompts per round
_ROBUST = 1.4826  # from a median absolute deviation to a standard deviation
_MEMORISED_DEVIATIONS, _UNDECIDED_DEVIATIONS = 3.0, 2.0


@dataclass(frozen=True)
class Look:
    """How similar the images of one prompt are.

    Attributes:
        prompt: Prompt that was looked at.
        pairs: Likeness of all pairs of its images.
        original: Likeness of each image to the nearest training image; empty where none is known.
        error: Why there are no images to compare.
    """

    prompt: str
    pairs: tuple[float, ...] = ()
    original: tuple[float, ...] = ()
    error: str | None = None

    @property
    def typical(self) -> float:
        """The median likeness of pairs, or to the training image if that is larger; NaN without images."""
        return self._reached(0.5)

    @property
    def upper(self) -> float:
        """The likeness that a tenth of them reaches."""
        return self._reached(0.9)

    @property
    def suspicious(self) -> bool:
        """Whether one pair of images, or an image and a training image, is alike enough for a copy."""
        return any(value > COPY_ABOVE for value in self.pairs + self.original)

    def to_json(self) -> dict[str, Any]:
        """Returns the look as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Look":
        """Returns the look that `to_json` wrote."""
        return cls(**{**row, "pairs": tuple(row["pairs"]), "original": tuple(row["original"])})

    def _reached(self, quantile: float) -> float:
        return max((_quantile(values, quantile) for values in (self.pairs, self.original) if values), default=math.nan)


@dataclass(frozen=True)
class Usual:
    """How similar the images of ordinary prompts are, and the thresholds that follow for others.

    Attributes:
        looks: Second looks at ordinary prompts.
        memorised_above: Typical likeness above which a prompt is memorised: median plus three robust standard
            deviations over ordinary prompts, and at least that of a copy.
        undecided_above: Upper likeness above which a prompt is not clean: the same rule with two standard deviations.
        telling: Whether images of an ordinary prompt differ; where they do not, images cannot show a memory.
    """

    looks: tuple[Look, ...]
    memorised_above: float
    undecided_above: float
    telling: bool

    @classmethod
    def of(cls, looks: Sequence[Look]) -> "Usual":
        """Returns the thresholds from looks at ordinary prompts; a few memorised ones hardly change these."""
        looks = [look for look in looks if look.error is None]
        if not looks:
            return cls((), COPY_ABOVE, COPY_ABOVE, telling=False)
        typical, spread = _middle([look.typical for look in looks])
        upper, upper_spread = _middle([look.upper for look in looks])
        return cls(
            tuple(looks),
            max(COPY_ABOVE, typical + _MEMORISED_DEVIATIONS * spread),
            max(COPY_ABOVE, upper + _UNDECIDED_DEVIATIONS * upper_spread),
            typical <= COPY_ABOVE,
        )

    def verdict(self, look: Look) -> Verdict:
        """Returns the verdict on a prompt from its images."""
        if look.error is not None:
            return "undecided"
        if not self.telling:
            return "undecided" if look.upper > COPY_ABOVE else "clean"
        if look.typical > self.memorised_above:
            return "memorised"
        return "undecided" if look.upper > self.undecided_above else "clean"


@dataclass(frozen=True)
class SecondLook:
    """The second look at the most consistent prompts.

    Attributes:
        usual: Likeness of images of ordinary prompts.
        looks: Looks at prompts, in the order in which they were made.
        rows: Number of latents through the network that it took.
    """

    usual: Usual
    looks: tuple[Look, ...]
    rows: int

    def verdicts(self) -> dict[str, Verdict]:
        """Returns the verdict on each prompt that was looked at."""
        return {look.prompt: self.usual.verdict(look) for look in self.looks}


def second_look(
    look: Callable[[Sequence[str], Sequence[int]], list[Look]],
    ranked: Sequence[str],
    references: Sequence[str],
    *,
    certain: int,
    rows_per_image: int,
    allowed_rows: int,
) -> SecondLook:
    """Looks at images of prompts, until the budget is spent and the last prompts looked at are clean.

    Args:
        look: Function that generates prompts from seeds and compares the images, see `looks`.
        ranked: Distinct prompts, most consistent first.
        references: Ordinary prompts, most consistent first.
        certain: Number of ranked prompts that are looked at whatever the cost: all that may be above the threshold.
        rows_per_image: Number of latents through the network for one image.
        allowed_rows: Budget, in latents through the network. Only the certain prompts, the first few, and those after a
            prompt that was not clean may exceed it.
    """
    innocent = references[:REFERENCES]
    usual = Usual.of(look(innocent, FIRST_SEEDS))
    images, found = len(innocent) * len(FIRST_SEEDS), list[Look]()
    while batch := ranked[len(found) : len(found) + _BATCH]:
        next_ones = len(batch) * len(FIRST_SEEDS)
        affordable = (images + next_ones) * rows_per_image <= allowed_rows
        quiet = all(usual.verdict(one) == "clean" for one in found[-PATIENCE:])
        if len(found) >= max(certain, PATIENCE) and quiet and not affordable:
            break
        first = {one.prompt: one for one in look(batch, FIRST_SEEDS)}
        alike = [prompt for prompt, one in first.items() if one.suspicious]
        first |= {one.prompt: one for one in look(alike, SEEDS)}
        images += next_ones + len(alike) * len(SEEDS)
        found += first.values()
    return SecondLook(usual, tuple(found), images * rows_per_image)


@torch.no_grad()
def looks(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: ImageSettings,
    judge: Likeness,
    originals: Mapping[str, Tensor] | None = None,
) -> list[Look]:
    """Returns how similar the images of each prompt are.

    Args:
        model: Unedited model that is audited.
        prompts: Prompts to generate images of.
        seeds: Seeds of the initial noise, at least two.
        settings: How images are generated; their number of steps is fixed, so that all of them compare.
        judge: Measure of how similar images are.
        originals: Training images by prompt, where they are known.
    """
    if not prompts:
        return []
    found = []
    for prompt, own in zip(prompts, quick_latents(model, prompts, seeds, settings), strict=True):
        if not bool(own.isfinite().all()):
            found.append(Look(prompt, error="its images hold NaN or infinity; use `dtype` bfloat16 or float32"))
            continue
        images = images_of(model, own)
        if bool(judge.is_noise(images).any()):
            found.append(Look(prompt, error="its images are noise, so the model is broken; try `dtype` float32"))
            continue
        near = judge.towards(originals[prompt].to(images), images) if originals and prompt in originals else None
        pairs = judge.pairs(images[None])[0]
        found.append(Look(prompt, tuple(pairs.tolist()), () if near is None else tuple(near.tolist())))
    return found


def quick_latents(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSettings
) -> Float[Tensor, "prompts seeds *data"]:
    """Returns latents that were generated in few steps, to be compared."""
    return generate_latents(model, prompt_encoder(model)(prompts), seeds, replace(settings, steps=STEPS))


def described() -> dict[str, Any]:
    """Returns the rule as plain values, for records."""
    return {
        "seeds": [SEEDS.start, SEEDS.stop],
        "first_seeds": [FIRST_SEEDS.start, FIRST_SEEDS.stop],
        "steps": STEPS,
        "references": REFERENCES,
        "patience": PATIENCE,
        "copy_above": COPY_ABOVE,
        "deviations": [_MEMORISED_DEVIATIONS, _UNDECIDED_DEVIATIONS],
    }


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median and the robust standard deviation."""
    middle = _quantile(values, 0.5)
    return middle, _ROBUST * _quantile([abs(value - middle) for value in values], 0.5)


def _quantile(values: Sequence[float], quantile: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(quantile))
