"""Variants of a prompt: other wordings that a user may type, and the prompt with single tokens left out."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffcore.models import PromptEncoder
from diffcore.models.prompts import TextTower, Tokens
from nemo_localize import protocol


def paraphrases(prompt: str, given: Sequence[str] = ()) -> list[str]:
    """Returns other wordings of a prompt: those given, the protocol's frames, and the words in another order."""
    words = prompt.split()
    half = len(words) // 2
    turned = " ".join([*words[half:], *words[:half]])
    found = [*given, *(frame.format(prompt) for frame in protocol.PARAPHRASES), turned]
    return [text for text in dict.fromkeys(found) if text != prompt]


def without_tokens(encoder: PromptEncoder, prompt: str) -> tuple[Tokens, list[str]]:
    """Returns rows of a prompt, each without one of its tokens, and these tokens; start, end and padding stay."""
    tokens = encoder.tokenize([prompt])
    length = min(int(mask.sum()) for mask in tokens.masks)
    places = _spread(length - 2, protocol.DROPPED_TOKENS)
    rows = [
        _dropped(tower, ids[0], mask[0], places)
        for tower, ids, mask in zip(encoder.towers, tokens.ids, tokens.masks, strict=True)
    ]
    labels = [str(encoder.towers[0].tokenizer.decode([int(tokens.ids[0][0, place])])).strip() for place in places]
    return (
        replace(
            tokens,
            ids=tuple(ids for ids, _ in rows),
            masks=tuple(mask for _, mask in rows),
            truncated=tokens.truncated.expand(len(places)),
            lost=tokens.lost * len(places),
        ),
        labels,
    )


def _spread(count: int, most: int) -> list[int]:
    """Returns places of up to `most` of `count` tokens after the start token, evenly spread."""
    chosen = min(count, most)
    return [1 + (2 * index + 1) * count // (2 * chosen) for index in range(chosen)]


def _dropped(tower: TextTower, ids: Tensor, mask: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns one row per place, without the token there; the others move up and padding follows."""
    kept = torch.tensor([[i for i in range(len(ids)) if i != place] for place in places], dtype=torch.long)
    kept = kept.reshape(len(places), len(ids) - 1)
    pad = torch.full((len(places), 1), int(tower.tokenizer.pad_token_id))
    return torch.cat([ids[kept], pad], 1), torch.cat([mask[kept], torch.zeros_like(pad)], 1)
