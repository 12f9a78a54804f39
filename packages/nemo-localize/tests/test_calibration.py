import statistics
from dataclasses import replace

import pytest

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError
from nemo_localize.calibration import Calibration, calibrate, consistency_rows, threshold
from nemo_localize.first_step import FirstStep
from nemo_localize.planted import ordinary_captions
from nemo_localize.settings import StepSettings

TRIGGER = "portrait of 1917 no 1"


@pytest.fixture(scope="module")
def step(simple) -> FirstStep:
    return FirstStep(simple.model, StepSettings(num_seeds=3))


@pytest.fixture(scope="module")
def calibrated(step) -> Calibration:
    return calibrate(step, [*ordinary_captions(11, seed=5), TRIGGER])


def test_tau_is_mean_plus_one_deviation_of_one_half(step, calibrated):
    captions = [*ordinary_captions(11, seed=5), TRIGGER]
    levels = [max(row["consistency"]) for row in consistency_rows(step, captions)]
    half, other = levels[::2], levels[1::2]
    assert calibrated.tau == pytest.approx(statistics.fmean(half) + statistics.stdev(half), abs=1e-5)
    assert calibrated.false_alarm_rate == sum(level > calibrated.tau for level in other) / 6 > 0  # the trigger is one
    assert (calibrated.num_prompts, calibrated.num_checked, calibrated.failed) == (6, 6, 0)
    assert calibrated.quantiles["0.5"] == pytest.approx(statistics.median(half), abs=1e-5)


def test_a_quantile_instead(step):
    found = calibrate(step, ordinary_captions(8, seed=5), quantile=0.9)
    assert found.rule == "quantile 0.9"
    assert found.tau == found.quantiles["0.9"]
    with pytest.raises(UserError, match="between 0 and 1"):
        calibrate(step, ordinary_captions(8), quantile=1.0)


def test_a_threshold_belongs_to_its_settings_and_model(simple, step, calibrated, tmp_path):
    back = Calibration.load(calibrated.save(tmp_path / "calibration.json"))
    assert back == calibrated
    assert threshold(step, back) == calibrated.tau
    with pytest.raises(IncompatibleModelError, match="num_seeds 3 -> 4"):
        threshold(FirstStep(simple.model, StepSettings(num_seeds=4)), back)
    other = FirstStep(replace(simple.model, fingerprint="another"), StepSettings(num_seeds=3))
    with pytest.raises(IncompatibleModelError, match="calibrate this model"):
        threshold(other, back)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CorruptArtifactError, match="no calibration"):
        Calibration.load(tmp_path / "other.json")


def test_the_published_threshold_is_of_one_model_alone(simple, step):
    with pytest.raises(UserError, match="nemo-localize calibrate"):
        threshold(step, None)
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.4"):
        threshold(FirstStep(simple.model, StepSettings(compat="reference")), None)


def test_too_few_captions_are_refused(step):
    with pytest.raises(UserError, match="at least 4"):
        calibrate(step, ["a", "b", "b", "a"])
