"""CLIP scores of an image set whose prompts are known."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffcore.checkpoint.component import read_component
from diffcore.checkpoint.refusal import refusal
from diffcore.checkpoint.tokenizers import build_tokenizer, last_number
from diffcore.checkpoint.walk import walk
from diffcore.data.pairing import places_of_prompts
from diffcore.data.prompts import PromptSet
from diffcore.errors import UserError
from diffcore.io import files
from diffcore.metrics.clip_score import ClipScore, PromptFit
from diffcore.metrics.features import FeatureExtractor
from diffcore.models.prompts import TextTower


@dataclass(frozen=True)
class ClipText:
    """The text side of a CLIP whose image side is a feature extractor.

    Attributes:
        extractor: The image side, `clip:FOLDER`; its network holds both sides.
        tower: The tokenizer and the text network.
        sha256: Digest of the tokenizer's files.
    """

    extractor: FeatureExtractor
    tower: TextTower
    sha256: str

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Returns the projected embedding of each prompt, as much of it as CLIP reads."""
        network: Any = self.extractor.network
        device = next(network.parameters()).device
        ids, mask, _ = self.tower.tokenize(prompts)
        states = network.text_model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return network.text_projection(states.pooler_output).float()

    def lost(self, prompts: Sequence[str]) -> list[str]:
        """Returns the end of each prompt that CLIP cuts off; empty for prompts that fit."""
        return self.tower.tokenize(prompts)[2]


@dataclass(frozen=True)
class ScoredPrompts:
    """Prompts of an image set, and the CLIP that scores them.

    Attributes:
        prompts: The prompts of one file.
        places: Index of the prompt of each image file; -1 for none.
        text: The text side of the CLIP that scores them.
    """

    prompts: PromptSet
    places: tuple[int, ...]
    text: ClipText

    @classmethod
    def of(cls, prompts: PromptSet, names: Sequence[str], text: ClipText) -> "ScoredPrompts":
        """Finds the prompt of each image, as `data.pairing.places_of_prompts` does."""
        return cls(prompts, places_of_prompts(prompts, names), text)

    @property
    def extractor(self) -> FeatureExtractor:
        """The image side of the CLIP."""
        return self.text.extractor


@dataclass(frozen=True)
class PromptScores:
    """CLIP scores of images, and the part of each prompt that CLIP did not read.

    Attributes:
        fit: Mean score, and the number of prompts that CLIP truncated.
        scores: CLIP score of each image that could be read; NaN without a prompt.
        places: Index of the prompt of each such image; -1 for none.
        lost: The end of each prompt that CLIP cut off, by prompt.
    """

    fit: PromptFit
    scores: Float[Tensor, " n"]
    places: tuple[int, ...]
    lost: Mapping[str, str]


def clip_text(extractor: FeatureExtractor, folder: Path) -> ClipText:
    """Returns the text side of a loaded CLIP.

    Args:
        extractor: The loaded image side, `clip:FOLDER`.
        folder: The folder of `extractor`; its tokenizer is read from it.

    Raises:
        IncompatibleModelError: The folder has no tokenizer, or one of another model.
    """
    component = read_component(folder, walk(folder), "tokenizer", "transformers", "CLIPTokenizer")
    tokenizer = build_tokenizer(component)
    network: Any = extractor.network
    config = network.config.text_config
    if (entries := last_number(tokenizer) + 1) > config.vocab_size:
        raise refusal(folder, f"has a tokenizer of {entries:,} entries for {config.vocab_size:,} places")
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    sums = [files.sha256(file) for file in component.files] + [str(token) for token in component.added]
    digest = hashlib.sha256("\n".join(sums).encode())
    return ClipText(extractor, TextTower(tokenizer, network.text_model, length), digest.hexdigest())


def score_prompts(
    judged: ScoredPrompts, images: Float[Tensor, "n d"], indices: Sequence[int], batch_size: int
) -> PromptScores:
    """Returns the CLIP scores of images; each prompt is read once, however many images it has.

    Args:
        judged: Prompts, their images, and the CLIP that scores them.
        images: Features of the images that could be read.
        indices: Places of these images among the files.
        batch_size: Number of prompts per forward pass.
    """
    places = [judged.places[index] for index in indices]
    wanted = sorted({judged.prompts.prompts[place] for place in places if place >= 0})
    if not wanted:
        raise UserError("no image that could be read has a prompt; check the column of files")
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    texts = torch.cat([judged.text(batch) for batch in batches]).cpu()
    lost = dict(zip(wanted, judged.text.lost(wanted), strict=True))
    row = {prompt: place for place, prompt in enumerate(wanted)}
    having = [n for n, place in enumerate(places) if place >= 0]
    chosen = [judged.prompts.prompts[places[n]] for n in having]
    pairs = images[having], texts[[row[prompt] for prompt in chosen]]
    metric = ClipScore()
    truncated: Bool[Tensor, " b"] = torch.tensor([bool(lost[prompt]) for prompt in chosen])
    metric.update(*pairs, truncated)
    scores = torch.full((len(places),), torch.nan)
    scores[having] = 100 * functional.cosine_similarity(*pairs).clamp(min=0)
    return PromptScores(
        metric.compute(), scores, tuple(places), {prompt: text for prompt, text in lost.items() if text}
    )
