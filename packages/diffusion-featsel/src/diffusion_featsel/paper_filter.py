"""The paper's qualitative filter, as the exact rule on names that its tables follow.

The paper reads three properties off Stable Diffusion 1.5 and SDXL: noise of diffusion is asymmetric, granularity
changes within one resolution, and self-attention spreads locally. What they say about each activation is a rule on
names, which holds for these two architectures alone: 279 candidates of SDXL become 63, and Stable Diffusion 1.5 keeps
33. Measured filters take its place for other models.

References:
    Meng et al. 2024, section 3 and tables 4 to 6, whose rows are the activations that the rule keeps.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from diffusion_featsel.names import BLOCK_KINDS, Name

Family = Literal["sd15", "sdxl"]
"""Architectures whose names the rule was read from; Stable Diffusion 2.1 is built like 1.5, Playground v2 like SDXL."""

_COUNTS = {197: "sd15", 612: "sdxl"}
_BLOCKS = (0, 1, 3, 5, 7, 9)
_KINDS = {*BLOCK_KINDS, "res-increment", "res-out", "vit-out", "downsampler-out", "upsampler-out"}


@dataclass(frozen=True)
class PaperFilter:
    """What the paper's filter does with each name.

    Attributes:
        candidates: Names that the paper considers at all, in the given order.
        kept: Candidates that the rule keeps, in the given order.
        dropped: Reason for each name that is not kept, in words.
    """

    candidates: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: Mapping[str, str]


def paper_filter(names: Collection[str], family: Family, *, all_blocks: bool = False) -> PaperFilter:
    """Applies the paper's filter to names of activations.

    Args:
        names: The paper's names, as an inventory lists them.
        family: Architecture that the names belong to.
        all_blocks: Whether to consider every transformer block, and not only blocks 0, 1, 3, 5, 7 and 9, which was a
            decision about cost.

    Raises:
        ValueError: A name is not written as the paper does.

    Example:
        >>> found = paper_filter(["mid-repeat0-res-out", "up-level1-repeat2-res-out", "unet-out"], "sd15")
        >>> found.kept, found.dropped["mid-repeat0-res-out"]
        (('up-level1-repeat2-res-out',), 'noise: outside the up stage')
    """
    keeps = _keeps_sd15 if family == "sd15" else _keeps_sdxl
    candidates: list[str] = []
    kept: list[str] = []
    dropped: dict[str, str] = {}
    for text in names:
        name = Name.parse(text)
        reason = _not_considered(name, all_blocks=all_blocks)
        if reason is None:
            candidates.append(text)
            reason = _property(name) or keeps(name)
        if reason is None:
            kept.append(text)
        else:
            dropped[text] = reason
    return PaperFilter(tuple(candidates), tuple(kept), dropped)


def family_of(names: Collection[str]) -> Family | None:
    """Returns the architecture that names belong to: the counts of both are known; None where it is another.

    Args:
        names: All names of a model that are of kinds that the paper lists.
    """
    found = _COUNTS.get(len(names))
    if found == "sd15" and "up-level3-repeat2-vit-block0-self-k" in names:
        return "sd15"
    if found == "sdxl" and "up-level0-repeat2-vit-block9-out" in names:
        return "sdxl"
    return None


def _not_considered(name: Name, *, all_blocks: bool) -> str | None:
    if name.stage in ("in", "out", "vit"):
        return "not considered: the network's own input or output, or no U-Net"
    if name.kind not in _KINDS:
        return "not considered: of a kind that the paper does not list"
    if name.kind.endswith("-map"):
        return "not considered: an attention map"
    if name.kind.endswith("-v"):
        return "not considered: values of self-attention are an increment"
    if name.block is not None and name.block not in _BLOCKS and not all_blocks:
        return "not considered: only transformer blocks 0, 1, 3, 5, 7 and 9 are"
    return None


def _property(name: Name) -> str | None:
    if name.stage != "up":
        return "noise: outside the up stage"
    if name.kind in ("res-increment", "ffn-inner"):
        return "noise: an increment holds high frequencies"
    return None


def _keeps_sdxl(name: Name) -> str | None:
    if name.level == 0:
        return "locality: self-attention in the first half of the up stage" if name.kind.startswith("self-") else None
    if name.level == 1:
        if name.kind == "self-k" and name.repeat == 2:
            return None
        if name.kind.startswith("self-"):
            return "locality: self-attention before the end of level 1"
        return "granularity: overdone at the end of level 1" if name.kind == "upsampler-out" else None
    return "noise: the last resolution"


def _keeps_sd15(name: Name) -> str | None:
    late = name.kind in ("self-q", "self-k")
    if name.level == 0:
        return "granularity: 8 x 8 places are too few"
    if name.level == 1:
        if late:
            return "locality: self-attention in the first half of the up stage"
        return "granularity: overdone at the end of level 1" if name.kind == "upsampler-out" else None
    if name.level == 2:
        return "locality: self-attention before the end of level 2" if late and name.repeat != 2 else None
    return None if late else "noise: the last resolution, where only self-attention smooths"
