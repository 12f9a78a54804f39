"""Every command in-process, on a planted model whose answer is known and on a tiny pipeline on disk."""

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffcore.cli import Loading
from diffcore.errors import RunMismatchError, UserError
from diffcore.io import artifact
from diffcore.io.jsonfile import write_json
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from nemo_localize import protocol
from nemo_localize.app import cli
from nemo_localize.app.options import Computing
from nemo_localize.app.work import Work
from nemo_localize.files.calibration import load_calibration, save_calibration
from nemo_localize.files.results import read_results
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.settings import StepSettings
from nemo_localize.sites import value_sites
from nemo_localize.verification import CaptionVerification, Check, Verification

TRIGGER = "portrait of 1917 no 1"

auditing, audit_run = (importlib.import_module(f"nemo_localize.{name}") for name in ("audit", "app.audit_run"))


@pytest.fixture
def command(simple: Planted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs a command on the planted model, with its run folder below `tmp_path`."""
    monkeypatch.setattr(Work, "load", lambda *_: simple.model)
    monkeypatch.chdir(tmp_path)
    return lambda *tokens: cli.app([str(token) for token in tokens])


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.csv"
    path.write_text(f";Caption;URL\n0;{TRIGGER};http://a\n1;{ordinary_captions(1, seed=9)[0]};http://b\n")
    return path


@pytest.fixture
def ordinary(tmp_path: Path) -> Path:
    path = tmp_path / "ordinary.txt"
    path.write_text("\n".join(ordinary_captions(60, seed=3)) + "\n")
    return path


def test_from_captions_to_neurons_and_images(
    command: Callable[..., Any], captions: Path, ordinary: Path, simple: Planted, capsys: pytest.CaptureFixture[str]
):
    small = ["--num-seeds", 4]
    assert command("statistics", "planted", ordinary) == 0
    assert command("statistics", "planted", ordinary, "--restart") == 0
    assert Path("runs/statistics-planted.old-1/statistics.safetensors").exists()
    assert command("calibrate", "planted", ordinary, *small, "--quantile", 0.99) == 0
    assert json.loads(Path("runs/calibrate-planted/result.json").read_text())["rule"] == "quantile 0.99"
    # Few seeds of made-up words set a threshold that no planted memory falls below: ours is the models' own.
    calibration = load_calibration(Path("runs/calibrate-planted/calibration.json"))
    save_calibration(Path("tau.json"), replace(calibration, tau=0.45))
    made = ["--calibration", "tau.json", *small]
    capsys.readouterr()
    assert command("detect", "planted", captions, *made, "--json") == 0
    assert json.loads(capsys.readouterr().out)["memorised"] == 1
    assert (
        command("localize", "planted", captions, "--statistics", "runs/statistics-planted", *made, "--authors-table")
        == 0
    )
    folder = Path("runs/localize-planted")
    results = read_results(folder / "results.jsonl")
    assert [r.status for r in results] == ["localized", "not_memorised"]
    assert results[0].refined == simple.carriers(TRIGGER)
    table = (folder / "tables" / "published-form.csv").read_text().splitlines()
    assert table[0] == "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
    assert table[1].startswith(f"{TRIGGER};http://a;")
    draw = ["--num-images", 2, "--image-steps", 2, "--image-guidance", 1]
    mitigations = ["--mitigations", "none", "neurons", "random-neurons"]
    assert command("generate", "planted", captions, "--neurons", folder, *draw, *mitigations) == 0
    capsys.readouterr()
    judged = ["--mitigations", "random-neurons", "neurons", "--json"]
    assert command("evaluate", "planted", captions, "--neurons", folder, *draw, *judged) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {row["mitigation"] for row in measured["captions"]} == {"none", "random-neurons", "neurons", "union"}
    with pytest.raises(UserError, match="no autoencoder"):
        command("evaluate", "planted", captions, "--neurons", folder, "--ordinary", ordinary)
    for verb in ("calibrate", "detect", "localize", "generate", "evaluate"):
        run = Path("runs") / f"{verb}-planted"
        assert (run / "report.html").exists()
        before = (run / "result.json").stat().st_mtime_ns
        read = ordinary if verb == "calibrate" else captions
        assert (
            command(verb, "planted", read, "--config", run / "config.yaml", "--out", run) == 0
        )  # replays: the same run
        assert (run / "result.json").stat().st_mtime_ns == before
    save_calibration(Path("other.json"), replace(calibration, tau=0.5))
    with pytest.raises(RunMismatchError, match="tau"):
        command("detect", "planted", captions, "--calibration", "other.json", *small)
    Path("none.json").write_text("{}")
    with pytest.raises(RunMismatchError, match="neurons"):
        command("generate", "planted", captions, "--neurons", "none.json", *draw, *mitigations)
    page = (folder / "report.html").read_text()
    assert TRIGGER in page
    (folder / "report.html").unlink()
    assert command("report", folder) == 0
    assert (folder / "report.html").read_text() == page


def test_options_reach_what_they_are_of(
    command: Callable[..., Any], captions: Path, ordinary: Path, simple: Planted, tmp_path: Path
):
    (tmp_path / "more.txt").write_text("a few words more\n")
    assert command("statistics", "planted", ordinary, tmp_path / "more.txt", "--up") == 0
    told = json.loads(Path("runs/statistics-planted/result.json").read_text())
    assert told["sources"] == [["ordinary.txt", 60], ["more.txt", 1]]
    searched = sum(value_sites(simple.model.backbone, up=True).widths)
    assert told["neurons"] == searched > sum(value_sites(simple.model.backbone).widths)
    step = Work(computing=Computing(batch_size=3, up=True)).first_step(simple.model, StepSettings(num_seeds=2))
    assert (step.batch_size, step.sites.num_neurons) == (3, searched)

    own = simple.carriers(TRIGGER)
    write_json(Path("own.json"), {"neurons": own.to_json(), "captions": {TRIGGER: own.to_json()}})
    draw = ["--num-images", 1, "--image-steps", 2, "--image-guidance", 1, "--neurons", "own.json"]
    for name, option in (("together", []), ("apart", ["--per-caption"])):
        assert command("generate", "planted", captions, *draw, *option, "--out", name) == 0
        gallery = artifact.load(Path(name, "parts", "gallery.safetensors"), schema="diffcore/part@1").tensors
        memorised, innocent = (gallery["none"] - gallery["neurons"]).abs().amax((1, 2, 3, 4)) > 0
        assert (bool(memorised), bool(innocent)) == (True, name == "together")

    (tmp_path / "bad.csv").write_text("caption,url\ngood,x\nbad\n")
    with pytest.raises(UserError, match="line 3"):
        command("statistics", "planted", tmp_path / "bad.csv", "--strict", "--out", "strict")


def test_images_of_ordinary_captions_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    tiny.pipeline("sd15").save_pretrained("model")
    Path("neurons.json").write_text(json.dumps({"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [2]}))
    for name, count in (("captions.txt", 1), ("ordinary.txt", 12)):
        Path(name).write_text("\n".join(ordinary_captions(count, seed=count)))
    draw = ["--num-images", "2", "--image-steps", "1", "--image-guidance", "1", "--device", "cpu", "--threads", "1"]
    given = ["model", "captions.txt", "--neurons", "neurons.json", "--mitigations", "neurons", *draw]
    capsys.readouterr()
    assert cli.app(["evaluate", *given, "--ordinary", "ordinary.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    distances = {row["metric"]: (row["mitigation"], row["features"], row["n"]) for row in found["quality"]}
    assert distances["Fréchet distance"] == distances["kernel distance"] == ("neurons", "random:0", 12)
    assert any("random:0 stands in for Inception" in note for note in found["notes"])


def test_export_and_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tiny.pipeline("sd15").save_pretrained("model")
    neurons = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": [2]}
    Path("neurons.json").write_text(json.dumps({"neurons": neurons, "captions": {"a caption": neurons}}))
    assert cli.app(["export", "model", "neurons.json", "--out", "edit"]) == 0
    assert cli.app(["export", "model", "neurons.json", "--out", "edit"]) == 0  # finished: nothing is done again
    manifest = json.loads(Path("edit/manifest.json").read_text())
    assert manifest["captions"] == {"a caption": neurons}
    assert len(manifest["lora"]) == 3
    assert cli.app(["export", "model", "neurons.json", "--no-lora", "--out", "edit", "--restart"]) == 0
    assert json.loads(Path("edit/manifest.json").read_text())["lora"] == []
    assert Path("edit.old-1/lora").exists()
    assert cli.app(["restore", "edit", "--out", "restored"]) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert Path("restored", weights).read_bytes() == Path("model", weights).read_bytes()
    assert Path("edit/model", weights).read_bytes() != Path("model", weights).read_bytes()


def test_a_model_is_loaded_as_the_options_say(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(importlib.import_module("diffcore.models"), "load", lambda *a, **b: asked.update(b, given=a))
    loading = Loading(True, True, "v_prediction", Path("t"), Path("l"))
    work = Work(loading, Runtime(seed=3, threads=1))
    work.load("owner/name")
    assert asked == {**asdict(loading), "given": ("owner/name", work.runtime)}


@pytest.mark.parametrize(
    ("copies", "reopened", "verdict", "code"),
    [(0, 1, "closed", 0), (1, 1, "open", 1), (0, 0, "inconclusive", 1)],
)
def test_the_exit_code_of_verification_is_its_verdict(
    command: Callable[..., Any],
    captions: Path,
    ordinary: Path,
    simple: Planted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    copies: int,
    reopened: int,
    verdict: str,
    code: int,
):
    found: list[Any] = []

    def verify(step: Any, neurons: Any, prompts: Any, controls: Any, **options: Any) -> Verification:
        found.extend([neurons, list(prompts), len(controls), options["tau"]])
        checks = (
            Check(False, "held-out seeds", 0.9, 1, 4, "seed 1"),
            Check(False, "search from noise", 0.9, reopened, 4, "start 1"),
            Check(True, "held-out seeds", 0.2, copies, 4, "seed 2"),
        )
        control = CaptionVerification(
            "harmless", "training image", 0.1, 0.45, (Check(True, "paraphrases", 0.1, 0, 4, ""),)
        )
        return Verification(
            (CaptionVerification(TRIGGER, "training image", 0.1, 0.45, checks),), (control,), "SSIM", "", {}
        )

    monkeypatch.setattr(importlib.import_module("nemo_localize.verify"), "verify", verify)
    monkeypatch.setattr(importlib.import_module("nemo_localize.calibrate"), "threshold", lambda *_, **__: 0.45)
    Path("neurons.json").write_text(json.dumps(simple.carriers(TRIGGER).to_json()))
    given = ["planted", captions, "--neurons", "neurons.json", "--controls", ordinary]
    assert command("verify", *given, "--json") == code
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict
    assert found == [simple.carriers(TRIGGER), [TRIGGER, ordinary_captions(1, seed=9)[0]], 8, 0.45]
    assert json.loads(Path("runs/verify-planted/verification.json").read_text())["verdict"] == verdict
    assert TRIGGER in Path("runs/verify-planted/report.html").read_text()
    assert command("verify", *given) == code  # read from the finished run


def test_an_audit_refuses_a_model_that_it_could_not_edit_before_it_computes(captions: Path, tmp_path: Path):
    tiny.pipeline("sd15").save_pretrained(tmp_path / "pickled", safe_serialization=False)
    given = ["audit", str(tmp_path / "pickled"), str(captions), "--references", str(captions), "--allow-pickle"]
    with pytest.raises(UserError, match="needs them as safetensors"):
        cli.app(given)


@pytest.mark.parametrize(("closed", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_of_an_audit_is_whether_it_closed(
    command: Callable[..., Any],
    captions: Path,
    ordinary: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: bool,
    code: int,
):
    summary = {"closed": closed, "answer": "so it is"}
    monkeypatch.setattr(auditing, "audit", lambda *_, **__: SimpleNamespace(summary=lambda: summary))
    assert command("audit", "planted", captions, "--references", ordinary) == code
    assert "so it is" in Path("runs/audit-planted/report.html").read_text()


def test_what_cannot_work_is_said_first(command: Callable[..., Any], captions: Path, tmp_path: Path):
    with pytest.raises(UserError, match="calibrate"):
        command("detect", "planted", captions)
    with pytest.raises(UserError, match="`neurons`"):
        command("generate", "planted", captions)
    with pytest.raises(UserError, match="`ordinary`"):
        command("evaluate", "planted", captions, "--neurons", "none.json", "--inception", "weights.pt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no usable prompt"):
        command("calibrate", "planted", tmp_path / "empty.txt")
    assert not Path("runs").exists()


def test_dry_run_writes_nothing(command: Callable[..., Any], ordinary: Path, capsys: pytest.CaptureFixture[str]):
    assert command("calibrate", "planted", ordinary, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["unet_rows"] == 600
    assert not Path("runs").exists()


def test_audit_finds_edits_and_judges(
    command: Callable[..., Any],
    captions: Path,
    ordinary: Path,
    simple: Planted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    written: list[Any] = []
    monkeypatch.setattr(audit_run, "export", lambda source, neurons, out, reasons: written.append((neurons, reasons)))
    calibrated = auditing.calibrate
    monkeypatch.setattr(auditing, "calibrate", lambda *a, **b: replace(calibrated(*a, **b), tau=0.45))
    for name, value in {"AUDIT_STEPS": 1, "AUDIT_DRAWS": 1, "DROPPED_TOKENS": 1}.items():
        monkeypatch.setattr(protocol, name, value)
    small = ["--num-seeds", 4, "--num-images", 2, "--image-steps", 2, "--image-guidance", 1]
    code = command("audit", "planted", captions, "--references", ordinary, *small, "--json")
    result = json.loads(capsys.readouterr().out)
    # One step of the adversary reopens nothing, not even the known leak: its verdict must not be "closed".
    assert code == 1
    assert result["verdict"] != "closed"
    assert not result["closed"]
    assert result["memorised"] == 1
    carriers = simple.carriers(TRIGGER)
    assert written == [(carriers, {TRIGGER: carriers})]
    folder = Path("runs/audit-planted")
    assert json.loads((folder / "neurons.json").read_text())["neurons"] == carriers.to_json()
    for name in ("statistics.safetensors", "calibration.json", "results.jsonl", "verification.json", "report.html"):
        assert (folder / name).exists()
    assert command("audit", "planted", captions, "--references", ordinary, *small, "--json") == 1  # read, not repeated
    assert command("audit", "planted", captions, "--config", folder / "config.yaml", "--out", folder) == 1
    assert len(written) == 1


def test_an_audit_without_leaks_passes(command: Callable[..., Any], ordinary: Path, monkeypatch: pytest.MonkeyPatch):
    calibrated = auditing.calibrate
    monkeypatch.setattr(auditing, "calibrate", lambda *a, **b: replace(calibrated(*a, **b), tau=0.9))
    assert command("audit", "planted", ordinary, "--references", ordinary, "--num-seeds", 2) == 0
