"""How alike activations are: a matrix of linear CKA with the names of its rows."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor


@dataclass(frozen=True)
class Alignment:
    """Linear centred kernel alignment (CKA) of each pair of activations.

    Attributes:
        names: Names of the activations, in the order of rows and columns.
        matrix: Alignment of each pair, from 0 (nothing in common) to 1 (the same up to rotation and scale).

    Example:
        >>> import torch
        >>> alike = Alignment(("a", "b"), torch.tensor([[1.0, 0.3], [0.3, 1.0]]))
        >>> round(alike.of("b", "a"), 1)
        0.3
    """

    names: tuple[str, ...]
    matrix: Float[Tensor, "names names"]

    def of(self, one: str, other: str) -> float:
        """Returns the alignment of two activations; 0 where one of them was not compared, or is constant."""
        if one not in self.names or other not in self.names:
            return 0.0
        return float(self.matrix[self.names.index(one), self.names.index(other)].nan_to_num())

    def ordered(self) -> "Alignment":
        """Returns the matrix in the order of a clustering, in which activations that are alike stand side by side."""
        if len(self.names) < 3:
            return self
        apart = 1 - self.matrix.double().nan_to_num().cpu().numpy()
        apart = np.clip((apart + apart.T) / 2, 0, None)
        np.fill_diagonal(apart, 0)
        order = leaves_list(linkage(squareform(apart, checks=False), "average", optimal_ordering=True)).tolist()
        return Alignment(tuple(self.names[i] for i in order), self.matrix[order][:, order])
