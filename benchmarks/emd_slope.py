"""What an iteration costs as the chain grows: steps per second and fitted slope over K = 0, 1, 2, 4, 8, 16, 32.

    python benchmarks/emd_slope.py [--rounds 5] [--smoke]

A whole iteration (draws, student's loss, chain, generator's loss, both backward passes and Adam's steps) of the zoo's
U-Net of 8 x 8 digits, 16 rows, one thread; a chain in eps and z and one in eps alone. Each round goes through all of
them in turn; figures are medians of CPU time. Beside the fit stands what counting passes forecasts (`passes`). Writes
emd-slope.json, .md and .png in benchmarks/results; `--smoke` takes two rows and writes nothing.
"""

import copy
import io
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np
import torch
from cyclopts import App, Parameter

from diffcore.denoiser import NetworkDenoiser
from diffcore.io.files import write_whole
from diffcore.io.jsonfile import write_json, write_text
from diffcore.models import load
from diffcore.report import Series, lines_with_band
from diffcore.runtime import Runtime
from emd_distill.cost import passes
from emd_distill.distill import Settings, distill
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD
from emd_distill.noise_levels import noise_levels

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = (0, 1, 2, 4, 8, 16, 32)
CHAINS = {"eps and z": 0.01, "eps alone": 0.0}  # step of z
MEASURED = 3  # iterations that one timing means over


def iteration(teacher: NetworkDenoiser, loss: EMD, rows: int, shape: tuple[int, ...]) -> float:
    """Returns CPU milliseconds of one iteration; the first of a training, which allocates, is left out."""
    seen: list[float] = []
    settings = Settings(loss=loss, steps=MEASURED + 1, batch_size=rows)
    distill(
        teacher,
        OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True), 2.5),
        shape,
        settings,
        time_sampler=noise_levels(teacher.schedule, mean=-1.0),
        conditions=lambda step, index: {"class_labels": (index + step) % 10},
        on_step=lambda *_: seen.append(time.process_time()),
    )
    return 1000 * (seen[-1] - seen[0]) / MEASURED


def fitted(steps: list[int], milliseconds: list[float]) -> dict[str, float]:
    """Returns the line through the times, in milliseconds, and how far a point is from it at most.

    Points are weighted by one over their time, so that each counts by its relative error.
    """
    slope, start = np.polyfit(steps, milliseconds, 1, w=1 / np.asarray(milliseconds))
    off = [abs(start + slope * k - value) / value for k, value in zip(steps, milliseconds, strict=True)]
    return {"slope": float(slope), "intercept": float(start), "largest deviation": float(max(off))}


def measured(rounds: int, rows: int) -> dict[str, Any]:
    """Returns times and fits of both chains."""
    model = load("zoo:digits8-edm", Runtime(device="cpu", threads=1))
    cases = {(chain, k): EMD(num_steps=k, gamma_z=gamma_z) for chain, gamma_z in CHAINS.items() for k in STEPS}
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, loss in cases.items():
            times[case].append(iteration(model.denoiser, loss, rows, tuple(model.shape)))
    found: dict[str, Any] = {}
    for chain in CHAINS:
        middle = [statistics.median(times[chain, k]) for k in STEPS]
        forecast = [passes(cases[chain, k]).total for k in STEPS]
        found[chain] = {
            "milliseconds": dict(zip(map(str, STEPS), middle, strict=True)),
            "low": [min(times[chain, k]) for k in STEPS],
            "high": [max(times[chain, k]) for k in STEPS],
            "passes": forecast,
            **fitted(list(STEPS), middle),
        }
    return found


def ratios(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the ratios that are promised, with their bounds."""
    full, alone = (found[chain]["milliseconds"] for chain in CHAINS)
    one_pass = full["0"] / found["eps and z"]["passes"][0]
    rows = [
        ("K=16 over K=0, eps and z (7.9 by counting)", full["16"] / full["0"], None),
        ("eps alone over eps and z at K=16", alone["16"] / full["16"], 0.65),
        ("slope in passes a step, eps and z (4 by counting)", found["eps and z"]["slope"] / one_pass, None),
        ("slope in passes a step, eps alone (2 by counting)", found["eps alone"]["slope"] / one_pass, None),
    ]
    return [
        {"figure": name, "value": value, "at most": bound, "held": bound is None or value <= bound}
        for name, value, bound in rows
    ]


def markdown(found: dict[str, Any], told: list[dict[str, Any]]) -> str:
    """Returns the result as Markdown."""
    lines = ["# What a chain step costs", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines += ["| chain | K | ms of CPU | steps per second | over K=0 | passes, counted over K=0 |"]
    lines += ["|---|---|---|---|---|---|"]
    for chain, one in found.items():
        for k, count in zip(STEPS, one["passes"], strict=True):
            value = one["milliseconds"][str(k)]
            over, counted = value / one["milliseconds"]["0"], count / one["passes"][0]
            lines.append(f"| {chain} | {k} | {value:.1f} | {1000 / value:.2f} | {over:.2f} | {counted:.2f} |")
    lines += [
        "",
        "| chain | slope, ms a step | K=0 by the fit, ms | largest deviation of a point |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {chain} | {one['slope']:.2f} | {one['intercept']:.1f} | {100 * one['largest deviation']:.0f} % |"
        for chain, one in found.items()
    ]
    lines += ["", "| figure | value | at most | held |", "|---|---|---|---|"]
    for row in told:
        bound = "" if row["at most"] is None else f"{row['at most']:g}"
        lines.append(f"| {row['figure']} | {row['value']:.2f} | {bound} | {'yes' if row['held'] else '**no**'} |")
    return "\n".join([*lines, ""])


def picture(found: dict[str, Any]) -> Any:
    """Draws milliseconds by K, with the range over rounds and the fitted lines."""
    series = []
    for place, (chain, one) in enumerate(found.items()):
        middle = list(one["milliseconds"].values())
        series.append(Series(chain, STEPS, middle, one["low"], one["high"], place))
        line = [one["intercept"] + one["slope"] * k for k in STEPS]
        series.append(Series(f"fit: {one['slope']:.1f} ms a step", STEPS, line, None, None, place, 1))
    return lines_with_band(series, x_label="number K of chain steps", y_label="ms of CPU for an iteration")


def run(*, rounds: int = 5, smoke: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Measures; returns 1 where a ratio is above its bound, which a busy machine can cause.

    Args:
        rounds: Number of times that all cases are measured in turn.
        smoke: Two rows, one round, no results.
    """
    torch.set_num_threads(1)
    found = measured(1 if smoke else rounds, 2 if smoke else 16)
    told = ratios(found)
    print(markdown(found, told))
    if not smoke:
        write_json(RESULTS / "emd-slope.json", {"chains": found, "ratios": told})
        write_text(RESULTS / "emd-slope.md", markdown(found, told))
        drawn = io.BytesIO()
        picture(found).savefig(drawn, format="png", dpi=150, metadata={"Software": None})
        write_whole(RESULTS / "emd-slope.png", drawn.getvalue())
    return int(not smoke and not all(row["held"] for row in told))


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(run)
    raise SystemExit(app())
