"""Sets of value neurons, by the module that they are output channels of."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class NeuronSet:
    """A set of value neurons, equal to every other with the same neurons; made with `NeuronSet.of`.

    Attributes:
        layers: Module names in order, each with its channels in order; no layer is empty.
    """

    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, channels: Mapping[str, Iterable[int]]) -> "NeuronSet":
        """Returns the set of some channels of some modules.

        Raises:
            ValueError: A channel is negative.
        """
        layers = {name: tuple(sorted({int(index) for index in indices})) for name, indices in channels.items()}
        for name, indices in layers.items():
            if indices and indices[0] < 0:
                raise ValueError(f"{name}[{indices[0]}] is no neuron; channels start at 0")
        return cls(tuple(sorted((name, indices) for name, indices in layers.items() if indices)))

    @classmethod
    def from_json(cls, value: Any) -> "NeuronSet":
        """Returns the set that `to_json` wrote.

        Raises:
            ValueError: The value is no object of lists of whole numbers.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"neurons are {type(value).__name__}; expected an object, module name to channels")
        for name, indices in value.items():
            if not isinstance(indices, list) or any(type(index) is not int for index in indices):
                raise ValueError(f"neurons of {name} are not a list of whole numbers")
        return cls.of(value)

    def to_json(self) -> dict[str, list[int]]:
        """Returns module names, each with its channels."""
        return {name: list(indices) for name, indices in self.layers}

    def ablated(self, backbone: "nn.Module", *, scale: float = 0.0) -> AbstractContextManager[None]:
        """Ablates these neurons in a network while a block runs, and leaves it as it was.

        Args:
            backbone: A text-conditioned U-Net, such as `pipe.unet` of a diffusers pipeline.
            scale: Factor of the neurons' outputs; 0 ablates.

        Raises:
            IncompatibleModelError: A neuron is not in this network.

        Example:
            >>> from diffcore.testing import tiny
            >>> unet = tiny.pipeline("sd15").unet
            >>> with NeuronSet.of({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [0, 3]}).ablated(unet):
            ...     pass  # whatever runs here runs without these neurons
        """
        from nemo_localize.ablate import ablated

        return ablated(backbone, self, scale=scale)

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.layers)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, index) for name, indices in self.layers for index in indices)

    def __contains__(self, neuron: object) -> bool:
        return neuron in set(self)

    def __getitem__(self, module: str) -> tuple[int, ...]:
        """Returns the channels of a module; none for modules that the set does not touch."""
        return dict(self.layers).get(module, ())

    def union(self, *others: "NeuronSet") -> "NeuronSet":
        """Returns the neurons that are in any of the sets."""
        return _collected(neuron for group in (self, *others) for neuron in group)

    def minus(self, other: "NeuronSet") -> "NeuronSet":
        """Returns the neurons that are not in the other set."""
        excluded = set(other)
        return _collected(neuron for neuron in self if neuron not in excluded)


def _collected(neurons: Iterable[tuple[str, int]]) -> NeuronSet:
    channels: dict[str, set[int]] = {}
    for name, index in neurons:
        channels.setdefault(name, set()).add(index)
    return NeuronSet.of(channels)


NO_NEURONS = NeuronSet()
