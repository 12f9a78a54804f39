"""`diffcore info`: a description of a model from its files alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffcore.cli.app import emit, settings
from diffcore.cli.job import Job
from diffcore.cli.options import LoadingAny, Output

if TYPE_CHECKING:
    from diffcore.denoiser import NoiseSchedule
    from diffcore.report import Series
    from diffcore.run import Run


def info(model: str, *, loading: LoadingAny = LoadingAny(), output: Output = Output()) -> int:
    """Describe a model without loading it: components, sizes, schedule, fingerprint.

    Shortest form: diffcore info FOLDER

    A model that is unsafe or broken is refused with the reason, exit code 2. With --out, writes a report with the noise
    schedule drawn.

    Args:
        model: Pipeline folder, backbone folder, or safetensors file.
    """
    from diffcore.checkpoint import inspect_model
    from diffcore.checkpoint.describe import describe
    from diffcore.models import resolve
    from diffcore.models.schedules import schedule_of

    if output.dry_run:
        read = model if loading.download else resolve(model).name
        emit({"reads": read, "writes": "nothing" if output.out is None else output.out}, output.json)
        return 0
    path = resolve(model, download=loading.download)
    inventory = inspect_model(path, allow_pickle=loading.allow_pickle)
    result = describe(inventory)
    prediction, schedule, known_from = schedule_of(inventory, loading.prediction_type)
    if known_from and loading.prediction_type:
        known_from = "--prediction-type"
    result |= {"prediction_type": prediction, "prediction_type_from": known_from}
    result["schedule"] = None if schedule is None else repr(schedule)
    if output.out is None:
        emit(result if output.json else _in_lines(result), output.json)
        return 0
    inputs = {result["name"]: result["fingerprint"]}
    job = Job("diffcore info", output.out, output, settings(loading=loading), inputs)
    return job(lambda *_: result, plan={}, report=lambda run: _write_page(run, schedule), shown=_in_lines)


def _write_page(run: "Run", schedule: "NoiseSchedule | None") -> None:
    """Writes a page about the model: its components, and its noise schedule drawn where the files tell it."""
    from diffcore.report import Report, lines_with_band

    told = run.result
    report = Report(told["name"], run)
    predicts = f", which predicts {told['prediction_type']}" if told["prediction_type"] else ""
    report.answer(f"{told['class']}{predicts}: {told['parameters']:,} parameters, safe to load.")
    if told["warnings"]:
        report.section("Warnings").points(*told["warnings"])
    report.section("Components").table(told["components"], f"Fingerprint {told['fingerprint']}")
    if schedule is not None:
        figure = lines_with_band(_schedule_lines(schedule), x_label="time, from data to noise", y_label="factor")
        caption = "Factors of the clean sample (alpha) and of the noise (sigma) in x_t along the schedule."
        report.section("Noise schedule").figure(run.figure("schedule", figure), caption)
    report.save(run.folder / "report.html")


def _schedule_lines(schedule: "NoiseSchedule", points: int = 100) -> "list[Series]":
    """Returns alpha and sigma over the position in the schedule, 0 at the clean end and 1 at the noisy one.

    The variance-exploding sigma is shown as a share, sigma / (alpha + sigma), like alpha: both then lie in [0, 1].
    """
    import torch

    from diffcore.denoiser import DiscreteSchedule
    from diffcore.report import Series

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


def _in_lines(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line per component in place of the table."""
    lines = {
        row["component"]: ", ".join(
            str(part)
            for part in (
                row["class"],
                f"{row['parameters']:,} parameters" if row["parameters"] else None,
                f"{row['megabytes']:g} MB" if row["megabytes"] else None,
                row["precision"] or None,
                row["variant"],
            )
            if part
        )
        for row in result["components"]
    }
    warnings = "; ".join(result["warnings"]) or "none"
    return {**result, "parameters": f"{result['parameters']:,}", "warnings": warnings, "components": lines}
