"""The threshold above which a caption counts as memorised, from captions that are not.

References:
    Hintersdorf, Struppek et al. 2024, section 4: mean plus one standard deviation of the largest similarity of a
    caption's seeds. That is a rule of thumb, not a rate; so the rate of false alarms is measured on other captions.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError, printable
from diffcore.io.jsonfile import read_object, write_json
from diffcore.run import Run
from nemo_localize.detect import encode, measure
from nemo_localize.first_step import FirstStep
from nemo_localize.settings import described, require_tau
from nemo_localize.units import Rows, in_units

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PUBLISHED_TAU = 0.428  # Stable Diffusion v1.4, 512 pixels, 50 DDIM steps: paper, section 4
_PUBLISHED: dict[str, Any] = {  # what that threshold is of: the defaults of the published code
    "width of the text": 768,
    "latent": (4, 64, 64),
    "steps": 50,
    "first_seed": 1,
    "num_seeds": 10,
    "guidance_scale": 1.0,
}
_SCHEMA = "nemo-localize/calibration@1"
_DRAWS = 1000
_QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Calibration:
    """What ordinary captions score, and the threshold that follows.

    Attributes:
        tau: The threshold: a caption is memorised where a seed's consistency is above it.
        rule: How tau follows from the captions: "mean + sd", or "quantile 0.99".
        mean: Mean of the captions' largest consistency.
        sd: Its standard deviation.
        quantiles: By probability.
        num_prompts: Captions that mean, sd and quantiles are from.
        false_alarm_rate: Share of further ordinary captions above tau.
        num_checked: How many those are.
        failed: Captions that gave no number.
        digest: Of everything that a threshold depends on but the weights.
        fingerprint: Of the model.
        settings: Of the step, for people.
        interval: Where tau lies with 95 % confidence: over captions drawn again from those that it is from. None in
            calibrations that were made before it was.
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
            IncompatibleModelError: Names what differs.
        """
        if self.digest != step.digest:
            now, then = described(step.settings), {"at_step": 1} | self.settings  # once it was always the first
            differing = [name for name in now if then.get(name) != now[name]]
            what = ", ".join(f"{name} {printable(then.get(name))} -> {now[name]}" for name in differing)
            raise IncompatibleModelError(
                f"the calibration is of other settings ({what or 'latent size, timestep, precision or similarity'}); "
                "calibrate again under these"
            )
        if self.fingerprint != step.model.fingerprint:
            raise IncompatibleModelError(f"the calibration is not of {step.model.name}; calibrate this model")

    def save(self, path: Path) -> Path:
        """Writes the calibration as JSON."""
        return write_json(path, {"schema": _SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads what `save` wrote.

        Raises:
            CorruptArtifactError: The file is damaged, or something else.
        """
        found = read_object(path)
        if found.pop("schema", None) != _SCHEMA:
            raise CorruptArtifactError(
                f"{printable(path, 300)} is no calibration; make one with: nemo-localize calibrate"
            )
        try:
            interval = found.pop("interval", None)
            return cls(**found, interval=interval and tuple(interval))
        except TypeError as error:
            raise CorruptArtifactError(f"{printable(path, 300)} is damaged ({error}); calibrate again") from error


