import statistics
from dataclasses import replace

import pytest

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError
from nemo_localize.app.options import ImageOptions
from nemo_localize.calibrate import Calibration, calibrate, threshold
from nemo_localize.detect import detect
from nemo_localize.files.calibration import load_calibration, save_calibration
from nemo_localize.first_step import FirstStep
from nemo_localize.planted import ordinary_captions
from nemo_localize.settings import ImageSettings, StepSettings

TRIGGER = "portrait of 1917 no 1"


@pytest.fixture(scope="module")
def step(simple) -> FirstStep:
    return FirstStep(simple.model, StepSettings(num_seeds=3))


@pytest.fixture(scope="module")
def calibrated(step) -> Calibration:
    return calibrate(step, [*ordinary_captions(11, seed=5), TRIGGER])


def test_tau_is_mean_plus_one_deviation_of_one_half(step, calibrated):
    captions = [*ordinary_captions(11, seed=5), TRIGGER]
    levels = [found.level for found in detect(step, captions)]
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
    back = load_calibration(save_calibration(tmp_path / "calibration.json", calibrated))
    assert back == calibrated
    assert threshold(step, back) == calibrated.tau
    with pytest.raises(IncompatibleModelError, match="num_seeds 3 -> 4"):
        threshold(FirstStep(simple.model, StepSettings(num_seeds=4)), back)
    other = FirstStep(replace(simple.model, fingerprint="another"), StepSettings(num_seeds=3))
    with pytest.raises(IncompatibleModelError, match="calibrate this model"):
        threshold(other, back)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CorruptArtifactError, match="no calibration"):
        load_calibration(tmp_path / "other.json")


def test_the_published_threshold_is_of_one_model_alone(simple, step):
    with pytest.raises(UserError, match="find this one's with calibrate"):
        threshold(step, None)
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.4"):
        threshold(FirstStep(simple.model, StepSettings(compat="published")), None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_seeds": 4}, "num_seeds 4 instead of 10"),
        ({"first_seed": 2}, "first_seed 2 instead of 1"),
        ({"guidance_scale": 7.0}, "guidance_scale 7.0 instead of 1.0"),
        ({"steps": 25}, "steps 25 instead of 50"),
        ({}, ""),
    ],
)
def test_the_published_threshold_is_of_its_settings_alone(simple, monkeypatch, settings, told):
    config = {**simple.model.backbone.config, "cross_attention_dim": 768}
    monkeypatch.setattr(simple.model.backbone, "_internal_dict", config)
    step = FirstStep(simple.model, StepSettings(compat="published", **settings))
    step.shape = (4, 64, 64)
    if told:
        with pytest.raises(UserError, match=f"here it is {told};"):
            threshold(step, None)
    else:
        assert threshold(step, None) == 0.428
        step.shape = (4, 96, 96)
        with pytest.raises(UserError, match=r"latent \(4, 96, 96\) instead of \(4, 64, 64\)"):
            threshold(step, None)


def test_a_threshold_may_be_given(step, calibrated):
    assert threshold(step, None, tau=0.3) == 0.3
    with pytest.raises(UserError, match="two thresholds"):
        threshold(step, calibrated, tau=0.3)
    for tau in (0.0, 1.0, float("nan"), -0.1):
        with pytest.raises(UserError, match="`tau` is"):
            threshold(step, None, tau=tau)


def test_another_timestep_is_another_threshold(simple, step, calibrated):
    first = FirstStep(simple.model, StepSettings(num_seeds=3, at_step=1))
    assert (first.t, step.t) == (981, 961)
    with pytest.raises(IncompatibleModelError, match="at_step 2 -> 1"):
        threshold(first, calibrated)
    # Once it was always the first, and no calibration said so.
    old = {name: value for name, value in calibrated.settings.items() if name != "at_step"}
    earlier = replace(calibrated, digest=first.digest, settings=old)
    assert threshold(first, earlier) == calibrated.tau
    with pytest.raises(IncompatibleModelError, match="at_step 1 -> 2"):
        threshold(step, earlier)


def test_no_guidance_is_said_in_two_ways(simple):
    assert StepSettings(guidance_scale=0.0) == StepSettings(guidance_scale=1.0) == StepSettings()
    assert ImageSettings(0.0) == ImageSettings(1.0)
    assert ImageOptions(image_guidance=0.0) == ImageOptions(image_guidance=1.0)
    captions = ["a", "portrait of 1917 no 1"]
    off = [detect(FirstStep(simple.model, StepSettings(num_seeds=2, guidance_scale=g)), captions) for g in (0.0, 1.0)]
    assert off[0] == off[1]
    assert off[0][0].consistency != off[0][1].consistency  # not the empty caption's, both times
    with pytest.raises(UserError, match="guidance scale is nan"):
        StepSettings(guidance_scale=float("nan"))


def test_too_few_captions_are_refused(step):
    with pytest.raises(UserError, match="at least 4"):
        calibrate(step, ["a", "b", "b", "a"])
