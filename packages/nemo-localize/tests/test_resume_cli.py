"""The real process, killed in the middle of a list: typed again, it leaves the file of a run that was left alone."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from diffcore.testing import tiny
from nemo_localize.app import cli
from nemo_localize.files.calibration import load_calibration, save_calibration
from nemo_localize.planted import ordinary_captions

# Few seeds and long searches: time goes where a kill should strike.
STEP = ["--num-seeds", "2", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
LOCALIZE = ["localize", "model", "captions.txt", "--statistics", "runs/statistics-model", "--calibration", "tau.json"]
LOCALIZE += [*STEP, "--unit-size", "1", "--no-give-up-early"]
CAPTIONS = 6


# The console script, and a kill that strikes as soon as two captions are finished, however busy the machine is.
KILLED = """
import os, signal
from pathlib import Path
from diffcore.run import Run
from nemo_localize.app.cli import run

save = Run.save
def save_and_die(*args, **fields):
    save(*args, **fields)
    if len(list(Path("killed/parts").glob("captions-*.json"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Run.save = save_and_die
raise SystemExit(run())
"""


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights, its statistics, and a threshold above which every caption counts as memorised."""
    monkeypatch.chdir(tmp_path)
    tiny.pipeline("sd15").save_pretrained("model")
    Path("captions.txt").write_text("\n".join(ordinary_captions(CAPTIONS, seed=9)) + "\n")
    Path("ordinary.txt").write_text("\n".join(ordinary_captions(12, seed=3)) + "\n")
    assert cli.app(["statistics", "model", "ordinary.txt"]) == 0
    assert cli.app(["calibrate", "model", "ordinary.txt", *STEP]) == 0
    save_calibration(Path("tau.json"), replace(load_calibration(Path("runs/calibrate-model")), tau=0.0))


def finished(folder: Path) -> list[Path]:
    """Returns what is kept of captions that are finished: the sidecar is written last."""
    return sorted((folder / "parts").glob("captions-*.json"))


def lines(folder: Path) -> bytes:
    """Returns the file to the byte, but for how long each caption took."""
    text, count = re.subn(rb'"seconds": ?[0-9.e-]+', b"", (folder / "results.jsonl").read_bytes())
    assert count == CAPTIONS
    return text


@pytest.mark.usefixtures("prepared")
def test_a_killed_process_goes_on_to_the_same_file():
    killed, whole = Path("killed"), Path("whole")
    run = subprocess.run([sys.executable, "-c", KILLED, *LOCALIZE, "--out", "killed"], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    done = {path: path.stat().st_mtime_ns for path in finished(killed)}
    assert len(done) == 2
    assert not (killed / "results.jsonl").exists()
    assert json.loads((killed / "run.json").read_text())["status"] == "running"

    assert cli.app([*LOCALIZE, "--out", str(killed)]) == 0
    assert cli.app([*LOCALIZE, "--out", str(whole)]) == 0
    assert lines(killed) == lines(whole)
    assert b'"not_localized"' in lines(whole)  # searched to the end, or there was little to interrupt
    assert {path: path.stat().st_mtime_ns for path in done} == done  # what was finished was not computed again
    assert len(finished(killed)) == CAPTIONS
