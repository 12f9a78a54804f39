"""The options of every command that computes with a model."""

from dataclasses import dataclass, field, replace

from cyclopts import Parameter

import diffcore.cli
from diffcore.cli import LoadingAny
from diffusion_featsel.app.options import Extraction


@Parameter(name="*")
@dataclass(frozen=True)
class Work(diffcore.cli.Work):
    """The options of every command that computes with a model, of any family.

    Attributes:
        loading: Options that say how the model is read.
    """

    script = "diffusion-featsel"
    loading: LoadingAny = field(default_factory=LoadingAny)

    def seeded(self, extraction: Extraction) -> Extraction:
        """Returns the options of an extraction with the seed of the command line.

        Args:
            extraction: Options of the command line.
        """
        return replace(extraction, seed=self.runtime.seed)
