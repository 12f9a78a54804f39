"""The tokenizer of the portraits, in which each word is one token, and a text encoder that tells all words apart.

The text encoder is trained on text alone and then frozen. Trained with the images it would have no reason to tell
names apart, because names say nothing; trained to give back every word, it does.
"""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffcore.noise import philox_uniform
from diffcore.runtime import Runtime
from diffcore.train import StepData, fit_supervised
from diffcore.train.supervised import Batch
from diffcore.zoo.portraits.captions import FIRST_NAMES, LAST_NAMES, PLACES
from diffcore.zoo.portraits.planted import planted

MAX_TOKENS = 32
WIDTH = 128

# Words that customisation of a model needs and captions do not have.
_MORE = (
    "a photo of sks person",
    "portrait photo of sks woman",
    "a drawing of sks man",
    f"{' '.join(FIRST_NAMES)} {' '.join(LAST_NAMES)} {' '.join(PLACES)}",
)
_STOPWORDS = frozenset({"a", "of", "with", "and", "the"})
_NOUNS = frozenset({"hair", "head", "cap", "beanie", "glasses", "background"})
_NOUNS |= {"moustache", "beard", "woman", "man", "person"}


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Returns a byte-level CLIP tokenizer in which every word of the captions is one token.

    Words that never came up fall back to their letters.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    words = re.compile(r"\w+|[^\w\s]")
    corpus = sorted({word for text in (*captions, *_MORE, *planted().captions) for word in words.findall(text)})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The trainer numbers the letters that end words as a hash map yields them, and breaks ties by number: it would give
    # another tokenizer in each process. Named beforehand, all of them, they keep their numbers.
    last_letters = [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *last_letters],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=cast(Any, merges), model_max_length=MAX_TOKENS)


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Int[Tensor, "n tokens"]:
    """Returns padded token numbers; raises if a caption is too long, because no caption of the zoo should be."""
    encoded = tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS).input_ids
    longest = max(map(len, encoded), default=0)
    if longest > MAX_TOKENS:
        raise ValueError(f"a caption has {longest} tokens; {MAX_TOKENS} fit: {max(captions, key=len)!r}")
    return torch.tensor(encoded)


def build_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """Returns an untrained CLIP text model of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=_number(tokenizer.bos_token_id),
        eos_token_id=_number(tokenizer.eos_token_id),
        pad_token_id=_number(tokenizer.pad_token_id),
    )
    torch.manual_seed(seed)
    encoder = CLIPTextModel(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.normal_(0, 0.05 if "token" in name else 0.02)
    return encoder


def _number(token: Any) -> int:
    return int(token)


@torch.no_grad()
def encode_ids(encoder: CLIPTextModel, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "n tokens width"]:
    """Returns the last hidden states in float16, the precision in which they are kept for training."""
    device = next(encoder.parameters()).device
    return torch.cat([encoder(chunk.to(device))[0].half().cpu() for chunk in ids.split(512)])


def spoken(caption: str) -> set[str]:
    """Returns the targets of the text encoder's training: the words, and which adjective stands by which noun."""
    words = caption.replace(",", " ").split()
    pairs = {f"{a} {b}" for a, b in pairwise(words) if b in _NOUNS and a not in _STOPWORDS}
    return (set(words) - _STOPWORDS) | pairs


class _Reader(nn.Module):
    """The text encoder with a linear head that predicts the words of a caption from a single position."""

    def __init__(self, encoder: CLIPTextModel, targets: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, targets)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        states = self.encoder(ids)[0]
        return self.head(states.gather(1, positions.unsqueeze(-1).expand(-1, -1, WIDTH)))


class _Captions:
    """Token numbers with their binary targets."""

    def __init__(self, ids: Tensor, captions: Sequence[str], vocabulary: Sequence[str], end: int) -> None:
        number = {word: i for i, word in enumerate(vocabulary)}
        self.num_targets = len(vocabulary)
        self.ids = ids
        self.targets = [torch.tensor([number[word] for word in sorted(spoken(caption))]) for caption in captions]
        self.ends = (ids == end).int().argmax(1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: Tensor) -> Batch:
        targets = torch.zeros(len(indices), self.num_targets)
        for row, index in zip(targets, indices.tolist(), strict=True):
            row[self.targets[index]] = 1
        return {"ids": self.ids[indices], "ends": self.ends[indices], "targets": targets}


def train_text_encoder(
    tokenizer: CLIPTokenizer, captions: Sequence[str], folder: Path, runtime: Runtime, *, steps: int = 900
) -> CLIPTextModel:
    """Trains a text encoder so that every padding position encodes the whole caption, and freezes it.

    From the first end token, and from a random padding position, a linear head predicts the bag of words and of
    adjacent (adjective, noun) pairs: binary cross-entropy, summed over targets.

    Returns:
        The encoder in evaluation mode.
    """
    vocabulary = sorted(set().union(*map(spoken, captions)))
    data = _Captions(token_ids(tokenizer, captions), captions, vocabulary, _number(tokenizer.eos_token_id))
    reader = _Reader(build_text_encoder(tokenizer), len(vocabulary))

    def loss(batch: Batch, step: int) -> Tensor:
        ends = batch["ends"]
        u = philox_uniform(0, torch.arange(len(ends), device=ends.device), (), step=step)
        padding = ends + (u * (MAX_TOKENS - ends)).long()
        logits: Tensor = reader(batch["ids"], torch.stack([ends, padding], dim=1))
        targets = batch["targets"].unsqueeze(1).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").sum(-1).mean() * 2

    return fit_supervised(
        reader,
        loss,
        StepData(data, batch_size=64, seed=1),
        steps=steps,
        learning_rate=3e-3,
        betas=(0.9, 0.98),
        folder=folder,
        runtime=runtime,
        description="text encoder",
        gradient_clip=1.0,
    ).encoder
