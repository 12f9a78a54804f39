"""How a command that computes with a model begins and ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from diffcore.cli import Output, emit, settings
from diffcore.errors import printable
from diffcore.runtime import Runtime
from nemo_localize.app.options import Loading
from nemo_localize.settings import DrawSettings, StepSettings

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from diffcore.data.prompts import PromptSet
    from diffcore.models import DiffusionModel
    from diffcore.run import Run
    from nemo_localize.first_step import FirstStep
    from nemo_localize.images import Drawing

# Options that name what was found before: what is in it is told among the inputs, wherever it lies.
FOUND_BEFORE = ("statistics", "calibration", "neurons", "import")


@Parameter(name="*")
@dataclass(frozen=True)
class Work:
    """The options of every command that computes with a model, and what they say to do.

    Attributes:
        loading: How the model is read.
        runtime: Where it runs.
        output: Where results go.
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

    def drawing(self, pictures: DrawSettings, *, reference: bool = False) -> "Drawing":
        """Returns how pictures are drawn."""
        from nemo_localize.images import Drawing

        return Drawing(pictures.image_guidance, pictures.image_steps, self.loading.batch_size, reference)

    def fabric(self) -> "Fabric | None":
        """Returns the processes that share the captions, launched; None for a single one."""
        if self.runtime.devices * self.runtime.num_nodes == 1:
            return None
        fabric = self.runtime.fabric()
        fabric.launch()
        return fabric

    def folder(self, verb: str, model: "DiffusionModel") -> Path:
        """Returns where the run goes."""
        return self.output.out or Path("runs") / f"{verb}-{model.name}"

    def plan(self, **planned: Any) -> int:
        """Prints what the command would do."""
        emit(planned, self.output.json)
        return 0

    def open(
        self,
        verb: str,
        model: "DiffusionModel",
        captions: "Sequence[PromptSet]",
        options: Mapping[str, Any],
        **inputs: str,
    ) -> "Run":
        """Opens the run.

        Args:
            verb: The command.
            model: What it computes with.
            captions: The files it reads captions from.
            options: Its own ones, beside these, as its command line has them: they replay the run.
            inputs: By name what tells whatever else it reads.
        """
        from diffcore.run import Run

        files = {printable(part.path.name): part.sha256 for part in captions}
        return Run.open(
            self.folder(verb, model),
            command=f"nemo-localize {verb}",
            config=settings(**options, loading=self.loading, runtime=self.runtime),
            inputs={model.name: model.fingerprint} | files | inputs,
            restart=self.output.restart,
            volatile=FOUND_BEFORE,
        )


def conclude(run: "Run", summary: Mapping[str, Any]) -> None:
    """Marks a run finished and writes its page."""
    from nemo_localize.app.report import write_page

    run.finish(summary)
    write_page(run)
