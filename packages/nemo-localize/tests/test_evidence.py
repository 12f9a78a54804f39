"""An audit that says clean has looked: verdicts, their order, and what becomes of them in results and exit codes."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffcore.digests import digest_of
from nemo_localize.app import cli
from nemo_localize.app.words import worded
from nemo_localize.app.work import Work
from nemo_localize.calibrate import Calibration
from nemo_localize.detect import Detection
from nemo_localize.evidence import Evidence
from nemo_localize.files.results import read_results
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.results import CaptionResult, Results
from nemo_localize.second_look import Look, SecondLook, Usual

detection, evidence, auditing, audit_run = (
    importlib.import_module(f"nemo_localize.{name}") for name in ("detect", "evidence", "audit", "app.audit_run")
)
TRIGGER = "portrait of 1917 no 1"
SMALL = ["--num-seeds", 2, "--num-images", 2, "--image-steps", 2, "--image-guidance", 1]
CALIBRATION = Calibration(0.9, "quantile 0.99", 0.7, 0.1, {"0.5": 0.65}, 50, 0.01, 50, 0, "", "", {}, (0.88, 0.93))


def detected(prompt: str, level: float | None) -> Detection:
    return Detection(prompt, error="NaN") if level is None else Detection(prompt, (level, 0.1))


def known(levels: Mapping[str, float | None], alike: Mapping[str, float], verdicts: Mapping[str, Any]) -> Evidence:
    found = SecondLook(Usual.of([Look("ordinary", (0.4,) * 6)]), tuple(Look(p, (v,) * 6) for p, v in alike.items()), 0)
    first = tuple(detected(prompt, level) for prompt, level in levels.items())
    return Evidence(verdicts, first, found, CALIBRATION, "SSIM")


def test_captions_are_ranked_by_evidence():
    levels = {"far": 0.5, "near": 0.89, "unlike": 0.95, "pinned": 0.7, "memory": 0.91, "stronger": 0.85, "partly": 0.6}
    alike = {"unlike": 0.3, "pinned": 0.69, "memory": 0.8, "stronger": 0.9}
    looks = tuple(Look(prompt, (value,) * 6) for prompt, value in alike.items())
    partly = Look("partly", (0.9,) * 2 + (0.3,) * 4)
    ranked = evidence._ranked(replace(known(levels, {}, {}).found, looks=(*looks, partly)), levels)
    assert list(ranked) == ["stronger", "memory", "partly", "pinned", "unlike", "near", "far"]
    assert list(ranked.values()) == ["memorised", "memorised", "undecided", *["clean"] * 4]


@pytest.mark.parametrize(
    ("lowest", "level"),
    [(0.95, 0.9), (0.9, 0.8), (0.75, 0.65), (0.5, 0.65)],  # above the threshold; the paper's; the median; below all
)
def test_neurons_must_bring_down_what_images_found(lowest: float, level: float):
    verdicts = {"strong": "memorised", "weak": "memorised", "other": "clean"}
    found = known({"strong": 0.97, "weak": lowest, "other": 0.1}, {}, verdicts)
    assert found.suppressed_below == pytest.approx(level)


def test_every_caption_has_a_result():
    levels = {"found": 0.95, "too ordinary": 0.6, "open": 0.8, "clean": 0.3, "failed": None}
    verdicts = {"found": "memorised", "too ordinary": "memorised", "open": "undecided", "clean": "clean"}
    searched = {
        "found": CaptionResult("found", digest_of("found"), "localized"),
        "too ordinary": CaptionResult("too ordinary", digest_of("too ordinary"), "not_memorised"),
    }
    results = known(levels, {}, verdicts).completed(searched)
    assert {prompt: result.status for prompt, result in results.items()} == {
        "found": "localized",
        "too ordinary": "not_localized",
        "open": "undecided",
        "clean": "not_memorised",
        "failed": "error",
    }
    assert results["open"].consistency == (0.8, 0.1)
    assert CaptionResult.from_json(results["open"].to_json()) == results["open"]
    assert Results(tuple(results.values())).summary()["counts"]["undecided"] == 1


@pytest.fixture
def audit(simple: Planted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Audits captions of the planted model; the threshold is above everything, so that only images can tell."""
    monkeypatch.setattr(Work, "load", lambda *_: simple.model)
    monkeypatch.chdir(tmp_path)
    calibrated = auditing.calibrate
    high = {"tau": 0.999, "interval": (0.998, 1.0), "mean": 0.4, "sd": 0.05}
    monkeypatch.setattr(auditing, "calibrate", lambda *a, **b: replace(calibrated(*a, **b), **high))
    monkeypatch.setattr(audit_run, "export", lambda *_, **__: None)
    Path("ordinary.txt").write_text("\n".join(ordinary_captions(12, seed=3)))

    def run(*captions: str) -> tuple[int, dict[str, Any]]:
        Path("captions.txt").write_text("\n".join(captions))
        code = cli.app([str(t) for t in ("audit", "planted", "captions.txt", "--references", "ordinary.txt", *SMALL)])
        return code, json.loads(Path("runs/audit-planted/result.json").read_text())

    return run


