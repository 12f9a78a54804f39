"""The threshold tau above which a prompt counts as memorised, from prompts that are not.

    tau = mean + sd over ordinary prompts y of max_s c(y, s),   or a quantile of it

References:
    Hintersdorf, Struppek et al. 2024, section 4: mean plus one standard deviation of the largest similarity of a
    prompt's seeds. This fixes no rate of false alarms, which is therefore measured on other ordinary prompts.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from nemo_localize.detect import detect
from nemo_localize.first_step import FirstStep
from nemo_localize.settings import described, require_tau

PUBLISHED_TAU = 0.428  # Stable Diffusion v1.4, 512 pixels, 50 DDIM steps: paper, section 4
_PUBLISHED: dict[str, Any] = {  # the settings it was found under, defaults of the published code
    "width of the text": 768,
    "latent": (4, 64, 64),
    "steps": 50,
    "first_seed": 1,
    "num_seeds": 10,
    "guidance_scale": 1.0,
}
_DRAWS = 1000
_QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Calibration:
    """The threshold of a model, and the consistency of ordinary prompts that it follows from.

    Attributes:
        tau: Threshold: a prompt is memorised where a seed's consistency is above it.
        rule: Rule by which tau follows from the prompts: "mean + sd", or "quantile 0.99".
        mean: Mean of the prompts' largest consistency.
        sd: Standard deviation of that consistency.
        quantiles: Quantiles of that consistency by probability.
        num_prompts: Number of prompts behind mean, sd and quantiles.
        false_alarm_rate: Share of other ordinary prompts that lie above tau.
        num_checked: Number of those other prompts.
        failed: Number of prompts whose consistency could not be computed.
        digest: Digest of all that a threshold depends on, without the weights.
        fingerprint: Fingerprint of the model's weights.
        settings: Settings of the step, for readers of the file.
        interval: Bootstrap interval of tau at 95 % confidence; None in calibrations of earlier versions.
    """

    tau: float
    rule: str
    mean: float
    sd: float
    quantiles: dict[str, float]
    num_prompts: int
    false_alarm_rate: float
    num_checked: int
    failed: int
    digest: str
    fingerprint: str
    settings: dict[str, Any]
    interval: tuple[float, float] | None = None

    def require(self, step: FirstStep) -> None:
        """Refuses a threshold that was found under other settings or on another model.

        Raises:
            IncompatibleModelError: The settings or the model differ; the message names how.
        """
        if self.digest != step.digest:
            now, then = described(step.settings), {"at_step": 1} | self.settings  # earlier versions took the first
            differing = [name for name in now if then.get(name) != now[name]]
            what = ", ".join(f"{name} {printable(then.get(name))} -> {now[name]}" for name in differing)
            raise IncompatibleModelError(
                f"the calibration is of other settings ({what or 'latent size, timestep, precision or similarity'}); "
                "calibrate again under these"
            )
        if self.fingerprint != step.model.fingerprint:
            raise IncompatibleModelError(f"the calibration is not of {step.model.name}; calibrate this model")


def calibrate(
    model: DiffusionModel | FirstStep,
    ordinary: Sequence[str],
    *,
    quantile: float | None = None,
    unit_size: int = 16,
    map: Map = each_unit,
) -> Calibration:
    """Finds the threshold of a model from ordinary prompts, and its rate of false alarms on others.

    Every second distinct prompt sets the threshold; the others check it.

    Args:
        model: A text-conditioned U-Net, or its `FirstStep` with the settings under which prompts will be judged.
        ordinary: Prompts that are not memorised; the paper took 50 000, and a thousand fix tau to about 0.003.
        quantile: Quantile that replaces mean plus standard deviation; 0.99 keeps false alarms rare.
        unit_size: Number of prompts that share batches; an interruption loses at most one such group.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.

    Raises:
        UserError: Fewer than four distinct prompts have a score, or the quantile is not between 0 and 1.

    Example:
        >>> from nemo_localize.planted import ordinary_captions, planted_model
        >>> found = calibrate(planted_model([], side=8).model, ordinary_captions(8))
        >>> 0 < found.tau < 1, found.num_prompts
        (True, 4)
    """
    if quantile is not None and not 0 < quantile < 1:
        raise UserError(f"`quantile` is {quantile}; give a number between 0 and 1, such as 0.99")
    step, distinct = FirstStep.of(model), list(dict.fromkeys(ordinary))
    rows = detect(step, distinct, unit_size=unit_size, name="calibration", map=map)
    levels = [row.level for row in rows if row.error is None]
    if len(levels) < 4:
        raise UserError(f"{len(levels)} distinct prompts have a score; a threshold needs at least 4, better 1000")
    fitted, checked = levels[::2], levels[1::2]
    mean, sd = statistics.fmean(fitted), statistics.stdev(fitted)
    tau = float(_tau(np.asarray(fitted), quantile))
    return Calibration(
        tau=tau,
        rule="mean + sd" if quantile is None else f"quantile {quantile:g}",
        mean=mean,
        sd=sd,
        quantiles={f"{q:g}": float(np.quantile(fitted, q)) for q in _QUANTILES},
        num_prompts=len(fitted),
        false_alarm_rate=sum(level > tau for level in checked) / len(checked),
        num_checked=len(checked),
        failed=len(rows) - len(levels),
        digest=step.digest,
        fingerprint=step.model.fingerprint,
        settings=described(step.settings),
        interval=_interval(np.asarray(fitted), quantile),
    )


def _tau(levels: np.ndarray, quantile: float | None) -> np.ndarray | np.floating:
    """Returns the threshold that follows from levels of consistency, along the last axis."""
    if quantile is None:
        return levels.mean(-1) + levels.std(-1, ddof=1)
    return np.quantile(levels, quantile, axis=-1)


def _interval(levels: np.ndarray, quantile: float | None) -> tuple[float, float]:
    """Returns the bootstrap's 95 % interval of the threshold."""
    drawn = np.random.default_rng(0).choice(levels, (_DRAWS, len(levels)))
    low, high = np.quantile(_tau(drawn, quantile), (0.025, 0.975))
    return float(low), float(high)


