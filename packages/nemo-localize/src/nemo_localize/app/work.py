"""What commands that compute with a model share: their options, loading the model, and the job that owns the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from diffcore.cli import Job, Output, settings
from diffcore.errors import printable
from diffcore.runtime import Runtime
from nemo_localize.app.options import Loading
from nemo_localize.settings import StepSettings

if TYPE_CHECKING:
    from diffcore.data.prompts import PromptSet
    from diffcore.models import DiffusionModel
    from nemo_localize.first_step import FirstStep

# Options that name files of earlier runs; the run records digests of their contents among its inputs.
FOUND_BEFORE = ("statistics", "calibration", "neurons", "import")


@Parameter(name="*")
@dataclass(frozen=True)
class Work:
    """The options of every command that computes with a model.

    Attributes:
        loading: Options that say how the model is read.
        runtime: Options that say where it runs.
        output: Options that say where results go.
    """

    loading: Loading = field(default_factory=Loading)
    runtime: Runtime = field(default_factory=Runtime)
    output: Output = field(default_factory=Output)

    def load(self, model: str) -> "DiffusionModel":
        """Returns the model, on its device."""
        from diffcore.models import load

        self.runtime.apply_threads()
        loading = self.loading
        return load(model, self.runtime, download=loading.download, tokenizer=loading.tokenizer, like=loading.like)

    def first_step(self, model: "DiffusionModel", step: StepSettings) -> "FirstStep":
        """Returns the step that captions are judged by."""
        from nemo_localize.first_step import FirstStep

        return FirstStep(model, step, batch_size=self.loading.batch_size, up=self.loading.up)

    def job(
        self,
        verb: str,
        model: "DiffusionModel",
        captions: "Sequence[PromptSet]",
        options: Mapping[str, Any],
        **inputs: str,
    ) -> Job:
        """Returns the job of a command.

        Args:
            verb: Name of the command.
            model: Model that it computes with.
            captions: Lists of captions that it reads.
            options: Options of the command itself, as on its command line; they replay the run.
            inputs: Digests of whatever else it reads, by name.
        """
        files = {printable(part.path.name): part.sha256 for part in captions}
        return Job(
            f"nemo-localize {verb}",
            self.output.out or Path("runs") / f"{verb}-{model.name}",
            self.output,
            settings(**options, loading=self.loading, runtime=self.runtime),
            {model.name: model.fingerprint} | files | inputs,
            FOUND_BEFORE,
            self.runtime,
        )
