"""Members of a population that are one adapter, whatever factors they were written with.

Two adapters are one where the Frobenius norm of the difference of their changes B A is below a thousandth of that of
the first. Sketches find the pairs that are worth that comparison: sums over the modules of p^T B A q, for random p and
q, whose mean square is the squared norm of the change, and which no gauge touches.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from w2w_space.files.population import PopulationFolder
from w2w_space.products import relative_distance

SAME = 1e-3
"""Relative distance of two changes below which they are one adapter."""
_PROBES = 8
_NEAR = 10 * SAME  # distance of two sketches, relative to the norm, beyond which their adapters are not the same


class Duplicates:
    """Tells whether an adapter is a member already, of a population on disk and of vectors that are on their way there.

    Attributes:
        fresh: Vectors that are not on disk yet, by name, in the order in which they came.
    """

    def __init__(self, population: PopulationFolder) -> None:
        """Reads or computes the sketches of the members.

        Args:
            population: Population as it is on disk.
        """
        self._population, self._layout = population, population.layout
        generator = torch.Generator().manual_seed(0)

        def drawn(side: int) -> Tensor:
            return torch.randn(_PROBES, side, generator=generator)

        self._probes = [(drawn(inputs), drawn(outputs)) for inputs, outputs in self._layout.sides]
        self.fresh: dict[str, Tensor] = {}
        self._names = list(population.names)
        self._sketches = [
            torch.tensor(member.sketch) if member.sketch else self.sketch(population.rows([place])[0])
            for place, member in enumerate(population.members)
        ]

    def sketch(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " _"]:
        """Returns the sketch of an adapter.

        Args:
            vector: Vector in the layout of the population.
        """
        total = torch.zeros(_PROBES)
        for module, span in enumerate(self._layout.spans):
            down, up = self._layout.split(vector[span], module)
            inputs, outputs = self._probes[module]
            total += ((inputs @ down.T) * (outputs @ up)).sum(1)
        return total

    def twin(
        self, vector: Float[Tensor, " size"], sketch: Float[Tensor, " _"], *, other_than: str | None = None
    ) -> str | None:
        """Returns the name of the member whose changes are those of a vector; None where there is none.

        Args:
            vector: Vector in the layout of the population.
            sketch: Sketch of the vector.
            other_than: Name of a member that does not count, as it is about to be replaced.
        """
        if not self._sketches:
            return None
        apart = (torch.stack(self._sketches) - sketch).abs().amax(1)
        for near in (apart <= _NEAR * float(sketch.norm()) / math.sqrt(_PROBES)).nonzero()[:, 0].tolist():
            name = self._names[near]
            if name == other_than:
                continue
            place = self._population.names.index(name) if name not in self.fresh else -1
            other = self.fresh[name] if name in self.fresh else self._population.rows([place])[0]
            if relative_distance(self._layout, vector, other) < SAME:
                return name
        return None

    def add(self, name: str, vector: Float[Tensor, " size"], sketch: Float[Tensor, " _"]) -> None:
        """Remembers a vector that is on its way to the disk.

        Args:
            name: Name of the new member.
            vector: Vector in the layout of the population.
            sketch: Sketch of the vector.
        """
        self.fresh[name] = vector
        self._names.append(name)
        self._sketches.append(sketch)

    def forget(self, name: str) -> None:
        """Forgets a member that is replaced.

        Args:
            name: Name of the member on disk.
        """
        place = self._names.index(name)
        del self._names[place], self._sketches[place]

    def written(self, population: PopulationFolder) -> None:
        """Forgets the fresh vectors, which are on disk.

        Args:
            population: Population that holds them, after all members before.
        """
        self._population = population
        self.fresh.clear()