def calibrate(
    step: FirstStep,
    prompts: Sequence[str],
    *,
    quantile: float | None = None,
    unit_size: int = 16,
    run: Run | None = None,
    fabric: "Fabric | None" = None,
) -> Calibration:
    """Finds the threshold of a model from ordinary captions, and how often it is wrong on others of them.

    Every second distinct caption sets the threshold; the others check it.

    Args:
        step: The model and the settings under which captions will be judged.
        prompts: Captions that are not memorised; the paper took 50 000, a thousand give tau to about 0.003.
        quantile: Take this quantile instead of mean plus standard deviation; where few ordinary captions are allowed
            to be called memorised, 0.99 is the better rule.
        unit_size: Captions that share batches.
        run: Where to keep parts, and resume from.
        fabric: Processes that share the work.

    Raises:
        UserError: Fewer than four distinct captions have a score, or the quantile is none.
    """
    if quantile is not None and not 0 < quantile < 1:
        raise UserError(f"--quantile is {quantile}; give a number between 0 and 1, such as 0.99")
    rows = scored(step, prompts, name="calibration", unit_size=unit_size, run=run, fabric=fabric)
    levels = [max(row["consistency"]) for row in rows if row["error"] is None]
    if len(levels) < 4:
        raise UserError(f"{len(levels)} distinct captions have a score; a threshold needs at least 4, better 1000")
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
    """Returns the threshold of captions, or of each row of them."""
    if quantile is None:
        return levels.mean(-1) + levels.std(-1, ddof=1)
    return np.quantile(levels, quantile, axis=-1)


def _interval(levels: np.ndarray, quantile: float | None) -> tuple[float, float]:
    """Returns the bootstrap's 95 % interval of the threshold."""
    drawn = np.random.default_rng(0).choice(levels, (_DRAWS, len(levels)))
    low, high = np.quantile(_tau(drawn, quantile), (0.025, 0.975))
    return float(low), float(high)


def scored(
    step: FirstStep,
    prompts: Sequence[str],
    *,
    name: str,
    unit_size: int = 16,
    run: Run | None = None,
    fabric: "Fabric | None" = None,
) -> Rows:
    """Returns the consistency of each distinct caption, as `consistency_rows`; what the run has is read.

    Args:
        step: The model and its step.
        prompts: Captions.
        name: Of this kind of work in the run.
        unit_size: Captions that share batches.
        run: Where to keep parts, and resume from.
        fabric: Processes that share the work.
    """
    distinct = list(dict.fromkeys(prompts))
    return in_units(
        distinct, lambda unit: consistency_rows(step, unit), unit_size=unit_size, run=run, name=name, fabric=fabric
    )


def consistency_rows(step: FirstStep, prompts: Sequence[str]) -> Rows:
    """Returns each caption's consistency per seed, or why it has none."""
    cond, truncated, lost = encode(step, prompts)
    found = measure(step, cond)
    return [
        {
            "prompt": prompt,
            "consistency": found.consistency[i],
            "truncated": truncated[i],
            "lost": lost[i],
            "error": found.errors.get(i),
        }
        for i, prompt in enumerate(prompts)
    ]


def threshold(step: FirstStep, calibration: Calibration | None, *, tau: float | None = None) -> float:
    """Returns tau: the one asked for, the calibration's, or the published one where its code and model are reproduced.

    Args:
        step: The model and the settings under which captions will be judged.
        calibration: Of these.
        tau: Take this one; whether it fits the model is for the caller to know.

    Raises:
        IncompatibleModelError: The calibration is of other settings or of another model.
        UserError: There are both, or neither and the published one does not apply.
    """
    if tau is not None:
        if calibration is not None:
            raise UserError(f"--tau {tau} and --calibration are two thresholds; give one of them")
        require_tau(tau)
        return tau
    if calibration is not None:
        calibration.require(step)
        return calibration.tau
    config: Any = step.model.backbone.config
    if not step.reference:
        raise UserError(
            "a threshold belongs to a model and its settings; find this one's with: nemo-localize calibrate, "
            f"give one with --tau, or take the published {PUBLISHED_TAU} with --compat reference"
        )
    now = {"width of the text": config["cross_attention_dim"], "latent": step.shape, **described(step.settings)}
    other = [f"{name} {now[name]} instead of {value}" for name, value in _PUBLISHED.items() if now[name] != value]
    if other:
        raise UserError(
            f"the published threshold {PUBLISHED_TAU} is of Stable Diffusion 1.4 at 512 pixels, 50 steps, seed 1, ten "
            f"seeds and no guidance alone; here it is {', '.join(other)}; find this one's with: nemo-localize "
            "calibrate, or give one with --tau"
        )
    return PUBLISHED_TAU
