"""What version 0.1 stored, copied from its files: it is read, or refused in one line that says what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffcore.errors import CorruptArtifactError, IncompatibleModelError
from diffcore.io import artifact
from diffcore.io.jsonfile import write_json
from diffcore.run import Run
from nemo_localize.app import cli
from nemo_localize.files.calibration import load_calibration
from nemo_localize.files.neurons import read_neurons
from nemo_localize.files.results import read_results
from nemo_localize.files.statistics import load_statistics
from nemo_localize.first_step import FirstStep
from nemo_localize.neurons import NeuronSet
from nemo_localize.planted import Planted
from nemo_localize.settings import StepSettings
from nemo_localize.statistics import collect_statistics

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
OWN = NeuronSet.of({LAYER: [3]})
RESULT: dict[str, Any] = {
    **{"prompt": "portrait of 1917 no 1", "prompt_hash": "c42eae0cec73a9a8", "status": "localised", "error": None},
    **{"consistency": {"per_seed": [0.98, 0.98], "max": 0.98}, "kept_seeds": [1, 2], "theta": 5.0, "k": 0, "rounds": 1},
    **{"tau": 0.8, "tau_ref": 0.8, "initial": {LAYER: [3, 7]}, "refined": {LAYER: [3]}, "score_initial": 0.627},
    **{"score_refined": 0.627, "residual_consistency": 0.451, "mitigated": True, "near_ties": 0, "unet_rows": 12},
    **{"unet_calls": 3.75, "seconds": 1.06, "truncated": False, "lost": "", "settings_hash": "e514fa207298d367"},
}
FAILED = RESULT | {"prompt": "another", "status": "not_localised", "refined": None, "mitigated": False}
CALIBRATION: dict[str, Any] = {
    **{"schema": "nemo-localize/calibration@1", "tau": 0.4518, "rule": "mean + sd", "mean": 0.4508, "sd": 0.001},
    **{"quantiles": {"0.5": 0.4505, "0.99": 0.4524}, "num_prompts": 20, "false_alarm_rate": 0.05, "num_checked": 20},
    **{"failed": 0, "digest": "8c145ac507fc48b112e9fb2426cf30fe645c50c6a0bffbd0b6cc18c4c0d7551b"},
    **{"fingerprint": "planted 0", "interval": [0.4512, 0.4522]},
    "settings": {"num_seeds": 2, "first_seed": 1, "steps": 50, "at_step": 2, "guidance_scale": 1.0, "compat": "none"},
}


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_results_are_read(tmp_path: Path):
    found = read_results(lines(tmp_path / "results.jsonl", RESULT, FAILED))
    assert [result.status for result in found] == ["localized", "not_localized"]
    assert found.neurons == OWN
    assert json.loads(json.dumps(found[0].to_json())) == RESULT | {"status": "localized"}
    assert read_neurons(tmp_path) == (OWN, {RESULT["prompt"]: OWN})


def test_another_status_is_refused_with_its_line(tmp_path: Path):
    path = lines(tmp_path / "results.jsonl", RESULT, RESULT | {"status": "delocalised"})
    with pytest.raises(CorruptArtifactError, match=r"line 2: no result \(status is delocalised; it must be one of"):
        read_results(path)


def test_the_neurons_of_an_audit_are_read(tmp_path: Path):
    told = {"neurons": OWN.to_json(), "captions": {"a": OWN.to_json()}, "minimal_set": {"neurons": OWN.to_json()}}
    write_json(tmp_path / "neurons.json", told)
    assert read_neurons(tmp_path) == (OWN, {"a": OWN})


def test_a_calibration_still_belongs_to_its_settings(leaky: Planted, tmp_path: Path):
    step = FirstStep(leaky.model, StepSettings(num_seeds=2))
    write_json(tmp_path / "calibration.json", CALIBRATION)
    load_calibration(tmp_path).require(step)  # its digest is what version 0.1 computed
    published = CALIBRATION["settings"] | {"compat": "reference"}
    write_json(tmp_path / "calibration.json", CALIBRATION | {"settings": published, "digest": "another"})
    with pytest.raises(IncompatibleModelError, match=r"compat reference -> none.*; calibrate again") as refused:
        load_calibration(tmp_path).require(step)
    assert "\n" not in str(refused.value)


def test_statistics_are_read(leaky: Planted, tmp_path: Path):
    now = collect_statistics(leaky.model, ["a few", "ordinary words"], source="ordinary.txt")
    tensors = {"mean": now.mean, "var": now.var, "vocabulary": torch.tensor(sorted(now.vocabulary))}
    fields: dict[str, Any] = {"num_prompts": 2, "sources": [["ordinary.txt", 2]], "mean_length": now.mean_length}
    path = tmp_path / "statistics.safetensors"
    artifact.save(path, tensors, schema="nemo-localize/statistics@1", fingerprint=now.fingerprint, **fields)
    found = load_statistics(tmp_path)
    assert torch.equal(found.mean, now.mean)
    assert (found.vocabulary, found.sources, found.num_prompts) == (now.vocabulary, now.sources, 2)


def finished(folder: Path, verb: str, summary: dict[str, Any], parts: dict[str, dict[str, Any]]) -> Path:
    """Writes a finished run as version 0.1 left it, and returns its folder."""
    with Run.open(folder, command=f"nemo-localize {verb}", config={}) as run:
        for name, fields in parts.items():
            tensors = {way: torch.rand(1, 2, 3, 8, 8) for way in fields.get("ways", ())}
            run.save(name, tensors, **fields)
        run.finish(summary)
    return folder


SPREAD = {"median": 1.0, "mad": 0.0, "n": 1.0}
COUNTS = {"not_memorised": 2, "undecided": 0, "localised": 1, "not_localised": 0, "error": 0}
EVALUATED = [
    {"way": way, "captions": "all", "n": 3, "D_SSIM": value, "D_SSIM, mad": 0.1, "measured in": "SSIM"}
    for way, value in (("none", 0.9), ("neurons", 0.2))
]
PROVED = [{"prompt": "a", "verdict": "closed", "similarity": 0.08, "residual_consistency": 0.45, "worst": "seed 1"}]


@pytest.mark.parametrize(
    ("verb", "summary", "parts", "told"),
    [
        (
            "localize",
            {"num_distinct": 3, "counts": COUNTS, "refined_neurons": SPREAD},
            {},
            ("1 of 3 captions are memorised; 1 localized, by 1 neuron in the median.", ">localized</td>"),
        ),
        (
            "generate",
            {"captions": 1, "images": 2, "methods": ["none", "neurons"]},
            {"gallery": {"prompts": ["a"], "ways": ["none", "neurons"], "seeds": [1001, 1002]}},
            ("1 caption, 2 images of each, with 2 mitigations side by side.",),
        ),
        (
            "evaluate",
            {"table": EVALUATED},
            {"table-evaluation": {"rows": EVALUATED, "caption": "Medians."}},
            ("are 0.900 alike from seed to seed, and 0.200 with", "found neurons ablated", "0.200 ± 0.100"),
        ),
        (
            "prove",
            {"verdict": "closed", "reasons": []},
            {"table-proof": {"rows": PROVED, "caption": "Worst caption first."}},
            ("Is the leak closed?", "The verdict is closed.", "came from"),
        ),
    ],
)
def test_the_report_of_a_finished_run_is_made_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    summary: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    told: tuple[str, ...],
):
    folder = finished(tmp_path / verb, verb, summary, parts)
    if verb == "localize":
        lines(folder / "results.jsonl", RESULT, FAILED)
    assert cli.app(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    for text in told:
        assert text in page
