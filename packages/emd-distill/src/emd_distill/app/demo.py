"""The demo: a teacher of handwritten digits becomes a one-step generator, twice, and both are measured.

Diff-Instruct and EM Distillation with a chain of four steps start from the same teacher, see the same draws, and train
for about as many seconds. Nothing is downloaded; the teacher comes with the package.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffcore.cli import track
from diffcore.run import Run
from diffcore.runtime import Runtime
from emd_distill.app.report import write_page
from emd_distill.digits import (
    GENERATOR_SIGMA,
    SHAPE,
    Quality,
    digit_classes,
    evaluated_latents,
    load_judge,
    load_teacher,
    measure,
    teacher_samples,
)
from emd_distill.distill import Settings, distill
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD
from emd_distill.noise_levels import noise_levels

GATE = {"distance": 0.5, "recall": 0.6}
_SHOWN = 10
_LOOKS = 6  # measurements while one generator trains
_SMOOTHED = 50  # iterations that one point of the drift's curve averages


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: Name on the page.
        num_steps: Number K of Langevin steps.
        steps: Number of iterations in the demo, chosen for about equal seconds.
        full_steps: The same with --full.
    """

    name: str
    num_steps: int
    steps: int
    full_steps: int


ARMS = (
    Arm("Diff-Instruct (K = 0)", 0, 1500, 3500),
    Arm("EM Distillation, K = 4", 4, 970, 2300),
    Arm("EM Distillation, K = 16", 16, 0, 950),
)


def run_demo(out: Path, *, full: bool = False) -> dict[str, Any]:
    """Trains and measures the generators; returns the result, which `result.json` repeats.

    A demo that was interrupted goes on with the generators that are not finished.

    Args:
        out: Run folder; a finished demo is only read.
        full: Train for about a minute each, and with a chain of sixteen steps too.
    """
    Runtime(device="cpu", threads=1).apply_threads()
    with Run.open(out, command="emd-distill demo", config={"full": full, "seed": 0}, inputs={}) as run:
        if run.finished:
            return run.result
        arms = [arm for arm in ARMS if full or arm.steps]
        judge, teacher = load_judge(), load_teacher()
        z, condition = evaluated_latents()
        labels = condition["class_labels"]
        drawn = {"teacher, 18 steps": teacher_samples(teacher, z, condition)}
        with torch.no_grad():
            drawn["teacher, 1 step"] = OneStepGenerator(teacher, GENERATOR_SIGMA)(z, condition)
        quality = {name: measure(x, labels, judge) for name, x in drawn.items()}
        for place, arm in enumerate(arms):
            if not run.has(f"arm-{place}"):
                _train(run, place, arm, arm.full_steps if full else arm.steps)
                write_page(run)
            part = run.load(f"arm-{place}")
            drawn[arm.name] = part.tensors["samples"]
            quality[arm.name] = Quality(**part.fields["quality"][-1])
        _keep_table(run, arms, quality)
        shown = torch.stack([x[:_SHOWN] for x in drawn.values()])
        run.save(
            "grids",
            {"pictures": (shown / 2 + 0.5).clamp(0, 1)},
            labels=list(drawn),
            caption="The same latents and classes in each row, so that columns can be compared.",
        )
        result = _told(run, arms, quality)
        run.finish(result)
        write_page(run)
        return result


