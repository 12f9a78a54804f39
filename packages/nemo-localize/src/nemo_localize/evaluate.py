"""How much is still copied under each mitigation, and what it costs elsewhere: the paper's table.

The value of a prompt is the median over its images, or over their pairs; the table has medians and median absolute
deviations over prompts. Images under two mitigations start from the same noise. Prompts whose training image the
unedited model reproduces are verbatim memories, the others template memories, which likeness to one image hardly shows.

References:
    Hintersdorf, Struppek et al. 2024, section 4 and appendix C.1; their code saved images as JPEG before it measured
    them, here they are measured as they were generated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffcore.batching import InBatches
from diffcore.errors import UserError
from diffcore.metrics import FeatureExtractor, compare_features
from diffcore.metrics.prompt_fit import ClipText
from diffcore.stats import Covariance
from nemo_localize import protocol
from nemo_localize.likeness import Likeness, likeness

UNEDITED = "none"
Kind = Literal["verbatim", "template", "no training image"]
_KINDS: dict[str, Kind] = {  # names in the published list of prompts, and in Webster's
    **{"vm": "verbatim", "verbatim": "verbatim", "mv": "verbatim", "rv": "verbatim"},
    **{"tm": "template", "template": "template", "tv": "template"},
}
_GROUPS: tuple[str, ...] = ("all", "verbatim", "template")
_DISTANCES = {
    "Fréchet distance": {"inception": "FID", "clip": "CLIP-FID"},
    "Fréchet distance, extrapolated": {"inception": "FID, extrapolated", "clip": "CLIP-FID, extrapolated"},
    "Fréchet distance, real against real": {"inception": "FID of real images", "clip": "CLIP-FID of real images"},
    "kernel distance": {"inception": "KID", "clip": "CLIP-KID"},
}


@dataclass(frozen=True)
class CaptionScores:
    """The measures of one prompt's images under one mitigation.

    Attributes:
        prompt: Prompt of the images.
        mitigation: Mitigation that the images were generated under; "none" is the unedited model.
        kind: Verbatim where the unedited model reproduces the training image, else template.
        values: Median over images or pairs, by name of the measure.
    """

    prompt: str
    mitigation: str
    kind: Kind
    values: Mapping[str, float]


@dataclass(frozen=True)
class Quality:
    """One distance of a mitigation's images of ordinary prompts, with its 95 % interval.

    Attributes:
        mitigation: Mitigation that the images were generated under.
        metric: Name of the distance.
        features: Features that the distance is measured in.
        reference: Images that the others are compared with.
        value: Distance between the two sets.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of images that it rests on.
    """

    mitigation: str
    metric: str
    features: str
    reference: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """The measures of all mitigations, with the networks and substitutes that they rest on.

    Attributes:
        captions: Scores of each mitigation and prompt.
        quality: Distances of images of ordinary prompts.
        source: Description of the measure of likeness.
        notes: Remarks on substitutes, and on what was not measured.
        published: Whether medians follow the published code.
    """

    captions: tuple[CaptionScores, ...]
    quality: tuple[Quality, ...]
    source: str
    notes: tuple[str, ...]
    published: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """Returns the paper's table: medians and their deviations by mitigation, for all prompts and by kind."""
        rows, median = [], _lower_median if self.published else _median
        for mitigation in dict.fromkeys(caption.mitigation for caption in self.captions):
            for group in _GROUPS:
                chosen = [c for c in self.captions if c.mitigation == mitigation and group in ("all", c.kind)]
                if chosen:
                    rows.append(
                        {"mitigation": mitigation, "captions": group, "n": len(chosen)} | _spread(chosen, median)
                    )
        return [row | {"measured in": self.source} for row in rows]

    def quality_rows(self) -> list[dict[str, Any]]:
        """Returns the table of distances."""
        return [asdict(one) for one in self.quality]

    def caption_rows(self) -> list[dict[str, Any]]:
        """Returns one row per mitigation and prompt."""
        return [
            {"prompt": c.prompt, "mitigation": c.mitigation, "kind": c.kind} | dict(c.values) for c in self.captions
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "table": self.rows(),
            "quality": self.quality_rows(),
            "captions": self.caption_rows(),
            "source": self.source,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Judges:
    """The networks that compare images; a missing one is replaced by a measure without weights, as notes then say.

    Attributes:
        copies: Copy detector `sscd:FILE`; without it structural similarity.
        clip: CLIP for the fit of images and prompts, which is not measured without it.
        quality: `inception:FILE`, `clip:FOLDER`, or any other extractor, for distances between sets of images.
        batch_size: Number of images per forward pass.
    """

    copies: FeatureExtractor | None = None
    clip: ClipText | None = None
    quality: tuple[FeatureExtractor, ...] = field(default=())
    batch_size: int = 64


def evaluate(
    prompts: Sequence[str],
    images: Mapping[str, Float[Tensor, "prompts seeds c height width"]],
    *,
    originals: Mapping[str, Tensor] | None = None,
    judges: Judges | None = None,
    ordinary: Mapping[str, Float[Tensor, "n c height width"]] | None = None,
    real: Float[Tensor, "m c _ _"] | None = None,
    of_latents: bool = False,
    kinds: Mapping[str, Kind] | None = None,
    published: bool = False,
) -> Evaluation:
    """Measures the images of every mitigation: copies, agreement of seeds, and distances of ordinary images.

    Args:
        prompts: Memorised prompts, one for each row of images.
        images: Images of the prompts by mitigation, from the same noise; "none" is the unedited model.
        originals: Training images by prompt, one or more of each: (images, channels, height, width).
        judges: Networks that compare the images.
        ordinary: Images of at least ten ordinary prompts by mitigation, which show what the edit costs elsewhere.
        real: Real images that those are compared with; by default the unedited model's own images.
        of_latents: Whether images are latents, stretched to [0, 1].
        kinds: Kind of memory of each prompt where it is known; by default its images tell.
        published: Take the lower of the two values in the middle as the median of an even number, as the published
            code does, instead of their mean.

    Raises:
        UserError: There are no images of the unedited model, or too few ordinary ones.
        ValueError: Images of a mitigation do not fit the prompts.

    Example:
        >>> images = {"none": torch.zeros(1, 2, 3, 16, 16), "neurons": torch.rand(1, 2, 3, 16, 16)}
        >>> [(row["mitigation"], row["D_SSIM"] > 0.9) for row in evaluate(["a prompt"], images).rows()]
        [('none', True), ('neurons', False)]
    """
    judges, originals = judges or Judges(), dict(originals or {})
    _check(prompts, images)
    measure = likeness(judges.copies, of_latents=of_latents)
    told: dict[str, Kind] = dict(kinds or {})
    median = _lower_median if published else _median
    found: list[Kind] = [
        told.get(prompt) or _kind(measure, originals.get(prompt), own)
        for prompt, own in zip(prompts, images[UNEDITED], strict=True)
    ]
    clip = judges.clip
    fits = clip and {name: _fits(judges, clip, prompts, own) for name, own in images.items()}
    captions = [
        CaptionScores(
            prompt,
            mitigation,
            found[place],
            _values(measure, own[place], images[UNEDITED][place], originals.get(prompt), median)
            | ({} if not fits else {"A_CLIP": median(fits[mitigation][place])}),
        )
        for mitigation, own in images.items()
        for place, prompt in enumerate(prompts)
    ]
    quality = _quality(judges, dict(ordinary or {}), real)
    notes = _notes(judges, measure, originals, real, quality, captions)
    notes += ["captions are called verbatim or template as they were given"] if told else []
    middle = "the lower of the two in the middle" if published else "their mean, where the published code has the lower"
    notes.append(f"the median of an even number of values is {middle}")
    return Evaluation(tuple(captions), tuple(quality), measure.source, tuple(notes), published)


def kinds_of(prompts: Sequence[str], types: Sequence[str]) -> dict[str, Kind] | None:
    """Returns which prompts a column `type` calls verbatim or template memories; None where it says something else.

    Args:
        prompts: Prompts, one for each cell.
        types: Cells of the column: VM or verbatim, TM or template, Webster's MV, RV and TV, in any case; or empty.
    """
    said = [(prompt, cell.strip().lower()) for prompt, cell in zip(prompts, types, strict=True) if cell.strip()]
    if not said or any(cell not in _KINDS for _, cell in said):
        return None
    return {prompt: _KINDS[cell] for prompt, cell in said}


def _values(
    measure: Likeness,
    images: Tensor,
    unedited: Tensor,
    originals: Tensor | None,
    median: Callable[[Tensor], float],
) -> dict[str, float]:
    """Returns the measures of one prompt's images."""
    values: dict[str, float] = {}
    if measure.noise is not None:
        values["share of noise"] = float(measure.is_noise(images).double().mean())
    if originals is not None:
        towards = measure.towards(originals.to(images), images)
        values[f"{measure.name}_orig"] = median(towards)
        values[f"{measure.name}_orig, max"] = float(towards.max())
        if measure.name in ("SSCD", "SSIM"):  # the threshold of a copy is known for these two
            values["share of copies"] = float((towards > protocol.COPY_ABOVE).double().mean())
    values[f"{measure.name}_gen"] = median(measure.between(images, unedited))
    if len(images) > 1:
        values[f"D_{measure.name}"] = median(measure.pairs(images[None]))
    return values


def _kind(measure: Likeness, originals: Tensor | None, unedited: Tensor) -> Kind:
    """Returns verbatim where an image of the unedited model is a copy (paper, appendix C.1)."""
    if originals is None:
        return "no training image"
    copied = float(measure.towards(originals.to(unedited), unedited).max()) > protocol.COPY_ABOVE
    return "verbatim" if copied else "template"


def _fits(judges: Judges, clip: ClipText, prompts: Sequence[str], images: Tensor) -> Float[Tensor, "prompts seeds"]:
    """Returns the cosine of every image and its prompt."""
    shown = functional.normalize(_features(clip.extractor, images.flatten(0, 1), judges.batch_size), dim=1)
    texts = functional.normalize(torch.cat(list(InBatches(judges.batch_size)(prompts, clip))), dim=1)
    return (shown.unflatten(0, images.shape[:2]) * texts.to(shown)[:, None]).sum(2)


def _quality(judges: Judges, ordinary: Mapping[str, Tensor], real: Tensor | None) -> list[Quality]:
    found = []
    reference = ordinary.get(UNEDITED) if real is None else real
    if not ordinary:
        return []
    if reference is None:
        raise UserError(f"ordinary images have nothing to be compared with; give real images, or those of {UNEDITED!r}")
    name = "real images" if real is not None else "the unedited model's images, same noise"
    for extractor in judges.quality:
        against: Tensor | Covariance = _features(extractor, reference, judges.batch_size)
        for mitigation, images in ordinary.items():
            if images is reference:
                continue
            kind = extractor.name.partition(":")[0]
            for one in compare_features(against, _features(extractor, images, judges.batch_size), extractor.name):
                if one.metric in _DISTANCES:
                    metric = _DISTANCES[one.metric].get(kind, one.metric)
                    found.append(Quality(mitigation, metric, one.features, name, one.value, one.low, one.high, one.n))
    return found


def _features(extractor: FeatureExtractor, images: Tensor, batch_size: int) -> Float[Tensor, "n d"]:
    device = next((p.device for p in extractor.parameters()), images.device)
    return torch.cat(list(InBatches(batch_size)(images, lambda part: extractor(part.to(device)).cpu())))


def _median(values: Tensor) -> float:
    """Returns the median; of an even number of values the mean of the two in the middle."""
    return float(values.double().flatten().quantile(0.5))


def _lower_median(values: Tensor) -> float:
    """Returns the median; of an even number of values the lower of the two in the middle."""
    return float(values.double().flatten().median())


def _spread(chosen: Sequence[CaptionScores], median: Callable[[Tensor], float]) -> dict[str, float]:
    """Returns median and median absolute deviation of each measure over prompts."""
    row: dict[str, float] = {}
    for name in dict.fromkeys(name for caption in chosen for name in caption.values):
        values = torch.tensor([c.values[name] for c in chosen if name in c.values], dtype=torch.float64)
        middle = median(values)
        row |= {name: middle, f"{name}, mad": median((values - middle).abs())}
    return row


def _notes(
    judges: Judges,
    measure: Likeness,
    originals: Mapping[str, Tensor],
    real: Tensor | None,
    quality: Sequence[Quality],
    captions: Sequence[CaptionScores],
) -> list[str]:
    notes = []
    if measure.name != "SSCD":
        notes.append(f"{measure.name} stands in for SSCD: numbers do not compare with published ones")
    if not originals:
        notes.append("no training images were given: likeness to them, and which captions are verbatim, is not known")
    if judges.clip is None:
        notes.append("A_CLIP was not measured: it needs a CLIP")
    broken = [c.mitigation for c in captions if c.values.get("share of noise", 0) > 0]
    for mitigation in dict.fromkeys(broken):
        notes.append(
            f"{broken.count(mitigation)} captions have images of noise under {mitigation!r}: "
            "they are like nothing, and no copies"
        )
    names = [
        extractor.name for extractor in judges.quality if extractor.name.partition(":")[0] not in ("inception", "clip")
    ]
    if quality and names:
        notes.append(f"{', '.join(names)} stands in for Inception: distances do not compare with published ones")
    if quality and real is None:
        notes.append("distances are to the unedited model's images: they show what changed, not how good it is")
    return notes


def _check(prompts: Sequence[str], images: Mapping[str, Tensor]) -> None:
    if UNEDITED not in images:
        raise UserError(f"there are no images of the unedited model, {UNEDITED!r}, to compare with; generate them too")
    for mitigation, own in images.items():
        if own.shape != images[UNEDITED].shape or len(own) != len(prompts):
            raise ValueError(
                f"images of {mitigation!r} have shape {tuple(own.shape)}; {len(prompts)} prompts of the unedited "
                f"model have {tuple(images[UNEDITED].shape)}"
            )
    if not prompts:
        raise UserError("there are no prompts to evaluate; give some")
