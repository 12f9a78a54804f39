"""The paper's names of activations: their parts, their abbreviations, and the nearest names to an unknown one.

A name says where a tensor is, in order of execution and counted from 0: "up-level1-repeat0-vit-block0-cross-q" is the
query of cross-attention in transformer block 0 after residual block 0 of level 1 of the up stage. Level 0 of the up
stage runs first, and has the lowest resolution. The mid stage has no levels, and its transformer has no repeat.
Transformers that are no U-Nets have blocks alone, as in "vit-block7-out".

References:
    Meng et al. 2024, appendix B.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from diffcore.errors import NoMatchError, UserError, printable

BLOCK_KINDS = ("self-q", "self-k", "self-v", "self-map", "cross-q", "cross-map", "ffn-inner", "out")
"""Tensors of a transformer block that the paper lists, in order of execution."""

_ENDS = {
    "unet-in": ("in", "in"),
    "unet-after-conv-in": ("in", "after-conv-in"),
    "unet-out": ("out", "out"),
    "vit-in": ("in", "vit-in"),
    "up-cross-map": ("up", "up-cross-map"),
}
_LONG = re.compile(
    r"(?P<stage>down|mid|up)"
    r"(-level(?P<level>\d+))?(-repeat(?P<repeat>\d+))?(-vit-block(?P<block>\d+))?-(?P<kind>[a-z][a-z-]*)"
)
_PLAIN = re.compile(r"vit-block(?P<block>\d+)-(?P<kind>[a-z][a-z-]*)")
_SKIP = re.compile(r"skip(?P<number>\d+)")
_NAME = re.compile(r"\s*(up|down|mid|vit|block|unet|skip|b\d)[\w\s-]*", re.IGNORECASE)
_SHORT = (
    (re.compile(r"^(down|up)-?(?:level|l)?-?(\d+)"), r"\1-level\2"),
    (re.compile(r"-(?:repeat|rep|r)-?(\d+)"), r"-repeat\1"),
    (re.compile(r"(^|-)(?:vit-block|vit|block|b)-?(\d+)"), r"\1vit-block\2"),
    (re.compile(r"^(.*(?:level|repeat|block)\d+)-(up|down)(?:sampler)?$"), r"\1-\2sampler-out"),
    (re.compile(r"-(up|down)sampler$"), r"-\1sampler-out"),
)


@dataclass(frozen=True)
class Name:
    """The parts of an activation's name.

    Attributes:
        kind: Word for what the tensor is, such as "res-out", "cross-q" or, of a block's result, "out".
        stage: Part of the network: "in", "down", "mid", "up", "vit" (transformers that are no U-Nets), or "out".
        level: Number of the resolution within the stage.
        repeat: Number of the residual block or transformer within the level.
        block: Number of the transformer block.

    Example:
        >>> Name.parse("up1-rep1-vit0-cross-q")
        Name(kind='cross-q', stage='up', level=1, repeat=1, block=0)
        >>> str(Name.parse("up1-rep1-vit0-cross-q"))
        'up-level1-repeat1-vit-block0-cross-q'
    """

    kind: str
    stage: str
    level: int | None = None
    repeat: int | None = None
    block: int | None = None

    def __str__(self) -> str:
        for name, parts in _ENDS.items():
            if (self.stage, self.kind) == parts:
                return name
        if self.kind == "skip":
            return f"skip{self.repeat}"
        words = [
            self.stage if self.stage != "vit" else "",
            "" if self.level is None else f"level{self.level}",
            "" if self.repeat is None else f"repeat{self.repeat}",
            "" if self.block is None else f"vit-block{self.block}",
            self.kind,
        ]
        return "-".join(word for word in words if word)

    @classmethod
    def parse(cls, text: str) -> "Name":
        """Returns the parts of a name, canonical or abbreviated.

        Args:
            text: A name such as "up-level1-repeat1-vit-block0-cross-q", or short, "up1-rep1-vit0-cross-q".

        Raises:
            ValueError: The text is no name of an activation.
        """
        name = canonical(text)
        if name in _ENDS:
            return cls(_ENDS[name][1], _ENDS[name][0])
        if found := _SKIP.fullmatch(name):
            return cls("skip", "down", repeat=int(found["number"]))
        if found := _PLAIN.fullmatch(name):
            return cls(found["kind"], "vit", block=int(found["block"]))
        found = _LONG.fullmatch(name)
        if found is None or (found["stage"] == "mid") != (found["level"] is None):
            raise ValueError(f"{printable(text)!r} is no name of an activation, such as up-level1-repeat0-res-out")
        level, repeat, block = (None if found[key] is None else int(found[key]) for key in ("level", "repeat", "block"))
        return cls(found["kind"], found["stage"], level, repeat, block)


def canonical(text: str) -> str:
    """Returns the spelling of the paper for an abbreviated name; other text comes back as it is.

    Args:
        text: A name; numbers may follow their words directly, "level" may be left out, and "repeat" and "vit-block" may
            be "rep" and "vit", "block" or "b".

    Example:
        >>> [canonical(name) for name in ("up0-rep0-block5-out", "up1-upsampler", "mid-vit0-self-q", "conv_in")]
        ['up-level0-repeat0-vit-block5-out', 'up-level1-upsampler-out', 'mid-vit-block0-self-q', 'conv_in']
    """
    if (
        "." in text
        or re.search(r"[^\w\s-]", text)
        or not re.match(r"\s*(up|down|mid|vit|b\d|block|unet|skip)", text, re.I)
    ):
        return text
    name = re.sub(r"[\s_-]+", "-", text.strip().lower())
    if name in _ENDS:
        return name
    for pattern, replacement in _SHORT:
        name = pattern.sub(replacement, name)
    return name


def unknown(text: str, known: Iterable[str], where: str) -> UserError:
    """Returns the error about a name that a model does not have, with the nearest names that it has.

    Args:
        text: The name that was asked for.
        known: Names of the model's activations.
        where: Words for the model in the message.
    """
    if canonical(text) == "vae-out" or text == "vae-out":
        return NoMatchError("'vae-out' is the encoded image itself, no activation of the backbone; take unet-in")
    names = list(known)
    nearest = difflib.get_close_matches(canonical(text), names, n=3, cutoff=0.3)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return NoMatchError(f"no activation of {where} is called {printable(text, 120)!r}{hint}; the inventory lists all")
