"""The options of every command that computes with a model, and what they make of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

import diffcore.cli
from diffcore.cli import Job
from diffcore.errors import printable
from nemo_localize.app.options import Computing
from nemo_localize.settings import StepSettings

if TYPE_CHECKING:
    from diffcore.data.prompts import PromptSet
    from diffcore.models import DiffusionModel
    from nemo_localize.first_step import FirstStep

# Options that name files of earlier runs; the run records digests of their contents among its inputs.
FOUND_BEFORE = ("statistics", "calibration", "neurons", "import")


@Parameter(name="*")
@dataclass(frozen=True)
class Work(diffcore.cli.Work):
    """The options of every command that computes with a model.

    Attributes:
        computing: Options that say which layers are looked at, and how much is computed at once.
    """

    script = "nemo-localize"
    computing: Computing = field(default_factory=Computing)

    def first_step(self, model: "DiffusionModel", step: StepSettings) -> "FirstStep":
        """Returns the step that captions are judged by."""
        from nemo_localize.first_step import FirstStep

        return FirstStep(model, step, batch_size=self.computing.batch_size, up=self.computing.up)

    def run_of(
        self,
        verb: str,
        model: "DiffusionModel",
        captions: "Sequence[PromptSet]",
        options: Mapping[str, Any],
        **inputs: str,
    ) -> Job:
        """Returns the job of a command that reads captions.

        Args:
            verb: Name of the command.
            model: Model that it computes with.
            captions: Lists of captions that it reads.
            options: Options of the command itself, as on its command line; they replay the run.
            inputs: Digests of whatever else it reads, by name.
        """
        files = {printable(part.path.name): part.sha256 for part in captions}
        own = {**options, "computing": self.computing}
        return self.job(verb, model, own, files | inputs, FOUND_BEFORE)
