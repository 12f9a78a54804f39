"""Tables per backbone class: which module's tensor has which of the paper's names.

A table is a list of rules. A rule matches the dotted name of a module, says which of its tensors is meant, and gives
the kind; the numbers inside the module's name become level, repeat and block. Blocks of transformers that are no U-Nets
count on where the blocks of another list end, as in Flux.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from diffcore.hooks import Site
from diffusion_featsel.names import BLOCK_KINDS, Name

TEXT_KINDS = ("cross-k", "cross-v")
"""Tensors of text tokens: they have no places in the image."""

_JOINT_KINDS = ("q", "k", "v", "map", "ffn-inner", "out")
_PAPER_KINDS = {
    *BLOCK_KINDS,
    *_JOINT_KINDS,
    *("in", "after-conv-in", "res-increment", "res-out", "vit-out", "downsampler-out", "upsampler-out"),
}


@dataclass(frozen=True)
class Place:
    """An activation that a backbone class has: its name and where it is in the network.

    Attributes:
        name: Parts of the paper's name.
        site: Place of the tensor; of a map, the output of the attention module that it is computed from.
        derived: Whether the activation is computed from what a module is given, as attention maps are.
        paper: Whether it is of a kind that the paper lists.
    """

    name: Name
    site: Site
    derived: bool = False
    paper: bool = False


@dataclass(frozen=True)
class _Rule:
    """Names the tensors of modules whose dotted name matches a pattern."""

    pattern: re.Pattern[str]
    kind: str
    at: str = "output"
    derived: bool = False
    stage: str = "vit"


@dataclass(frozen=True)
class Backbone:
    """What is known about a backbone class.

    Attributes:
        rules: Names of tensors by module.
        num_text: Usual number of text tokens, which decides nothing but the shares of cost.
        first_block: Returns by how much the block numbers of a module are shifted, from the network's lists of blocks.
    """

    rules: tuple[_Rule, ...]
    num_text: int = 77
    first_block: Callable[[str, dict[str, int]], int] = lambda module, lengths: 0

    def places(self, site: Site, lengths: dict[str, int]) -> list[Place]:
        """Returns the activations at a site: none for most, and two where a map is computed there.

        Args:
            site: One tensor of the network.
            lengths: Number of blocks in each list of the network.
        """
        return [
            self._place(rule, found, site, lengths)
            for rule in self.rules
            if rule.at == site.at and (found := rule.pattern.fullmatch(site.module))
        ]

    def _place(self, rule: _Rule, found: re.Match[str], site: Site, lengths: dict[str, int]) -> Place:
        parts = found.groupdict()
        level, repeat, block = (
            None if parts.get(key) is None else int(parts[key]) for key in ("level", "repeat", "block")
        )
        stage = parts.get("stage") or ("mid" if parts.get("mid") else rule.stage)
        if stage == "mid" and not rule.kind.startswith("res-") and repeat == 0:
            repeat = None
        if block is not None:
            block += self.first_block(site.module, lengths)
        elif rule.kind in _PLAIN_KINDS:
            block = 0
        name = Name(rule.kind, stage, level, repeat, block)
        return Place(name, site, rule.derived, rule.kind in _PAPER_KINDS)


_PLAIN_KINDS = ("self-q", "self-k", "self-v", "self-map", "norm-out")
_UNIT = r"(?:(?P<stage>down|up)_blocks\.(?P<level>\d+)|(?P<mid>mid)_block)"
_VIT = rf"{_UNIT}\.attentions\.(?P<repeat>\d+)"


def _rules(prefix: str, *rules: tuple[str, str, str] | tuple[str, str], stage: str = "vit") -> list[_Rule]:
    return [
        _Rule(re.compile(prefix + suffix), kind, *at, derived=kind in ("self-map", "cross-map", "map"), stage=stage)
        for suffix, kind, *at in rules
    ]


def _block_rules(prefix: str) -> list[_Rule]:
    """Returns the names inside a `BasicTransformerBlock`: self-attention, cross-attention and feed-forward."""
    return _rules(
        prefix,
        (r"\.attn1", "norm-out", "input"),
        (r"\.attn1\.to_q", "self-q"),
        (r"\.attn1\.to_k", "self-k"),
        (r"\.attn1\.to_v", "self-v"),
        (r"\.attn1", "self-map"),
        (r"\.attn1", "self-out"),
        (r"\.attn2\.to_q", "cross-q"),
        (r"\.attn2\.to_k", "cross-k"),
        (r"\.attn2\.to_v", "cross-v"),
        (r"\.attn2", "cross-map"),
        (r"\.attn2", "cross-out"),
        (r"\.ff\.net\.0", "ffn-inner"),
        (r"\.ff", "ffn-out"),
        ("", "out"),
    )


def _joint_rules(prefix: str) -> list[_Rule]:
    """Returns the names inside a block where image and text attend jointly (SD3, Flux)."""
    return _rules(
        prefix,
        (r"\.attn", "norm-out", "input"),
        (r"\.attn\.to_q", "q"),
        (r"\.attn\.to_k", "k"),
        (r"\.attn\.to_v", "v"),
        (r"\.attn\.norm_q", "q-normed"),
        (r"\.attn\.norm_k", "k-normed"),
        (r"\.attn", "map"),
        (r"\.attn", "attn-out"),
        (r"\.attn2\.to_q", "dual-q"),
        (r"\.attn2\.to_k", "dual-k"),
        (r"\.attn2\.to_v", "dual-v"),
        (r"\.attn2", "dual-out"),
        (r"\.ff\.net\.0", "ffn-inner"),
        (r"\.ff", "ffn-out"),
        ("", "out", "output[1]"),
    )


_SINGLE_RULES = _rules(
    r"single_transformer_blocks\.(?P<block>\d+)",
    (r"\.proj_mlp", "ffn-proj"),
    (r"\.act_mlp", "ffn-inner"),
    (r"\.attn", "norm-out", "input"),
    (r"\.attn\.to_q", "q"),
    (r"\.attn\.to_k", "k"),
    (r"\.attn\.to_v", "v"),
    (r"\.attn\.norm_q", "q-normed"),
    (r"\.attn\.norm_k", "k-normed"),
    (r"\.attn", "map"),
    (r"\.attn", "attn-out"),
    (r"\.proj_out", "proj-out"),
    ("", "out", "output[1]"),
)

_UNET_RULES = [
    *_rules("", ("conv_in", "in", "input"), ("conv_in", "after-conv-in"), stage="in"),
    *_rules("", ("conv_out", "out"), stage="out"),
    *_rules(r"(?P<stage>up)_blocks\.(?P<level>\d+)\.resnets\.(?P<repeat>\d+)", ("", "res-in", "input")),
    *_rules(
        rf"{_UNIT}\.resnets\.(?P<repeat>\d+)", (r"\.conv1", "res-inner"), (r"\.conv2", "res-increment"), ("", "res-out")
    ),
    *_block_rules(rf"{_VIT}\.transformer_blocks\.(?P<block>\d+)"),
    *_rules(_UNIT, (r"\.downsamplers\.0", "downsampler-out"), (r"\.upsamplers\.0", "upsampler-out")),
    # Attention without transformer blocks, as in unconditional U-Nets; a module that projects no query has no map.
    *_rules(_VIT, ("", "self-map")),
    *_rules(
        _VIT, (r"\.to_q", "norm-out", "input"), (r"\.to_q", "self-q"), (r"\.to_k", "self-k"), (r"\.to_v", "self-v")
    ),
    *_rules(_VIT, ("", "vit-out")),
]
_PATCHES = _rules("", ("pos_embed", "vit-in"), stage="in")
_BLOCKS = r"transformer_blocks\.(?P<block>\d+)"


def _after_double(module: str, lengths: dict[str, int]) -> int:
    return lengths.get("transformer_blocks", 0) if module.startswith("single_") else 0


BACKBONES: dict[str, Backbone] = {
    "UNet2DConditionModel": Backbone(tuple(_UNET_RULES)),
    "UNet2DModel": Backbone(tuple(_UNET_RULES), num_text=0),
    "PixArtTransformer2DModel": Backbone((*_PATCHES, *_block_rules(_BLOCKS)), num_text=120),
    "DiTTransformer2DModel": Backbone((*_PATCHES, *_block_rules(_BLOCKS)), num_text=0),
    "SD3Transformer2DModel": Backbone((*_PATCHES, *_joint_rules(_BLOCKS)), num_text=333),
    "FluxTransformer2DModel": Backbone(
        (*_rules("", ("x_embedder", "vit-in"), stage="in"), *_joint_rules(_BLOCKS), *_SINGLE_RULES),
        num_text=512,
        first_block=_after_double,
    ),
}
"""What is known about each backbone class of the diffusers library that has the paper's names."""
