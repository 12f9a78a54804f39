"""A distillation step at the size of Stable Diffusion 1.5 on a CPU, and doctor's memory forecast beside the peak.

    python benchmarks/emd_full_size.py [--case NAME] [--smoke]

Random weights in the published architecture, latents of 4 x 64 x 64, one row, a chain of one step in eps and z. Each
case runs in a process of its own, whose peak memory is what counts, above what it holds once libraries are imported.
Freed memory is given back to the system, as in `emd-distill train`:

* `whole-third` and `whole-fifth`: the same architecture at .3 and .2 of the width, all weights trained in float32, as
  `emd-distill train` does it; two iterations, since Adam's moments come with the first. Doctor's forecast must be
  within 15 %.
* `sd15-lora`: all 860 million parameters, with LoRAs of rank 16 for generator and student score around the teacher's
  own weights, as `emd-distill train --lora-rank 16` does it; one iteration. The peak must stay below 20 GB too. With
  all weights trained it would be 40 bytes a parameter, 34 GB.

Writes emd-full-size.json and .md in benchmarks/results; `--smoke` has narrow layers and writes nothing.
"""

import copy
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App, Parameter

from diffcore.denoiser import Denoiser, DiscreteSchedule, NetworkDenoiser
from diffcore.io.jsonfile import read_trusted, write_json, write_text
from diffcore.testing import real_configs, tiny
from emd_distill.app.memory import give_back_freed_memory
from emd_distill.distill import Settings, distill
from emd_distill.doctor import memory_estimate
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import LoraDenoiser
from emd_distill.losses import EMD

RESULTS = Path(__file__).resolve().parent / "results"
Case = Literal["whole-fifth", "whole-third", "sd15-lora"]
CASES: tuple[Case, ...] = ("whole-fifth", "whole-third", "sd15-lora")
WIDTHS: dict[Case, tuple[int, ...]] = {"whole-fifth": (64, 128, 256, 256), "whole-third": (96, 192, 384, 384)}
LIMIT, WITHIN, RANK = 20e9, 0.15, 16


COLUMNS = (
    "case", "parameters", "learning", "latents", "precision", "peak, GB", "forecast, GB", "off by", "s an iteration",
    "gate", "held",
)  # fmt: skip
NOTE = (
    "Random weights in the published architecture (whole-fifth and whole-third at .2 and .3 of its width), "
    "one row, one chain step in eps and z, one thread. Peak is what the process held at most above its "
    "libraries."
)


def teacher_of(case: Case, *, smoke: bool) -> NetworkDenoiser:
    """Returns a teacher with random weights in the published architecture."""
    from diffusers import UNet2DConditionModel

    config = json.loads((Path(real_configs.__file__).parent / "sd15" / "unet" / "config.json").read_text())
    if smoke or case in WIDTHS:
        config["block_out_channels"] = (32, 64, 64, 64) if smoke else WIDTHS[case]
    network = tiny.seeded(lambda: cast(Any, UNet2DConditionModel).from_config(config), 0)
    schedule = DiscreteSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    return NetworkDenoiser(network, schedule, "epsilon").eval().requires_grad_(False)


def learning(denoiser: NetworkDenoiser, case: Case) -> Denoiser:
    """Returns a copy that learns: all of it, or a LoRA around the teacher's own weights."""
    if case in WIDTHS:
        return copy.deepcopy(denoiser).requires_grad_(True)
    return LoraDenoiser(denoiser, RANK)


def resident() -> int:
    """Returns the bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(case: Case, side: int, *, smoke: bool) -> dict[str, Any]:
    """Runs a case in this process and returns what it took."""
    torch.set_num_threads(1)
    give_back_freed_memory()
    import peft  # noqa: F401

    condition = {"encoder_hidden_states": torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))}
    before = resident()
    teacher = teacher_of(case, smoke=smoke)
    generator, student = OneStepGenerator(learning(teacher, case), 999), learning(teacher, case)
    dtype = next(teacher.parameters()).dtype
    ends: list[float] = [time.perf_counter()]
    whole = case in WIDTHS
    done = distill(
        teacher,
        generator,
        (4, side, side),
        Settings(loss=EMD(num_steps=1), steps=2 if whole else 1, batch_size=1),
        student=student,
        conditions=lambda step, index: condition,
        on_step=lambda *_: ends.append(time.perf_counter()),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    told = {
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "learning": sum(p.numel() for p in generator.parameters() if p.requires_grad),
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
        "iterations": len(ends) - 1,
        "seconds of the last": ends[-1] - ends[-2],
        "peak": peak,
        "libraries": before,
        "drift": float(done.drift[-1]),
        "dropped": int(done.dropped.sum()),
    }
    del done, generator, student
    rank = 0 if whole else RANK
    forecast = memory_estimate(teacher, (4, side, side), condition, num_steps=1, batch_size=1, lora_rank=rank)
    told |= {"forecast": forecast.total, "activations in the forecast": forecast.activations_per_row}
    return told


def judged(case: Case, told: dict[str, Any]) -> dict[str, Any]:
    """Returns what was measured with the gate of the case."""
    sound = told["dropped"] == 0 and told["drift"] > 0
    off = told["forecast"] / told["peak"] - 1
    held = sound and abs(off) <= WITHIN and told["peak"] < LIMIT
    return {**told, "forecast over peak - 1": off, "gate": f"within {WITHIN:.0%}, below 20 GB", "held": held}


def markdown(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = ["# A step at the size of Stable Diffusion 1.5", "", NOTE, ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for case, one in results.items():
        forecast, off = f"{one['forecast'] / 1e9:.2f}", f"{100 * one['forecast over peak - 1']:+.0f} %"
        lines.append(
            f"| {case} | {one['parameters'] / 1e6:.0f} M | {one['learning'] / 1e6:.1f} M "
            f"| 4 x {one['side']} x {one['side']} | {one['dtype']} "
            f"| {one['peak'] / 1e9:.2f} | {forecast} | {off} | {one['seconds of the last']:.0f} | {one['gate']} "
            f"| {'yes' if one['held'] else '**no**'} |"
        )
    return "\n".join([*lines, ""])


def run(
    *,
    case: Case | None = None,
    side: int = 64,
    here: Annotated[bool, Parameter(negative="", show=False)] = False,
    smoke: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measures each case in a process of its own; returns 1 where a gate is missed.

    Args:
        case: One case; by default all.
        side: Height and width of the latents.
        here: Measure in this process and print the figures as JSON.
        smoke: Narrow layers and small latents, no results.
    """
    if here:
        assert case is not None
        print(json.dumps(measured(case, 16 if smoke else side, smoke=smoke)))
        return 0
    path, held = RESULTS / "emd-full-size.json", True
    chosen: tuple[Case, ...] = (case,) if case else CASES
    for name in chosen:
        command = [
            sys.executable,
            __file__,
            "--here",
            "--case",
            name,
            "--side",
            str(side),
            *(["--smoke"] if smoke else []),
        ]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        told = judged(name, json.loads(answer.splitlines()[-1]))
        results = read_trusted(path) if path.exists() and not smoke else {}
        results = {key: results[key] for key in CASES if key in results and key != name} | {name: told}
        print(markdown({name: told}), told, flush=True)
        if not smoke:
            write_json(path, results)
            write_text(path.with_suffix(".md"), markdown(results))
        held &= told["held"]
    return int(not held and not smoke)


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(run)
    raise SystemExit(app())
