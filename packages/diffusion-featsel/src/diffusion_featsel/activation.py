"""An activation: a tensor inside a diffusion model with its name, its place in the network, and its cost."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffcore.hooks import Site
from diffcore.hooks.sites import Axes


@dataclass(frozen=True)
class Activation:
    """One tensor inside a network, under the name that the paper gives it.

    Attributes:
        name: The paper's name, such as "up-level1-repeat0-vit-block0-cross-q".
        site: The tensor's place in the network, as `diffcore.hooks.capture` takes it.
        kind: Word for what the tensor is, such as "res-out" or "cross-q".
        stage: Part of the network: "in", "down", "mid", "up", "vit" (transformers), or "out".
        level: Number of the resolution within the stage, in order of execution; None where there is none.
        repeat: Number of the residual block or transformer within the level.
        block: Number of the transformer block within the repeat.
        axes: Meaning of each dimension of `shape`.
        shape: Shape of one row of the tensor at the site.
        channels: Number of channels, over all heads.
        grid: Rows and columns of image places; None for tensors without places, such as text.
        num_text: Number of text tokens, which come before the image places where there are both.
        flops: Floating point operations of the forward pass up to the tensor, for one row.
        cost: Share of the whole forward pass's operations up to the tensor, from 0 to 1.
        same_as: Name of an earlier activation that is the very same tensor, if there is one.
        derived: Whether it is computed from what a module is given, as attention maps are; `site` is then the module
            after which it can be computed, and `attention_maps` returns it, reduced.
        paper: Whether it is of a kind that the paper lists.
        modules: Attention modules that it is computed from, where there are several.

    Example:
        >>> import torch
        >>> from diffcore.hooks import Site
        >>> site = Site("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> name, axes = "mid-vit-block0-self-q", "tokens channels"
        >>> queries = Activation(name, site, "self-q", "mid", axes=axes, shape=(6, 8), channels=8, grid=(2, 3))
        >>> tuple(queries.map(torch.rand(5, 6, 8)).shape)
        (5, 8, 2, 3)
    """

    name: str
    site: Site
    kind: str
    stage: str
    level: int | None = None
    repeat: int | None = None
    block: int | None = None
    axes: Axes = "channels height width"
    shape: tuple[int, ...] = ()
    channels: int = 0
    grid: tuple[int, int] | None = None
    num_text: int = 0
    flops: int = 0
    cost: float = 0.0
    same_as: str | None = None
    derived: bool = False
    paper: bool = False
    modules: tuple[str, ...] = ()

    @property
    def numbers(self) -> int:
        """Count of numbers in the image part of one row: channels times places, and all of a map's."""
        if self.derived:
            return math.prod(self.shape)
        height, width = self.grid or (0, 0)
        return self.channels * height * width

    @property
    def megabytes(self) -> float:
        """Size of one row in MiB, in half precision."""
        return self.numbers * 2 / 2**20

    def map(self, tensor: Float[Tensor, "b *shape"]) -> Float[Tensor, "b c h w"]:
        """Returns the tensor at the site as a map of channels, without its text tokens.

        Args:
            tensor: Rows of the tensor at `site`.

        Raises:
            ValueError: The tensor has no places of an image, or was made for images of another size.
        """
        if self.grid is None:
            raise ValueError(f"{self.name} has no image places: it is text, or one vector per image")
        height, width = self.grid
        if self.axes == "channels height width":
            if tuple(tensor.shape[2:]) != self.grid:
                raise ValueError(f"{self.name} has {tuple(tensor.shape[2:])} places, and {self.grid} in the inventory")
            return tensor
        if self.axes == "heads tokens channels":
            tensor = tensor.transpose(1, 2)
        tokens = tensor.flatten(2) if tensor.ndim == 4 else tensor
        # Text comes first, and prompts may be longer or shorter than in the inventory.
        places = tokens[:, -height * width :] if self.num_text else tokens
        if places.shape[1] != height * width:
            raise ValueError(f"{self.name} has {places.shape[1]} places, and {height}x{width} in the inventory")
        return places.transpose(1, 2).unflatten(2, self.grid)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON and CSV."""
        row = {key: value for key, value in vars(self).items() if key != "site"}
        height, width = self.grid or (None, None)
        return row | {
            "module": self.site.module,
            "at": self.site.at,
            "height": height,
            "width": width,
            "megabytes": self.megabytes,
        }
