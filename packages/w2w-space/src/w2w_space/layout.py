"""Adapters as vectors: which numbers of which module stand where, in an explicit table that a space keeps.

An adapter changes the weights W_j of some modules by B_j A_j, with A_j of shape (rank, inputs) and B_j of shape
(outputs, rank). Its vector theta holds, module by module in the order of the table, the numbers of A_j row by row, then
those of B_j row by row (paper, section 3.1; the published code sorts modules by name and takes rank 1). Scales
alpha / rank are folded into B_j.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.adapters import Adapter, LowRank
from diffcore.errors import IncompatibleModelError, printable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The table of a population's vectors; equal by value.

    Attributes:
        modules: Names of the changed modules, in the order of the vector.
        shapes: Shape of each module's weight: (outputs, inputs), for convolutions with the sides of the kernel.
        rank: Rank of every module's change.
        backbone: Name of the network in its pipeline, "unet" or "transformer".
    """

    modules: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rank: int
    backbone: Literal["unet", "transformer"] = "unet"

    @classmethod
    def of(cls, shapes: Mapping[str, Shape], rank: int, backbone: Literal["unet", "transformer"] = "unet") -> "Layout":
        """Returns the table of some modules, sorted by name.

        Args:
            shapes: Shape of the weight of each module, by name.
            rank: Rank of every change.
            backbone: Name of the network in its pipeline.

        Example:
            >>> Layout.of({"to_v": (4, 3), "to_q": (2, 3)}, rank=1).size
            12
        """
        names = tuple(sorted(shapes))
        return cls(names, tuple(tuple(shapes[name]) for name in names), rank, backbone)

    @cached_property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each module; of a convolution, inputs are channels times the kernel's cells."""
        return tuple((math.prod(shape[1:]), shape[0]) for shape in self.shapes)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Place of each module's numbers in the vector."""
        ends = [0]
        for inputs, outputs in self.sides:
            ends.append(ends[-1] + self.rank * (inputs + outputs))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @property
    def size(self) -> int:
        """Length of a vector."""
        return self.spans[-1].stop if self.spans else 0

    def split(
        self, block: Float[Tensor, "*b numbers"], module: int
    ) -> tuple[Float[Tensor, "*b rank inputs"], Float[Tensor, "*b outputs rank"]]:
        """Returns the factors (A, B) of one module from its numbers, as views.

        Args:
            block: Numbers of that module alone, in the last dimension.
            module: Place of the module in the table.
        """
        (inputs, outputs), shape = self.sides[module], block.shape[:-1]
        down, up = block.split([self.rank * inputs, self.rank * outputs], -1)
        return down.reshape(*shape, self.rank, inputs), up.reshape(*shape, outputs, self.rank)

    def factors(self, vectors: Float[Tensor, "*b size"]) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the factors (A, B) of each module, by its name, as views.

        Args:
            vectors: One vector or a batch of vectors.
        """
        return {
            name: self.split(vectors[..., span], place)
            for place, (name, span) in enumerate(zip(self.modules, self.spans, strict=True))
        }

    def vector(self, adapter: Adapter) -> Float[Tensor, " size"]:
        """Returns the vector of an adapter in float32, its scales folded into B.

        Args:
            adapter: Adapter with this rank; modules that it lacks are zero.

        Raises:
            IncompatibleModelError: The adapter changes other modules, or has other shapes or ranks.
        """
        unknown = sorted(set(adapter.modules) - set(self.modules))
        if unknown:
            raise IncompatibleModelError(
                f"{printable(adapter.name)} changes {unknown[0]!r}, which is not among the {len(self.modules)} modules "
                "of this population; give adapters of the same layers, or import them with fewer modules"
            )
        parts = []
        for name, shape, (inputs, outputs) in zip(self.modules, self.shapes, self.sides, strict=True):
            change = adapter.modules.get(name)
            if change is None:
                parts.append(torch.zeros(self.rank * (inputs + outputs)))
                continue
            if change.shape != shape or change.rank != self.rank:
                raise IncompatibleModelError(
                    f"{printable(adapter.name)} has rank {change.rank} and shape {change.shape} in {name!r}, where "
                    f"rank {self.rank} and {shape} are needed"
                )
            up = change.up.float() * (change.alpha / change.rank)
            parts += [change.down.float().flatten(), up.flatten()]
        return torch.cat(parts)

    def adapter(self, vector: Float[Tensor, " size"], name: str = "adapter") -> Adapter:
        """Returns the adapter of a vector, with alpha = rank, so that the change is B A.

        Args:
            vector: Vector in this layout.
            name: Name of the adapter in messages.

        Example:
            >>> layout = Layout.of({"to_q": (2, 3)}, rank=1)
            >>> layout.vector(layout.adapter(torch.arange(5.0))).tolist()
            [0.0, 1.0, 2.0, 3.0, 4.0]
        """
        changes = {}
        for (module, (down, up)), shape in zip(self.factors(vector).items(), self.shapes, strict=True):
            kernel = down.reshape(self.rank, *shape[1:])
            changes[module] = LowRank(kernel.contiguous(), up.contiguous(), float(self.rank))
        return Adapter(changes, backbone=self.backbone, name=name)

    def blocks(self, size: int = 8192) -> list[range]:
        """Returns ranges of modules that follow one another, each with at most so many numbers, or one module.

        Args:
            size: Largest number of numbers in a range of several modules.
        """
        found: list[range] = []
        start = 0
        for place, span in enumerate(self.spans):
            if place > start and span.stop - self.spans[start].start > size:
                found.append(range(start, place))
                start = place
        return [*found, range(start, len(self.modules))] if self.modules else []

    def span(self, modules: range) -> slice:
        """Returns the place in the vector of modules that follow one another.

        Args:
            modules: Range of places in the table, not empty.
        """
        return slice(self.spans[modules[0]].start, self.spans[modules[-1]].stop)

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain values."""
        return {
            "backbone": self.backbone,
            "rank": self.rank,
            "modules": dict(zip(self.modules, self.shapes, strict=True)),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Layout":
        """Returns the table that `to_json` wrote."""
        modules = values["modules"]
        shapes = tuple(tuple(int(side) for side in shape) for shape in modules.values())
        return cls(tuple(modules), shapes, int(values["rank"]), values["backbone"])


def common_layout(adapters: Iterable[Adapter], rank: int, *, convolutions: bool = False) -> Layout:
    """Returns the table of the modules that all adapters change.

    Args:
        adapters: Adapters of one kind of backbone.
        rank: Rank of every change; see `ranks.at_rank`.
        convolutions: Whether to take convolutions too.

    Raises:
        IncompatibleModelError: Two adapters change weights of other shapes, or no module is changed by all.
    """
    known: dict[str, Shape] = {}
    shared: set[str] | None = None
    backbone: Literal["unet", "transformer"] | None = None
    for adapter in adapters:
        backbone = backbone or adapter.backbone
        shapes = {name: change.shape for name, change in adapter.modules.items()}
        for name, shape in shapes.items():
            if known.setdefault(name, shape) != shape:
                raise IncompatibleModelError(
                    f"{printable(adapter.name)} changes {name!r} of shape {shape}, others of shape {known[name]}: "
                    "they are adapters of different base models"
                )
        own = {name for name, shape in shapes.items() if convolutions or len(shape) == 2}
        shared = own if shared is None else shared & own
    if not shared:
        raise IncompatibleModelError("no module is changed by all adapters; give adapters of the same base model")
    return Layout.of({name: known[name] for name in shared}, rank, backbone or "unet")
