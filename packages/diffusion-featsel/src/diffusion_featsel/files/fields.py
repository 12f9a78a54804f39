"""Reading fields of untrusted JSON objects, with messages that name the file and the field."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.errors import UserError, printable
from diffcore.io.strictjson import StrictError, parse, read_limited


def read_json(path: Path, max_bytes: int) -> Any:
    """Returns the value of a JSON file.

    Raises:
        UserError: The file is missing, too large, or no JSON.
    """
    if not path.is_file():
        raise UserError(f"{printable(path, 300)} does not exist; check that the data set is complete")
    try:
        return parse(read_limited(path, max_bytes))
    except StrictError as error:
        raise UserError(f"{printable(path, 300)} {error}; get a clean copy of the data set") from None


class Fields:
    """One object of a JSON file.

    Args:
        value: Value that should be an object.
        where: Words for messages: the file, and the place within it.
    """

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is no object; get a clean copy of the data set")
        self.value = value

    def text(self, name: str) -> str:
        """Returns a field that is text."""
        value = self.value.get(name)
        return value if isinstance(value, str) else self._refuse(name, "text")

    def points(self, name: str) -> Float[Tensor, "points 2"]:
        """Returns a field that is a list of positions [x, y]."""
        value = self.value.get(name)
        if not _rows(value, 2):
            self._refuse(name, "a list of positions [x, y]")
        return torch.tensor(value, dtype=torch.float32).view(-1, 2)

    def box(self, name: str) -> tuple[float, float, float, float]:
        """Returns a field that is a box [left, top, right, bottom]."""
        value = self.value.get(name)
        if not _rows([value], 4):
            self._refuse(name, "a box [left, top, right, bottom]")
        left, top, right, bottom = (float(number) for number in self.value[name])
        return left, top, right, bottom

    def size(self, name: str) -> tuple[int, int]:
        """Returns height and width of a field that is a size [width, height], with or without channels."""
        value = self.value.get(name)
        sized = isinstance(value, list) and len(value) in (2, 3) and all(type(n) is int and n > 0 for n in value)
        if not sized:
            self._refuse(name, "a size [width, height] in pixels")
        return self.value[name][1], self.value[name][0]

    def has(self, name: str) -> bool:
        """Returns whether there is such a field, and it is not null."""
        return self.value.get(name) is not None

    def _refuse(self, name: str, kind: str) -> NoReturn:
        raise UserError(f"{self.where}: `{name}` is not {kind}; get a clean copy of the data set")


def inside(root: Path, name: str, where: str) -> str:
    """Returns the path of a file of a data set, relative to its folder.

    Args:
        root: Folder of the data set.
        name: Path as a file of the data set writes it, relative or below the folder.
        where: Words for the message: the file that holds the path.

    Raises:
        UserError: The path leads out of the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() and path.is_relative_to(PurePosixPath(root.resolve().as_posix())):
        path = path.relative_to(PurePosixPath(root.resolve().as_posix()))
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{where}: the path {printable(name)!r} leads out of {printable(root)}; give the right folder")
    return str(path)


def _rows(value: Any, length: int) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(row, list) and len(row) == length and all(type(n) in (int, float) for n in row) for row in value
    )
