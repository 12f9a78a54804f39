"""The second look: whether a caption is memorised as its images have it, where its first step leaves that open.

Most consistent first, captions are drawn from a few seeds. Where two of these agree, more are drawn, and how alike all
pairs of seeds are decides, against the same of ordinary captions. How captions are ranked hardly depends on which
ordinary ones a threshold was found from; so the threshold says which captions must be drawn, and the ranking says which
others are drawn for what the first steps of all have cost.

References:
    Seeds that draw one image tell what is memorised: Carlini et al., "Extracting Training Data from Diffusion
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

# Seeds of no other part of an audit; the first four are drawn of every caption that is looked at.
SEEDS = range(100_501, 100_511)
FIRST_SEEDS = SEEDS[:4]
STEPS = 5  # what is memorised comes back in few steps, and all images that are compared have as many
REFERENCES = 24
PATIENCE = 32  # captions in a row that must show nothing before those behind them go without a look
_BATCH = 16  # captions
_ROBUST = 1.4826  # from a median absolute deviation to a standard deviation
_MEMORISED_DEVIATIONS, _UNDECIDED_DEVIATIONS = 3.0, 2.0


@dataclass(frozen=True)
class Look:
    """How alike the images of one caption are.

    Attributes:
        prompt: The caption.
        pairs: Likeness of all pairs of its seeds.
        original: Likeness of each seed to the training image that it is most alike; empty where none is given.
        error: Why there are no images to compare.
    """

    prompt: str
    pairs: tuple[float, ...] = ()
    original: tuple[float, ...] = ()
    error: str | None = None

    @property
    def typical(self) -> float:
        """What half of the pairs, or of the seeds to a training image, reach; NaN where there are no images."""
        return self._reached(0.5)

    @property
    def upper(self) -> float:
        """What a tenth of them reach."""
        return self._reached(0.9)

    @property
    def suspicious(self) -> bool:
        """Whether a single pair is alike, or one seed a training image."""
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
    """How alike the images of ordinary captions are, and what follows for others.

    Attributes:
        looks: At ordinary captions.
        memorised_above: A caption whose typical likeness is above it is memorised: three robust standard deviations
            above the median of ordinary captions, and never below what counts as a copy.
        undecided_above: A caption a tenth of whose likenesses is above it is not clean: likewise, with two.
        telling: Whether ordinary captions draw images that differ; where they do not, no image tells a memory.
    """

    looks: tuple[Look, ...]
    memorised_above: float
    undecided_above: float
    telling: bool

    @classmethod
    def of(cls, looks: Sequence[Look]) -> "Usual":
        """Returns what looks at ordinary captions say; a few memorised ones among them hardly move it."""
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
        """Returns what the images of a caption say."""
        if look.error is not None:
            return "undecided"
        if not self.telling:
            return "undecided" if look.upper > COPY_ABOVE else "clean"
        if look.typical > self.memorised_above:
            return "memorised"
        return "undecided" if look.upper > self.undecided_above else "clean"


@dataclass(frozen=True)
class SecondLook:
    """What the images of the most consistent captions say.

    Attributes:
        usual: What ordinary captions look like.
        looks: At captions, in the order in which they were looked at.
        rows: Latents that went through the network for it.
    """

    usual: Usual
    looks: tuple[Look, ...]
    rows: int

    def verdicts(self) -> dict[str, Verdict]:
        """Returns the verdict on each caption that was looked at."""
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
    """Looks at the images of captions, until what it may cost is spent and the last ones show nothing.

    Args:
        look: Draws captions from seeds and compares the images, see `looks`.
        ranked: Distinct captions, most consistent first.
        references: Ordinary captions, most consistent first: those that words alone pin down most.
        certain: How many of the ranked ones are looked at whatever it costs: all above the threshold, its uncertainty
            included.
        rows_per_image: Latents through the network for one image.
        allowed_rows: What the look may cost, in the same unit. It costs more only for those that are certain, for the
            first captions, and where one of the last ones was not clean.
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
    """Returns how alike the images of captions are.

    Args:
        model: Without any edit.
        prompts: Captions.
        seeds: At least two.
        settings: How images are generated, but for their steps: those that are compared must be generated alike.
        judge: Says how alike they are.
        originals: Training images, by caption, where they are known.
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
            found.append(Look(prompt, error="its images are noise, so the model, or how it is run, is broken"))
            continue
        near = judge.towards(originals[prompt].to(images), images) if originals and prompt in originals else None
        pairs = judge.pairs(images[None])[0]
        found.append(Look(prompt, tuple(pairs.tolist()), () if near is None else tuple(near.tolist())))
    return found


def quick_latents(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSettings
) -> Float[Tensor, "prompts seeds *data"]:
    """Returns the latents that are compared, in few steps."""
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