def threshold(
    step: FirstStep,
    calibration: Calibration | None = None,
    *,
    tau: float | None = None,
    ordinary: Sequence[str] = (),
    map: Map = each_unit,
) -> float:
    """Returns tau: the one given, a calibration's, the published one, or one found from ordinary prompts.

    Args:
        step: The model and the settings under which prompts will be judged.
        calibration: Threshold that was found before under the same settings.
        tau: Threshold that is taken as given, whether or not it fits the model.
        ordinary: Prompts that are not memorised, which give the threshold where none is known.
        map: Loop over the ordinary prompts, as for `calibrate`.

    Raises:
        IncompatibleModelError: The calibration is of other settings or of another model.
        UserError: Two thresholds are given, or none and the published one does not apply.
    """
    if tau is not None:
        if calibration is not None:
            raise UserError(f"`tau` {tau} and `calibration` are two thresholds; give one of them")
        require_tau(tau)
        return tau
    if calibration is not None:
        calibration.require(step)
        return calibration.tau
    if step.published:
        return _published_tau(step)
    if ordinary:
        return calibrate(step, ordinary, map=map).tau
    raise UserError(
        "a threshold belongs to a model and its settings; find this one's with calibrate, give one with `tau`, or take "
        f"the published {PUBLISHED_TAU} with `compat` published"
    )


def _published_tau(step: FirstStep) -> float:
    config: Any = step.model.backbone.config
    now = {"width of the text": config["cross_attention_dim"], "latent": step.shape, **described(step.settings)}
    other = [f"{name} {now[name]} instead of {value}" for name, value in _PUBLISHED.items() if now[name] != value]
    if other:
        raise UserError(
            f"the published threshold {PUBLISHED_TAU} is of Stable Diffusion 1.4 at 512 pixels, 50 steps, seed 1, ten "
            f"seeds and no guidance alone; here it is {', '.join(other)}; find this one's with calibrate, or give one "
            "with `tau`"
        )
    return PUBLISHED_TAU
