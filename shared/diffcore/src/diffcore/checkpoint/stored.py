"""Tensors in files by name: shapes are known at once, values are read when asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffcore.checkpoint.stated import MARKERS
from diffcore.errors import IncompatibleModelError, MachineError, UserError, printable
from diffcore.io.tensorfile import TensorHeader

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Stored:
    """The tensors of a component's weight files.

    Attributes:
        where: The folder or file, named in messages.
        shapes: Shapes of the tensors by name.
        floating: Names of the tensors that hold floating point numbers.
        read: Yields names and values of the tensors asked for, on the CPU.
    """

    where: Path
    shapes: Mapping[str, tuple[int, ...]]
    floating: frozenset[str]
    read: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]

    def restricted(self, names: Iterable[str]) -> "Stored":
        """Returns a copy with some of the tensors only."""
        return replace(self, shapes={name: self.shapes[name] for name in names})


def stored_in(headers: Iterable[TensorHeader], where: Path) -> Stored:
    """Returns the tensors of checked safetensors files."""
    headers = tuple(headers)
    entries = {name: entry for header in headers for name, entry in header.tensors.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        wanted = set(names)
        for header in headers:
            try:
                with safe_open(header.path, framework="pt", device="cpu") as file:
                    for name in header.tensors:
                        if name in wanted:
                            yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"cannot read {printable(header.path, 300)}: {printable(error)}; copy it again"
                ) from error

    shapes = {name: entry.shape for name, entry in entries.items()}
    floating = frozenset(name for name, entry in entries.items() if entry.dtype in _FLOATS)
    return Stored(where, shapes, floating, read)


def unpickled(path: Path) -> Stored:
    """Returns the tensors of a checkpoint that the user trusts, read by torch's restricted unpickler.

    Raises:
        IncompatibleModelError: The file holds other objects than tensors in dictionaries, or tensors larger than their
            storage.
        MachineError: This version of torch is too old to unpickle safely.
    """
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise MachineError(
            f"torch {torch.__version__} reads pickles unsafely; `allow_pickle=True` needs torch 2.10 or newer"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # the unpickler, zip and torch each have their own
        raise IncompatibleModelError(
            f"{printable(path, 300)} holds more than tensors, or is damaged ({printable(error)}); "
            "get the model in safetensors"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and content):
        raise IncompatibleModelError(f"{printable(path, 300)} is no dictionary of tensors; get it in safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            if isinstance(tensor, int | float) and name in MARKERS:
                tensors[name] = torch.tensor(tensor)
                continue
            if isinstance(tensor, int | float | str):
                continue  # counters of the training
            raise IncompatibleModelError(
                f"{printable(path, 300)} holds {printable(name)}, which is no plain tensor; get it in safetensors"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise IncompatibleModelError(
                f"{printable(path, 300)} has tensor {printable(name)!r}, larger than its bytes; get a clean copy"
            )
        tensors[name] = tensor
    return Stored(
        path,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        frozenset(name for name, tensor in tensors.items() if tensor.is_floating_point()),
        lambda names: ((name, tensors[name]) for name in names),
    )
