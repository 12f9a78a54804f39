"""Low-rank changes of weights (LoRA) as immutable values: the change of a weight W is alpha / rank * up @ down."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.adapters.keys import BACKBONE

Backbone = Literal["unet", "transformer"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one weight: `alpha / rank * up @ down`.

    Attributes:
        down: Factor from the inputs to the rank; for convolutions with the kernel's sides.
        up: Factor from the rank to the outputs.
        alpha: Strength of the change; at alpha = rank it is `up @ down`.
    """

    down: Float[Tensor, "rank inputs *kernel"]
    up: Float[Tensor, "outputs rank"]
    alpha: float

    @classmethod
    def from_difference(cls, difference: Float[Tensor, "outputs inputs *kernel"]) -> "LowRank":
        """Returns exact factors of a difference of weights, with one rank for each row or column that is not zero.

        The nonzero rows or columns, whichever are fewer, are one factor, and the other holds ones and zeros: the
        product equals the difference bit by bit.

        Raises:
            ValueError: The difference is zero.
        """
        matrix = difference.flatten(1)
        rows, columns = matrix.any(1).nonzero()[:, 0], matrix.any(0).nonzero()[:, 0]
        if len(rows) == 0:
            raise ValueError("the difference is zero: there is nothing to write as a product")
        if len(rows) <= len(columns):
            down, up = matrix[rows], _ones_at(rows, matrix.shape[0], matrix).T
        else:
            down, up = _ones_at(columns, matrix.shape[1], matrix), matrix[:, columns]
        return cls(down.reshape(-1, *difference.shape[1:]).contiguous(), up.contiguous(), float(down.shape[0]))

    @property
    def rank(self) -> int:
        """Number of rows of `down` and of columns of `up`."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that is changed."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "outputs inputs *kernel"]:
        """Returns the change itself, computed in `dtype`."""
        product = (self.alpha / self.rank * self.up.to(dtype)) @ self.down.to(dtype).flatten(1)
        return product.reshape(self.shape)

    def relative_error(self, other: "LowRank") -> float:
        """Returns the Frobenius norm of the difference to another change of the same weight, divided by this one's.

        Computed through the factors in float64: the products are never formed.
        """
        scaled = [(c.alpha / c.rank * c.up.double(), c.down.double().flatten(1)) for c in (self, other)]
        (up, down), (other_up, other_down) = scaled
        apart = _norm_of_product(torch.cat([up, -other_up], 1), torch.cat([down, other_down]))
        own = _norm_of_product(up, down)
        return apart / own if own > 0 else (0.0 if apart == 0 else math.inf)


Changes = Mapping[str, LowRank]
"""Changes of one network's weights, by dotted module name."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA: low-rank changes of a backbone's weights, and perhaps of its text encoders'.

    Attributes:
        modules: Low-rank changes of the backbone by module name.
        text_encoders: Changes of text encoders, by their name in the pipeline.
        backbone: Name of the backbone in the pipeline, "unet" or "transformer".
        name: The adapter's name in messages and reports.
    """

    modules: Changes
    text_encoders: Mapping[str, Changes] = field(default_factory=dict)
    backbone: Backbone = "unet"
    name: str = "adapter"

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        *,
        alpha: float | None = None,
        backbone: Backbone = "unet",
        name: str = "adapter",
    ) -> "Adapter":
        """Returns an adapter of a backbone from pairs (down, up) by module name.

        Args:
            factors: Pairs of `down` with shape (rank, inputs, ...) and `up` with shape (outputs, rank), by module name.
            alpha: One alpha for all modules; by default each module's rank, so that the change is `up @ down`.
            backbone: Name of the backbone in the pipeline, "unet" or "transformer".
            name: The adapter's name in messages and reports.
        """
        modules = {
            module: LowRank(down, up, float(down.shape[0] if alpha is None else alpha))
            for module, (down, up) in factors.items()
        }
        return cls(modules, backbone=backbone, name=name)

    @classmethod
    def from_differences(
        cls, differences: Mapping[str, Tensor], *, backbone: Backbone = "unet", name: str = "adapter"
    ) -> "Adapter":
        """Returns the exact adapter of differences "edited weight - weight", by module name.

        The rank of a module is the number of its rows (or columns, if fewer) that differ, which is small for edits of a
        few outputs or inputs. Modules without any difference are left out.

        Raises:
            ValueError: All differences are zero.
        """
        modules = {module: LowRank.from_difference(d) for module, d in differences.items() if bool(d.any())}
        if not modules:
            raise ValueError("no module differs: there is nothing to make an adapter of")
        return cls(modules, backbone=backbone, name=name)

    @property
    def components(self) -> dict[str, Changes]:
        """Every network's changes: "backbone" first, then the text encoders; none of them empty."""
        parts = {BACKBONE: self.modules, **dict(sorted(self.text_encoders.items()))}
        return {component: changes for component, changes in parts.items() if changes}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names, alphas and every number, whatever file they came from."""
        digest = hashlib.sha256(self.backbone.encode())
        for component, module, change in self:
            digest.update(f"{component} {module} {change.alpha!r}".encode())
            for factor in (change.down, change.up):
                digest.update(f"{factor.dtype} {list(factor.shape)}".encode())
                digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[str, str, LowRank]]:
        """Yields (component, module, change), sorted by name within each component."""
        for component, changes in self.components.items():
            for module in sorted(changes):
                yield component, module, changes[module]


def _norm_of_product(up: Tensor, down: Tensor) -> float:
    # Orthogonal parts change no norm, so those of the two triangles remain.
    return float((torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T).norm())


def _ones_at(places: Tensor, length: int, like: Tensor) -> Tensor:
    """Returns one-hot rows."""
    return like.new_zeros(len(places), length).scatter_(1, places[:, None], 1)
