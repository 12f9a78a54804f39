"""Encoding prompts as conditions of a backbone: first tokens, so that truncation is reported, then states."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from diffcore.denoiser import Condition

Recipe = Literal["stable diffusion", "sdxl", "pixart", "sd3", "flux"]


@dataclass(frozen=True)
class Tokens:
    """Prompts as token numbers, once for each text encoder.

    Attributes:
        ids: Token numbers for each encoder, padded to its length.
        masks: Ones at tokens, zeros at padding, for each encoder.
        truncated: Whether some encoder sees less than the whole prompt.
        lost: The text that even the longest encoder cuts off; empty for prompts that fit.
    """

    ids: tuple[Int[Tensor, "b _"], ...]
    masks: tuple[Int[Tensor, "b _"], ...]
    truncated: Bool[Tensor, " b"]
    lost: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lost)


@dataclass(frozen=True)
class TextTower:
    """A text encoder with its tokenizer and the number of tokens that it takes.

    Attributes:
        tokenizer: A CLIP or T5 tokenizer of transformers.
        encoder: The text encoder that belongs to it.
        length: Number of tokens per prompt, start and end included.
        expands: Whether a placeholder of textual inversion stands for all its vectors: `<toy>` for `<toy> <toy>_1 ...`.
    """

    tokenizer: Any
    encoder: nn.Module
    length: int
    expands: bool = False

    def tokenize(self, prompts: Sequence[str], *, num_chunks: int = 1) -> tuple[Tensor, Tensor, list[str]]:
        """Returns ids, mask and the text that was cut.

        Args:
            prompts: Prompts of any length.
            num_chunks: Number of pieces that each prompt is spread over; above 1 each is a row of its own, with start
                and end, and rows of one prompt follow one another.
        """
        rows, end = self._rows(prompts), self.tokenizer.eos_token_id
        if num_chunks > 1:
            inner = self.length - 2
            pieces = [[row[1:-1][start * inner :][:inner] for start in range(num_chunks)] for row in rows]
            rows = [[row[0], *piece, end] for row, own in zip(rows, pieces, strict=True) for piece in own]
        ids = torch.full((len(rows), self.length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        lost = []
        for index, row in enumerate(rows):
            kept = row if len(row) <= self.length else [*row[: self.length - 1], end]
            ids[index, : len(kept)] = torch.tensor(kept)
            mask[index, : len(kept)] = 1
            lost.append(self.tokenizer.decode(row[self.length - 1 : -1]) if len(row) > self.length else "")
        return ids, mask, lost

    def num_chunks(self, prompt: str) -> int:
        """Returns the number of pieces that hold a whole prompt, at least 1."""
        return max(1, -(-(len(self._rows([prompt])[0]) - 2) // (self.length - 2)))

    def _rows(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each prompt, start and end included, however many."""
        if self.expands:
            prompts = [self._expanded(prompt) for prompt in prompts]
        if not prompts:
            return []
        return self.tokenizer(list(prompts), padding=False, truncation=False, verbose=False).input_ids

    @cached_property
    def _vectors(self) -> dict[str, str]:
        """The replacement of each placeholder that stands for several vectors, by placeholder."""
        added = self.tokenizer.added_tokens_encoder
        families = {name: list(takewhile(added.__contains__, (f"{name}_{i}" for i in count(1)))) for name in added}
        return {name: " ".join([name, *others]) for name, others in families.items() if others}

    def _expanded(self, prompt: str) -> str:
        """Returns a prompt with its placeholders expanded, as diffusers pipelines expand it before tokenizing."""
        if self._vectors:
            for token in dict.fromkeys(self.tokenizer.tokenize(prompt)):
                if token in self._vectors:
                    prompt = prompt.replace(token, self._vectors[token])
        return prompt


