"""The shape of every command that writes a run: plan, open, compute or read, report, show, exit code."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcore.cli.app import emit, show
from diffcore.cli.options import Output
from diffcore.errors import UserError
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from diffcore.run import Run, RunMap


@dataclass(frozen=True)
class Job:
    """A command that computes a run: the settings that identify it, and the folder it is written to.

    Attributes:
        command: Console script and verb, such as "immiscible-noise train".
        folder: Run folder, made where it does not exist.
        output: Options that name the run folder and the form of the output.
        config: Resolved options; with `inputs` they identify the run.
        inputs: Digest of each input by name.
        volatile: Names in `config` that do not change the results.
        runtime: Options that say how many processes share the work; one without them.
    """

    command: str
    folder: Path
    output: Output
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    volatile: Iterable[str] = ()
    runtime: Runtime | None = None

    def __call__(
        self,
        compute: "Callable[[Run, RunMap], Mapping[str, Any]]",
        *,
        plan: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        report: "Callable[[Run], Any] | None" = None,
        passed: Callable[[Mapping[str, Any]], bool] | None = None,
        shown: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> int:
        """Runs the job and returns its exit code: 0, or 1 where it was done and its check failed.

        A finished run is only read. With `dry_run` the plan is printed and nothing is written. In a job of several
        processes all compute, and the first one writes results, report and standard output.

        Args:
            compute: Does the work with the run and a resuming map, and returns the summary.
            plan: Facts for `dry_run` about the work ahead; a function where they take work to find out.
            report: Writes the report from the folder of a finished run.
            passed: Tells from the summary whether the command's check passed; None for commands without a check.
            shown: Selects from the summary what is printed for people; by default all of it.
        """
        if self.output.dry_run:
            emit({**(plan() if callable(plan) else plan), "writes": self.folder}, self.output.json)
            return 0
        from diffcore.run import RunMap

        fabric = None if self.runtime is None else self.runtime.launched()
        with self._opened(fabric) as run:
            if not run.finished:
                summary = compute(run, RunMap(run, fabric))
                if run.leading:
                    run.finish(summary)
                    if report is not None:
                        report(run)
            show(run, self.output, shown)
            return 0 if not run.leading or passed is None or passed(run.result) else 1

    def _opened(self, fabric: "Fabric | None") -> "Run":
        """Opens the run, in the first process before the others.

        It refuses what is no run and deletes what an interrupted write left, and it alone knows whether the run is
        finished already. Where it cannot open the run, the others end too.
        """
        if fabric is None:
            return self._open()
        run = None
        try:
            run = self._open() if fabric.global_rank == 0 else None
        finally:
            finished = fabric.broadcast(None if run is None else run.finished)
        if run is None:
            if finished is None:
                raise UserError("the first process could not open the run, as it says")
            run = self._open()
            run.finished = finished
        return run

    def _open(self) -> "Run":
        from diffcore.run import Run

        return Run.open(
            self.folder,
            command=self.command,
            config=self.config,
            inputs=self.inputs,
            restart=self.output.restart,
            volatile=self.volatile,
        )
