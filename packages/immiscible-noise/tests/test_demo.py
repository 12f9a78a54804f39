"""What the demo concludes from its two halves; the halves themselves take a minute and belong to `make demo`."""

from pathlib import Path

import pytest

from immiscible_noise.app import demo
from immiscible_noise.app.cli import app
from immiscible_noise.study.compare import Comparison
from immiscible_noise.study.evaluate import Score


def study(**frechet: tuple[float, float | None]) -> Comparison:
    scores = [
        Score(coupling, 0, 1000, 256_000, steps, 0.0, distance, accuracy)
        for coupling, (distance, accuracy) in frechet.items()
        for steps in (5, 50)
    ]
    return Comparison(scores, "features", 3.0, 900, [])


@pytest.mark.parametrize(
    ("assignment", "accuracy", "passed"),
    [(14.9, 0.99, True), (15.1, 0.99, False), (10.0, 0.98, False)],
    ids=["holds", "too little gain", "class lost"],
)
def test_the_demo_fails_where_the_effect_is_not_there(
    assignment: float,
    accuracy: float,
    passed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    free = study(vanilla=(20.0, None), assignment=(assignment, None), half=(12.0, None))
    conditional = study(assignment=(2.0, accuracy), ignore=(30.0, 0.85))
    result = demo.summarise(free, conditional, {"leak": {}})
    assert result["passed"] is passed
    assert result["assignment_over_vanilla_at_5_steps"] == pytest.approx(assignment / 20)
    assert result["labels_ignored"]["accuracy"] == 0.85
    monkeypatch.setattr(demo, "tour", lambda images, run, full: result)
    monkeypatch.setattr("immiscible_noise.app.report.write_page", lambda run: run.folder)
    assert app(["demo", "--out", str(tmp_path / "demo")]) == (0 if passed else 1)
