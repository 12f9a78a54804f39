"""The stored tensor behind each tensor of a module, under current names and those of earlier library versions."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Shape = tuple[int, ...]
Change = Literal["none", "transpose", "flatten", "first third", "second third", "last third"]
_THIRDS = {"first third": 0, "second third": 1, "last third": 2}


@dataclass(frozen=True)
class Piece:
    """A tensor of a module as a file stores it.

    Attributes:
        name: The tensor's name in the file.
        change: Operation that turns the stored tensor into the module's: a transpose, dropping all but the first two
            sides (of a 1x1 convolution kept as a matrix), or taking one of three parts stacked along the first side.
    """

    name: str
    change: Change = "none"

    def shape(self, stored: Shape) -> Shape | None:
        """Returns the shape after the change; None if the stored shape does not allow it."""
        if self.change == "none":
            return stored
        if self.change == "transpose":
            return stored[::-1] if len(stored) == 2 else None
        if self.change == "flatten":
            return stored[:2] if stored[2:] in ((), (1, 1)) else None
        return (stored[0] // 3, *stored[1:]) if stored and stored[0] % 3 == 0 else None

    def apply(self, stored: Tensor) -> Tensor:
        """Returns the tensor after the change."""
        if self.change == "none":
            return stored
        if self.change == "transpose":
            return stored.T
        if self.change == "flatten":
            return stored.reshape(stored.shape[:2])
        return stored.chunk(3)[_THIRDS[self.change]]


Naming = Callable[[Collection[str], Collection[str]], dict[str, Piece]]
"""(names in the module, names in the files) -> where each of the module's tensors comes from."""

_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def folder_names(module: Collection[str], stored: Collection[str]) -> dict[str, Piece]:
    """Returns the pieces of a module saved under its own names, or those of an earlier version of its library.

    Text encoders once had, or lacked, a level `text_model`; attention in autoencoders had other names.
    """
    return {name: Piece(next((c for c in _candidates(name) if c in stored), name)) for name in module}


def _candidates(name: str) -> Iterable[str]:
    yield name
    yield name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
    for new, old in _OLD_ATTENTION.items():
        if new in name:
            yield name.replace(new, old)


HARMLESS = re.compile(
    r"(.*\.)?position_ids|encoder\.embed_tokens\.weight|v_pred|ztsnr|logit_scale|(text|visual)_projection\.weight|"
    r"vision_model\..+"
)
"""Tensors that folders carry and modules rebuild, share or never use, and markers, which are heard before."""
