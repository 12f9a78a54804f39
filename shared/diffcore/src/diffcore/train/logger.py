"""A log that a program can read: one JSON object a line."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class JSONLLogger(Logger):
    """Appends `{"step": …, name: value, …}` to a file.

    A resumed run drops the lines of the steps that it will take again, so that the file reads like that of a run that
    was never interrupted.

    Args:
        path: The file, `log.jsonl` of a run folder.
        first_step: The step at which this run starts; lines of this step and later are dropped.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.first_step = first_step
        self._file: TextIO | None = None

    @property
    def name(self) -> str:
        """The stem of the file."""
        return self.path.stem

    @property
    def version(self) -> int:
        """Always 0: a run folder has one log."""
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> TextIO:
        """The open file."""
        if self._file is None:
            kept = [line for line in self._lines() if json.loads(line)["step"] < self.first_step]
            self._file = self.path.open("w", encoding="utf-8")
            self._file.writelines(kept)
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one line; a value that is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items() if name != "epoch"}
        if values:
            self.experiment.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: settings belong to the run's own record."""

    @rank_zero_only
    def save(self) -> None:
        """Hands the lines written so far to the operating system."""
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self) -> list[str]:
        """Whole lines only: a killed run may have left half of one."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text("utf-8").splitlines(keepends=True) if line.endswith("}\n")]
