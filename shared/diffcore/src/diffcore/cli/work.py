"""What commands that compute with a model share: their options, loading the model, and the job that owns the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cyclopts import Parameter

from diffcore.cli.app import settings
from diffcore.cli.job import Job
from diffcore.cli.options import Loading, Output, load_model
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel


@Parameter(name="*")
@dataclass(frozen=True)
class Work:
    """The options of every command that computes with a model; packages add groups of their own in a subclass.

    Attributes:
        script: Name of the console script, which the package's subclass sets.
        loading: Options that say how the model is read.
        runtime: Options that say where it runs.
        output: Options that say where results go.
    """

    script: ClassVar[str]
    loading: Loading = field(default_factory=Loading)
    runtime: Runtime = field(default_factory=Runtime)
    output: Output = field(default_factory=Output)

    def load(self, model: str) -> "DiffusionModel":
        """Returns the model, on its device.

        Args:
            model: Name on the command line.
        """
        return load_model(model, self.loading, self.runtime)

    def job(
        self,
        verb: str,
        model: "DiffusionModel",
        options: Mapping[str, Any],
        inputs: Mapping[str, str],
        volatile: Sequence[str] = (),
    ) -> Job:
        """Returns the job of a command.

        Args:
            verb: Name of the command.
            model: Model that it computes with.
            options: Options of the command itself, as on its command line; they replay the run.
            inputs: Digests of whatever else it reads, by name.
            volatile: Names of options that do not change the results.
        """
        return Job(
            f"{self.script} {verb}",
            self.output.out or Path("runs") / f"{verb}-{model.name}",
            self.output,
            settings(**options, loading=self.loading, runtime=self.runtime),
            {model.name: model.fingerprint} | dict(inputs),
            volatile,
            self.runtime,
        )
