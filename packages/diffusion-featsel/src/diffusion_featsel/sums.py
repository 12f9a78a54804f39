"""Sums over images: the state of all streaming measurements, which adds up over batches and over processes."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Sums:
    """A group of tensors that are sums over images; a subclass names them and says how a batch enters.

    Example:
        >>> @dataclass
        ... class Total(Sums):
        ...     values: Tensor
        >>> total = Total(torch.zeros(2, dtype=torch.float64))
        >>> total.load(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> total.values.tolist()
        [1.0, 2.0]
    """

    def tensors(self) -> Iterator[Tensor]:
        """Yields all sums, those of nested groups too."""
        for field in fields(self):
            value = getattr(self, field.name)
            for part in value.values() if isinstance(value, dict) else [value]:
                if isinstance(part, Sums):
                    yield from part.tensors()
                elif isinstance(part, Tensor):
                    yield part

    def flat(self) -> Tensor:
        """Returns all sums in one vector, to be stored or sent."""
        return torch.cat([tensor.flatten() for tensor in self.tensors()])

    def load(self, flat: Tensor) -> None:
        """Adds the sums of a vector that `flat` returned.

        Args:
            flat: Vector of a group with the same sizes.

        Raises:
            ValueError: The vector has another length.
        """
        own = list(self.tensors())
        sizes = [tensor.numel() for tensor in own]
        if sum(sizes) != len(flat):
            raise ValueError(f"the sums have {sum(sizes)} numbers, and the vector has {len(flat)}")
        for tensor, part in zip(own, flat.split(sizes), strict=True):
            tensor += part.view(tensor.shape).to(tensor.device)

    def merge(self, other: "Sums") -> None:
        """Adds the sums of another part of the images.

        Args:
            other: Sums of the same kind and sizes.
        """
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs.to(mine.device)


def zeros(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns an empty sum in float64, or in float32 on devices without it.

    Args:
        shape: Sizes of the dimensions.
        device: Device that the sum is kept on.
    """
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(shape, dtype=dtype, device=device)