def test_a_memory_below_the_threshold_is_found(audit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    from nemo_localize import protocol

    for name, value in {"AUDIT_STEPS": 1, "AUDIT_DRAWS": 1, "DROPPED_TOKENS": 1}.items():
        monkeypatch.setattr(protocol, name, value)
    code, result = audit(TRIGGER, *ordinary_captions(2, seed=9))
    assert code == 1
    assert (result["memorised"], result["undecided"], result["captions"], result["drawn"]) == (1, 0, 3, 3)
    results = read_results(Path("runs/audit-planted/results.jsonl"))
    assert [r.status for r in results] == ["localized", "not_memorised", "not_memorised"]
    page = Path("runs/audit-planted/report.html").read_text()
    assert page.index(f"1. {TRIGGER}") < page.index("2. ")
    assert "95 % interval 0.998 to 1.000" in page


def test_a_clean_list_is_clean(audit: Callable[..., Any]):
    long = f"{ordinary_captions(1, seed=8)[0]} {'very ' * 90}long"
    code, result = audit(*ordinary_captions(2, seed=9), long)
    told = read_results(Path("runs/audit-planted/results.jsonl"))
    assert [(r.truncated, "very" in r.lost) for r in told] == [(False, False), (False, False), (True, True)]
    assert (code, result["verdict"], result["closed"]) == (0, "none memorised", True)
    assert result["answer"] == ("None of 3 captions is memorised: the first steps and the images of all were compared.")


@pytest.mark.parametrize("reason", ["some seeds", "ordinary captions too"])
def test_what_stays_open_is_undecided_and_never_clean(
    audit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, reason: str
):
    seen = evidence.looks

    def doubtful(model: Any, prompts: list[str], seeds: Any, *others: Any) -> list[Look]:
        looks = seen(model, prompts, seeds, *others)
        if reason == "some seeds":
            count = len(looks[0].pairs)
            return [
                replace(look, pairs=(0.9,) * (count // 3) + (0.3,) * (count - count // 3))
                if look.prompt == TRIGGER
                else look
                for look in looks
            ]
        return [replace(look, pairs=(0.9,) * len(look.pairs)) for look in looks]

    monkeypatch.setattr(evidence, "looks", doubtful)
    code, result = audit(TRIGGER, *ordinary_captions(2, seed=9))
    assert (code, result["verdict"], result["closed"], result["memorised"]) == (1, "undecided", False, 0)
    assert result["undecided"] == (1 if reason == "some seeds" else 3)
    assert ("not most of them" in result["answer"]) == (reason == "some seeds")
    assert ("ordinary captions of this model" in result["answer"]) == (reason != "some seeds")
    assert read_results(Path("runs/audit-planted/results.jsonl"))[0].status == "undecided"


def test_an_audit_of_captions_that_fail_is_not_clean(audit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    measured = detection._detect_unit

    def broken(step: Any, prompts: list[str]) -> list[Detection]:
        return [detected(prompt, None) for prompt in prompts] if TRIGGER in prompts else measured(step, prompts)

    monkeypatch.setattr(detection, "_detect_unit", broken)
    code, result = audit(TRIGGER)
    assert (code, result["closed"], result["failed"], result["drawn"]) == (1, False, 1, 0)
    assert "1 of 1 captions failed" in result["answer"]
    assert "No caption has a first step" in Path("runs/audit-planted/report.html").read_text()


def test_tables_speak_in_words():
    evaluated = {
        "mitigation": "neurons",
        "captions": "all",
        "n": 3,
        "SSIM_gen": 0.5,
        "SSIM_gen, mad": 0.1,
        "measured in": "x",
    }
    assert worded("evaluation", [evaluated]) == [
        {"mitigation": "found neurons ablated", "captions": "all (3)", "like the unedited image": "0.500 ± 0.100"}
    ]
    verification = {"prompt": "a", "verdict": "open", "similarity": 0.9, "residual_consistency": 0.8, "worst": "seed 1"}
    assert list(worded("verification", [verification])[0]) == [
        "caption",
        "verdict",
        "closest image",
        "came from",
        "first steps alike",
    ]
    distance = {
        "mitigation": "none",
        "metric": "FID",
        "features": "f",
        "reference": "r",
        "value": 1.0,
        "low": 0.5,
        "high": 2.0,
    }
    assert worded("quality", [distance | {"n": 9}])[0]["95 % interval"] == "0.5 to 2"
    for unknown in (None, float("nan")):
        assert worded("quality", [distance | {"n": 9, "low": unknown, "high": unknown}])[0]["95 % interval"] is None
    fits = {"set": "union", "neurons": 3, "closed": 1, "captions": 2, "damage": 0.2, "within_budget": False}
    (told,) = worded("sets", [fits | {"largest_score": 0.1, "largest_residual": 0.2}])
    assert (told["captions closed"], told["change of ordinary captions"]) == ("1 of 2", "0.2000, too much")
    assert worded("unknown", [{"some_name": 1}]) == [{"some name": 1}]