class PromptEncoder:
    """Turns prompts into conditions, as the pipeline of its family does.

    Args:
        recipe: Name of the rule that combines the states of the encoders.
        towers: Text encoders of the pipeline, in order.
        num_text_tokens: Number of T5's tokens, which stay empty in SD3 without a T5.
        width: Width of the states that the backbone takes; read for SD3 alone.
        size: Height and width in pixels for backbones that are conditioned on them.
        sized: Whether PixArt's backbone is conditioned on the size.
        guidance: Guidance scale that guidance-distilled Flux is conditioned on; None for others.
        zeros_for_empty: Whether "no prompt" is zeros, as in SDXL, or the empty prompt.
    """

    def __init__(
        self,
        recipe: Recipe,
        towers: Sequence[TextTower],
        *,
        num_text_tokens: int = 256,
        width: int = 4096,
        size: tuple[int, int] = (512, 512),
        sized: bool = False,
        guidance: float | None = None,
        zeros_for_empty: bool = False,
    ) -> None:
        self.recipe: Recipe = recipe
        self.towers = tuple(towers)
        self.num_text_tokens = num_text_tokens
        self.width = width
        self.size = size
        self.sized = sized
        self.guidance = guidance
        self.zeros_for_empty = zeros_for_empty

    def __call__(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Condition:
        """Returns the condition of some prompts; see `tokenize` and `encode`."""
        return self.encode(self.tokenize(prompts), size=size)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Returns the tokens of some prompts and what was cut of them."""
        if isinstance(prompts, str):
            raise TypeError("prompts is one string; pass a list of them")
        if self.recipe == "pixart":
            prompts = [prompt.lower().strip() for prompt in prompts]
        rows = [tower.tokenize(prompts) for tower in self.towers]
        lost = [min(texts, key=len) for texts in zip(*(row[2] for row in rows), strict=True)]
        some = [any(texts) for texts in zip(*(row[2] for row in rows), strict=True)]
        return Tokens(
            tuple(row[0] for row in rows),
            tuple(row[1] for row in rows),
            torch.tensor(some, dtype=torch.bool),
            tuple(lost),
        )

    def whole(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Condition:
        """Returns the condition of prompts of any length: CLIP reads a long one in pieces of 75 tokens.

        The states of the pieces follow one another, see `joined` for prompts of different length; pooled states are
        those of the first piece. Families with a T5 read one piece, as `__call__` does.

        Args:
            prompts: Prompts of any length.
            size: Height and width in pixels, as `encode` takes them.

        Example:
            >>> from diffcore.models import from_pipeline
            >>> from diffcore.testing import tiny
            >>> encoder = from_pipeline(tiny.pipeline("sd15")).prompts
            >>> encoder.whole(["a horse, " * 40, "a horse"])["encoder_hidden_states"].shape[1] > 2 * 77
            True
        """
        numbers = [self.num_chunks(prompt) for prompt in prompts]
        if max(numbers, default=1) == 1:
            return self(prompts, size=size)
        rows = []
        for prompt, number in zip(prompts, numbers, strict=True):
            tokens = [tower.tokenize([prompt], num_chunks=number) for tower in self.towers]
            ids, masks = tuple(row[0] for row in tokens), tuple(row[1] for row in tokens)
            pieces = self.encode(Tokens(ids, masks, torch.zeros(number, dtype=torch.bool), ("",) * number), size=size)
            row = {key: value[:1] for key, value in pieces.items()}
            states = pieces["encoder_hidden_states"].flatten(0, 1)[None]
            rows.append({**row, "encoder_hidden_states": states})
        return joined(rows)

    def num_chunks(self, prompt: str) -> int:
        """Returns the number of pieces in which CLIP reads a whole prompt; 1 for families with a T5."""
        if self.recipe not in ("stable diffusion", "sdxl"):
            return 1
        return max(tower.num_chunks(prompt) for tower in self.towers)

    @torch.no_grad()
    def encode(self, tokens: Tokens, *, size: tuple[int, int] | None = None) -> Condition:
        """Returns the condition of some tokens, on the encoders' device.

        Args:
            tokens: The tokens that `tokenize` returned.
            size: Height and width in pixels for backbones that are conditioned on them; by default the trained size.
        """
        if not len(tokens):  # the encoders take no empty batch
            return {key: value[:0] for key, value in self([""], size=size).items()}
        return _RECIPES[self.recipe](self, tokens, size or self.size)

    def unconditional(self, count: int, *, size: tuple[int, int] | None = None) -> Condition:
        """Returns the condition that means "no prompt", as the family's pipeline makes it, `count` times."""
        cond = dict(self([""] * count, size=size))
        if self.zeros_for_empty:
            cond |= {key: torch.zeros_like(cond[key]) for key in ("encoder_hidden_states", "text_embeds")}
        return cond

    def _stable_diffusion(self, tokens: Tokens, size: tuple[int, int]) -> Condition:
        tower = self.towers[0]
        use_mask = bool(getattr(tower.encoder.config, "use_attention_mask", False))
        device = _device(tower.encoder)
        mask = {"attention_mask": tokens.masks[0].to(device)} if use_mask else {}
        return {"encoder_hidden_states": tower.encoder(tokens.ids[0].to(device), **mask)[0]}

    def _sdxl(self, tokens: Tokens, size: tuple[int, int]) -> Condition:
        states, pooled = self._clip_states(tokens)
        height, width = size
        numbers = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=states.device)
        return {
            "encoder_hidden_states": states,
            "text_embeds": pooled[-1],
            "time_ids": numbers.repeat(len(states), 1),
        }

    def _pixart(self, tokens: Tokens, size: tuple[int, int]) -> Condition:
        tower = self.towers[0]
        device = _device(tower.encoder)
        mask = tokens.masks[0].to(device)
        states = tower.encoder(tokens.ids[0].to(device), attention_mask=mask)[0]
        cond: dict[str, Tensor] = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        if self.sized:
            height, width = size
            cond["resolution"] = torch.tensor([[height, width]], dtype=torch.float32, device=device).repeat(
                len(mask), 1
            )
            cond["aspect_ratio"] = torch.tensor([[height / width]], device=device).repeat(len(mask), 1)
        return cond

    def _sd3(self, tokens: Tokens, size: tuple[int, int]) -> Condition:
        clip, pooled = self._clip_states(tokens, towers=2)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if len(self.towers) > 2:
            tower = self.towers[2]
            text = tower.encoder(tokens.ids[2].to(clip.device))[0].to(clip.dtype)
        else:
            text = clip.new_zeros(len(clip), self.num_text_tokens, self.width)
        return {"encoder_hidden_states": torch.cat([clip, text], 1), "pooled_projections": torch.cat(pooled, -1)}

    def _flux(self, tokens: Tokens, size: tuple[int, int]) -> Condition:
        clip, text = self.towers
        device = _device(clip.encoder)
        pooled = clip.encoder(tokens.ids[0].to(device)).pooler_output
        cond = {
            "encoder_hidden_states": text.encoder(tokens.ids[1].to(device))[0],
            "pooled_projections": pooled,
        }
        if self.guidance is not None:
            cond["guidance"] = torch.full((len(pooled),), self.guidance, device=device)
        return cond

    def _clip_states(self, tokens: Tokens, towers: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns the last states but one of the CLIP encoders side by side, and each one's pooled output."""
        states, pooled = [], []
        for tower, ids in zip(self.towers[:towers], tokens.ids, strict=False):
            output = tower.encoder(ids.to(_device(tower.encoder)), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        return torch.cat(states, -1), pooled


def joined(conditions: Sequence[Condition]) -> Condition:
    """Returns conditions of different prompts as one batch.

    States of shorter prompts are repeated until all have as many: attention over states that are repeated equally often
    is attention over the states.

    Args:
        conditions: Conditions with the same entries.
    """
    name = "encoder_hidden_states"
    width = math.lcm(*(condition[name].shape[1] for condition in conditions if name in condition))
    rows = [
        {**row, name: row[name].repeat(1, width // row[name].shape[1], 1)} if name in row else row for row in conditions
    ]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


_RECIPES: dict[str, Callable[[PromptEncoder, Tokens, tuple[int, int]], Condition]] = {
    "stable diffusion": PromptEncoder._stable_diffusion,
    "sdxl": PromptEncoder._sdxl,
    "pixart": PromptEncoder._pixart,
    "sd3": PromptEncoder._sd3,
    "flux": PromptEncoder._flux,
}
