"""The timesteps that a scheduler of diffusers visits, obtained from the class itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from diffcore.denoiser.library import spaced
from diffcore.errors import MissingDependencyError


@dataclass(frozen=True)
class Grid:
    """A scheduler class of diffusers with its settings, as a comparable value.

    Classes space timesteps differently under the same name of spacing: some count the clean end as a step, some round,
    some follow their own list of noise levels.

    Attributes:
        class_name: Name of a scheduler class of diffusers.
        settings: Settings of the class as JSON text.
    """

    class_name: str
    settings: str = field(repr=False)

    @classmethod
    def of(cls, class_name: str, settings: Mapping[str, Any]) -> "Grid":
        """Returns the grid of a class under settings, which JSON can hold."""
        return cls(class_name, json.dumps(dict(settings), sort_keys=True))

    def times(self, steps: int) -> Float64[Tensor, "steps"]:
        """Returns the times at which `steps` steps begin, noisiest first.

        Classes that evaluate inside a step, or twice at its beginning, visit more.

        Raises:
            ValueError: The class has no such grid.
        """
        try:
            scheduler = spaced(self.class_name, json.loads(self.settings), steps)
        except MissingDependencyError:
            raise
        except Exception as error:  # each class has its own
            raise ValueError(f"`steps` is {steps}; {self.class_name} has no such grid: {error}") from error
        times = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)[:: scheduler.order].unique_consecutive()
        if len(times) == 1 < steps:  # so many that no whole number of timesteps lies between two of them
            raise ValueError(f"`steps` is {steps}; {self.class_name} puts them all at t = {float(times[0]):g}")
        return times
