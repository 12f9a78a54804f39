"""Attributes of a population's members: numbers or yes and no, with blanks for what is not known."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffcore.errors import UserError, printable


@dataclass(frozen=True)
class Labels:
    """Values of attributes, in the order of a space's members.

    Attributes:
        attributes: Names of the attributes.
        values: Value of each attribute for each member; NaN where it is not known.
    """

    attributes: tuple[str, ...]
    values: Float64[Tensor, "n k"]

    @classmethod
    def of(cls, members: Sequence[str], values: Mapping[str, Mapping[str, float] | Sequence[float]]) -> "Labels":
        """Returns the labels of some members.

        Args:
            members: Names of the members, in the order of the space.
            values: For each attribute its value by the member's name, or one value per member in their order.

        Raises:
            UserError: A name is no member's, or there are not as many values as members.

        Example:
            >>> Labels.of(["a", "b"], {"age": {"b": 40.0}}).values.tolist()
            [[nan], [40.0]]
        """
        places = {name: place for place, name in enumerate(members)}
        columns = []
        for attribute, given in values.items():
            column = torch.full((len(members),), torch.nan, dtype=torch.float64)
            if isinstance(given, Mapping):
                unknown = [name for name in given if name not in places]
                if unknown:
                    shown = ", ".join(printable(name) for name in unknown[:5])
                    raise UserError(f"{attribute!r} has labels of what is no member: {shown}; correct the names")
                for name, value in given.items():
                    column[places[name]] = float(value)
            else:
                if len(given) != len(members):
                    raise UserError(f"{attribute!r} has {len(given)} values for {len(members)} members; give one each")
                column[:] = torch.as_tensor(given, dtype=torch.float64)
            columns.append(column)
        if not columns:
            raise UserError("there are no attributes; give at least one")
        return cls(tuple(values), torch.stack(columns, 1))

    def known(self, attributes: Iterable[int]) -> Bool[Tensor, " n"]:
        """Returns the members of whom all of some attributes are known.

        Args:
            attributes: Places of the attributes.
        """
        return self.values[:, list(attributes)].isfinite().all(1)

    def binary(self, attribute: int) -> bool:
        """Returns whether an attribute has exactly two values.

        Args:
            attribute: Place of the attribute.
        """
        column = self.values[:, attribute]
        return len(column[column.isfinite()].unique()) == 2

    def require(self, fewest: int = 5, enough: int = 20) -> list[str]:
        """Returns warnings about attributes with few members on one side.

        Args:
            fewest: Number of members on each side below which an attribute is refused.
            enough: Number of members on each side below which it is warned about.

        Raises:
            UserError: An attribute is the same for all members, or known of too few.
        """
        notes = []
        for place, name in enumerate(self.attributes):
            column = self.values[self.known([place]), place]
            sides = column.unique(return_counts=True)
            if len(sides[0]) < 2:
                what = "no values" if len(column) == 0 else f"the value {float(column[0]):g} for all members"
                raise UserError(f"{name!r} has {what}; give labels that differ among members")
            count = int(sides[1].min()) if self.binary(place) else len(column) // 2
            if count < fewest:
                raise UserError(f"{name!r} has {count} members on one side; give at least {fewest}")
            if count < enough:
                notes.append(f"{name!r} has {count} members on one side: the direction is uncertain")
        return notes
