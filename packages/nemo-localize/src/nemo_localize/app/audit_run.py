"""What an audit writes to its run folder: each part as soon as it is known, so that the report grows with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffcore.io.jsonfile import write_json
from diffcore.run import Run
from nemo_localize.app.report import (
    VERIFICATION,
    save_evaluation,
    save_gallery,
    save_neurons,
    save_verification,
    write_page,
)
from nemo_localize.app.report_evidence import save_evidence
from nemo_localize.audit import ConfirmedEdit
from nemo_localize.calibrate import Calibration
from nemo_localize.evaluate import Evaluation
from nemo_localize.evidence import Evidence
from nemo_localize.files import calibration as calibration_file
from nemo_localize.files import results as results_file
from nemo_localize.files import statistics as statistics_file
from nemo_localize.files.export import checkpoint_in, export
from nemo_localize.first_step import FirstStep
from nemo_localize.images import images_of
from nemo_localize.results import Results
from nemo_localize.second_look import FIRST_SEEDS, quick_latents
from nemo_localize.settings import ImageSettings
from nemo_localize.statistics import Statistics
from nemo_localize.verification import Verification

_SHOWN, _SHOWN_CLEAN = 12, 4  # prompts whose images the report shows, where some are suspicious and where none is


@dataclass
class AuditRun:
    """Keeps the parts of an audit.

    Attributes:
        run: Run folder that they go to.
        step: The audited model and its step.
        source: The model's files, which the edit is written from.
        seeds: Seeds of the images.
        settings: How images are generated.
        originals: Training images by prompt, where they are known.
    """

    run: Run
    step: FirstStep
    source: Path
    seeds: Sequence[int]
    settings: ImageSettings
    originals: Mapping[str, Tensor]
    _statistics: Statistics | None = field(default=None, init=False)
    _evidence: Evidence | None = field(default=None, init=False)
    _results: Results | None = field(default=None, init=False)

    def keep(self, part: Any) -> None:
        """Writes a part of the audit: its files, and what the report shows of it."""
        run, folder = self.run, self.run.folder
        match part:
            case Statistics():
                self._statistics = part
                statistics_file.save_statistics(folder / statistics_file.FILE, part)
            case Calibration():
                calibration_file.save_calibration(folder / calibration_file.FILE, part)
            case Evidence():
                self._evidence = part
                save_evidence(run, part, self._shown(part), self.originals)
                write_page(run)
            case Results():
                assert self._statistics is not None
                self._results = part
                results_file.write_results(folder / results_file.FILE, part)
                save_neurons(run, part, self.step, self._statistics)
            case ConfirmedEdit():
                self._keep_edit(part)
            case Mapping():
                assert self._evidence is not None
                save_gallery(run, self._evidence.of("memorised"), part, self.seeds, self.originals)
                write_page(run)
            case Evaluation():
                save_evaluation(run, part)
            case Verification():
                write_json(folder / VERIFICATION, part.to_json())
                save_verification(run, part)

    def _shown(self, evidence: Evidence) -> dict[str, Tensor]:
        """Returns quick images of the prompts of most evidence."""
        suspicious = len(evidence.of("memorised") + evidence.of("undecided"))
        prompts = list(evidence.verdicts)[: max(_SHOWN_CLEAN, min(suspicious, _SHOWN))]
        latents = quick_latents(self.step.model, prompts, FIRST_SEEDS, self.settings) if prompts else ()
        return {prompt: images_of(self.step.model, own) for prompt, own in zip(prompts, latents, strict=True)}

    def _keep_edit(self, edit: ConfirmedEdit) -> None:
        assert self._results is not None
        by_caption, common = self._results.by_caption(), edit.minimal
        captions = {prompt: found.to_json() for prompt, found in by_caption.items()}
        written = {"neurons": edit.neurons.to_json(), "captions": captions, "minimal_set": common.to_json()}
        write_json(self.run.folder / "neurons.json", written)
        self.run.keep_table(
            "sets",
            common.rows(),
            "One set of neurons for all captions. Change: one minus the likeness of first steps of ordinary captions, "
            f"before and after; allowed up to {common.budget:g}.",
        )
        if checkpoint_in(self.run.folder) is None:
            export(self.source, edit.neurons, self.run.folder, reasons=by_caption)
