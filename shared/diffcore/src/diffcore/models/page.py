"""A page about a model: what it is made of, and its noise schedule drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffcore.denoiser import DiscreteSchedule, NoiseSchedule
from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run


def write_model_page(described: Mapping[str, Any], schedule: NoiseSchedule | None, run: Run) -> Path:
    """Writes `report.html` into a run folder.

    Args:
        described: Of `describe`, with `prediction_type`.
        schedule: Of the model, if its files tell.
        run: The folder.
    """
    report = Report(described["name"], run)
    predicts = f", which predicts {described['prediction_type']}" if described["prediction_type"] else ""
    report.answer(f"{described['class']}{predicts}: {described['parameters']:,} parameters, safe to load.")
    if described["warnings"]:
        report.section("Warnings").points(*described["warnings"])
    report.section("Components").table(described["components"], f"Fingerprint {described['fingerprint']}")
    if schedule is not None:
        figure = lines_with_band(schedule_lines(schedule), x_label="time, from data to noise", y_label="factor")
        caption = "Factors of the clean sample (alpha) and of the noise (sigma) in x_t along the schedule."
        report.section("Noise schedule").figure(run.figure("schedule", figure), caption)
    return report.save(run.folder / "report.html")


def schedule_lines(schedule: NoiseSchedule, points: int = 100) -> list[Series]:
    """Returns alpha and sigma over the position in the schedule, 0 at the clean end and 1 at the noisy one.

    The variance-exploding sigma is shown as a share, sigma / (alpha + sigma), like alpha: both then lie in [0, 1].
    """
    if isinstance(schedule, DiscreteSchedule):  # some of its solvers take few steps only
        last = schedule.num_timesteps - 1
        times = torch.linspace(0, last, min(points, last + 1), dtype=torch.float64).round()
    else:
        times = schedule.timesteps(points).flip(0)
    alpha, sigma = schedule.alpha_sigma(times)
    if bool((sigma > 1).any()):
        alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
    position = torch.linspace(0, 1, len(times)).numpy()
    return [Series("alpha", position, alpha.numpy()), Series("sigma", position, sigma.numpy())]