def _train(run: Run, place: int, arm: Arm, steps: int) -> None:
    """Trains one generator and keeps its samples, and how near they were along the way."""
    teacher, judge = load_teacher(), load_judge()
    generator = OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True), GENERATOR_SIGMA)
    z, condition = evaluated_latents()
    seconds, quality = list[float](), list[dict[str, float]]()
    settings = Settings(
        loss=EMD(num_steps=arm.num_steps, gamma_z=0.0),
        steps=steps,
        batch_size=128,
        learning_rate=3e-4,
        student_learning_rate=1e-3,
        clip=None,
        ema=0.998,
    )
    bar = iter(track(range(steps), arm.name))
    spent, begun = 0.0, time.perf_counter()

    def look(step: int, average: torch.nn.Module) -> None:
        nonlocal spent, begun
        next(bar, None)
        if (step + 1) % max(steps // _LOOKS, 1) and step + 1 < steps:
            return
        spent += time.perf_counter() - begun
        with torch.no_grad():
            samples = average(z, condition)
        seconds.append(spent)
        quality.append(measure(samples, condition["class_labels"], judge).to_json())
        begun = time.perf_counter()

    done = distill(
        teacher,
        generator,
        SHAPE,
        settings,
        time_sampler=noise_levels(teacher.schedule, mean=-1.0, low=0.02, high=20.0),
        conditions=digit_classes,
        on_step=lambda step, told, average: look(step, average),
    )
    next(bar, None)
    with torch.no_grad():
        samples = done.generator(z, condition)
    parts = done.drift.split(_SMOOTHED)
    run.save(
        f"arm-{place}",
        {"samples": samples, **{f"weight.{name}": value for name, value in done.generator.state_dict().items()}},
        name=arm.name,
        steps=steps,
        seconds=seconds,
        quality=quality,
        drift=[float(part.mean()) for part in parts],
        drift_steps=[_SMOOTHED * (place + 1) for place in range(len(parts))],
        dropped=int(done.dropped.sum()),
    )


def _keep_table(run: Run, arms: list[Arm], quality: dict[str, Quality]) -> None:
    rows = [
        {"digits of": name, **{key.replace("_", " "): round(value, 3) for key, value in one.to_json().items()}}
        for name, one in quality.items()
    ]
    run.keep_table(
        "quality",
        rows,
        "1790 digits of each against the 1797 real ones. Distance: Fréchet distance on pixels in [-1, 1]; one half of "
        "the real digits is .28 from the other. Precision, recall, coverage: with five neighbours. Worst spread: that "
        "of the class whose digits are most alike, relative to the real one.",
    )


def _told(run: Run, arms: list[Arm], quality: dict[str, Quality]) -> dict[str, Any]:
    """Returns the result: figures, gate, and what the chain bought."""
    parts = [run.load(f"arm-{place}").fields for place in range(len(arms))]
    best = min(arms, key=lambda arm: quality[arm.name].distance)
    plain, chain = quality[arms[0].name], quality[arms[1].name]
    held = quality[best.name].distance <= GATE["distance"] and quality[best.name].recall >= GATE["recall"]
    before, teacher = quality["teacher, 1 step"], quality["teacher, 18 steps"]
    where = _apart(plain.distance, chain.distance)
    bought = (
        f"At about equal seconds, {parts[1]['steps']:,} iterations with a chain of four steps are {where} "
        f"{parts[0]['steps']:,} without: distance {chain.distance:.2f} against {plain.distance:.2f}, recall "
        f"{chain.recall:.2f} against {plain.recall:.2f}. "
    )
    if where == "level with":
        bought += (
            "A chain buys iterations here, and not time: the noise levels reach far above the digits, so that no mode "
            "can be lost for good. It decides where noise is low, the start is poor, or modes are far apart."
        )
    return {
        "answer": f"In one step, {best.name} comes to a Fréchet distance of {quality[best.name].distance:.2f} and a "
        f"recall of {quality[best.name].recall:.2f}; the teacher in one step is at {before.distance:.1f} and "
        f"{before.recall:.2f}, in 18 steps at {teacher.distance:.2f} and {teacher.recall:.2f}.",
        "bought": bought,
        "quality": {name: one.to_json() for name, one in quality.items()},
        "seconds": {arm.name: part["seconds"][-1] for arm, part in zip(arms, parts, strict=True)},
        "iterations": {arm.name: part["steps"] for arm, part in zip(arms, parts, strict=True)},
        "dropped_rows": {arm.name: part["dropped"] for arm, part in zip(arms, parts, strict=True)},
        "gate": GATE,
        "held": held,
    }


def _apart(plain: float, chain: float) -> str:
    if abs(plain - chain) < 0.05:
        return "level with"
    return "ahead of" if chain < plain else "behind"
