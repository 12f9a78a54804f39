"""Digits in one step from the zoo's U-Net teacher: Diff-Instruct and EM Distillation at equal seconds of one core.

    python benchmarks/emd_digits.py [--seeds 1] [--minutes 20] [--width 1] [--out runs/emd-digits] [--smoke]

Each seed trains both for half of the minutes; `--seeds 3 --minutes 20` is the hour. A finished training is kept, and
an interrupted run goes on with the next one. Writes emd-digits.json, .md and .png in benchmarks/results. With a width
below 1 the generator is a smaller U-Net with random weights, which is first regressed to the teacher in one call; the
results are emd-digits-small. `--smoke` trains for two iterations and writes no results.
"""

import copy
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App, Parameter
from torch import Tensor

from diffcore.denoiser import NetworkDenoiser
from diffcore.io.files import write_whole
from diffcore.io.jsonfile import write_json, write_text
from diffcore.models import load
from diffcore.report import Report, Series, image_grid, lines_with_band
from diffcore.run import Run
from diffcore.runtime import Runtime
from emd_distill.digits import (
    GENERATOR_SIGMA,
    SHAPE,
    digit_classes,
    evaluated_latents,
    load_judge,
    measure,
    teacher_samples,
)
from emd_distill.distill import Distilled, Settings, distill
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD, GeneratorLoss
from emd_distill.noise_levels import noise_levels
from emd_distill.warm_start import smaller, warm_start

RESULTS = Path(__file__).resolve().parent / "results"
ARMS = {
    "Diff-Instruct": EMD(num_steps=0),
    "EM Distillation, K=4, eps only": EMD(num_steps=4, gamma_z=0.0),
}
BATCH, LOOKS, SHOWN, WARM_STEPS = 64, 8, 10, 500


def teacher_of() -> NetworkDenoiser:
    """Returns the zoo's class-conditional U-Net of 8 x 8 digits."""
    return load("zoo:digits8-edm", Runtime(device="cpu", threads=1)).denoiser.requires_grad_(False).eval()


def generator_of(teacher: NetworkDenoiser, seed: int, width: float, steps: int = WARM_STEPS) -> OneStepGenerator:
    """Returns the generator that a training begins with: the teacher's weights, or a smaller network warmed up."""
    if width == 1:
        return OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True), GENERATOR_SIGMA)
    generator = OneStepGenerator(smaller(teacher, width, seed=seed), GENERATOR_SIGMA)
    start = OneStepGenerator(teacher, GENERATOR_SIGMA)
    warm_start(
        generator, start, SHAPE, conditions=digit_classes, steps=steps, batch_size=BATCH, learning_rate=2e-3, seed=seed
    )
    return generator


def trained(
    arm: str, teacher: NetworkDenoiser, begun: OneStepGenerator, seed: int, steps: int, on_step: Any = None
) -> Distilled:
    """Trains one generator."""
    settings = Settings(
        loss=ARMS[arm], steps=steps, batch_size=BATCH, learning_rate=3e-4, student_learning_rate=1e-3, clip=None,
        ema=0.995, seed=seed,
    )  # fmt: skip
    return distill(
        teacher,
        copy.deepcopy(begun),
        SHAPE,
        settings,
        time_sampler=noise_levels(teacher.schedule, mean=-1.0, low=0.02, high=20.0),
        conditions=digit_classes,
        on_step=on_step,
    )


def costs(run: Run, width: float) -> dict[str, float]:
    """Returns the CPU seconds of an iteration of each arm; measured once, so that a resumed run is the same run."""
    if not run.has("costs"):
        teacher = teacher_of()
        generator = generator_of(teacher, 0, width, 1)
        found: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(3):  # in turn, so that a busy machine slows both alike
            for arm in ARMS:
                begun = time.process_time()
                trained(arm, teacher, generator, 0, 4)
                found[arm].append((time.process_time() - begun) / 4)
        run.save("costs", {}, seconds={arm: min(values) for arm, values in found.items()})
    return run.load("costs").fields["seconds"]


def train_arm(run: Run, arm: str, seed: int, steps: int, width: float) -> None:
    """Trains one generator, looks at it along the way, and keeps its samples."""
    key = f"seed-{seed}-{list(ARMS).index(arm)}"
    if run.has(key):
        return
    judge, (z, condition) = load_judge(), evaluated_latents()
    looks: list[dict[str, float]] = []
    teacher = teacher_of()
    generator = generator_of(teacher, seed, width, min(WARM_STEPS, steps))
    with torch.no_grad():
        start = measure(generator(z, condition), condition["class_labels"], judge)
    every, spent, begun = max(steps // LOOKS, 1), 0.0, time.process_time()

    def look(step: int, told: GeneratorLoss, average: torch.nn.Module) -> None:
        nonlocal spent, begun
        if (step + 1) % every and step + 1 < steps:
            return
        spent += time.process_time() - begun
        with torch.no_grad():
            quality = measure(average(z, condition), condition["class_labels"], judge)
        looks.append({"iteration": step + 1, "seconds": spent, **quality.to_json()})
        print(f"seed {seed}, {arm}: {shown(looks[-1])}", flush=True)
        begun = time.process_time()

    done = trained(arm, teacher, generator, seed, steps, look)
    with torch.no_grad():
        samples = done.generator(z, condition)
    run.save(
        key,
        {"samples": samples},
        arm=arm,
        seed=seed,
        looks=looks,
        start=start.to_json(),
        dropped=int(done.dropped.sum()),
    )


def shown(look: dict[str, float]) -> str:
    """Returns a look in a line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in look.items())


def references(run: Run) -> None:
    """Draws and measures the teacher in many steps and in one."""
    if run.has("teacher"):
        return
    teacher, judge, (z, condition) = teacher_of(), load_judge(), evaluated_latents()
    with torch.no_grad():
        drawn = {
            "teacher, 18 steps": teacher_samples(teacher, z, condition),
            "teacher, 1 step": OneStepGenerator(teacher, GENERATOR_SIGMA)(z, condition),
        }
    quality = {name: measure(x, condition["class_labels"], judge).to_json() for name, x in drawn.items()}
    run.save("teacher", {str(place): x for place, x in enumerate(drawn.values())}, quality=quality)


def told(run: Run, seeds: int, width: float) -> dict[str, Any]:
    """Returns what all trainings have come to: means over seeds with their range."""
    reference = run.load("teacher").fields["quality"]
    rows = [{"digits of": name, "iterations": "", **one} for name, one in reference.items()]
    curves: dict[str, list[Any]] = {}
    for place, arm in enumerate(ARMS):
        parts = [run.load(f"seed-{seed}-{place}").fields for seed in range(seeds)]
        curves[arm] = [part["looks"] for part in parts]
        last = [part["looks"][-1] for part in parts]
        names = [name for name in last[0] if name not in ("iteration", "seconds")]
        mean = {name: sum(one[name] for one in last) / seeds for name in names}
        rows.append({"digits of": f"{arm}, 1 step", "iterations": last[0]["iteration"], **mean})
        if seeds > 1:
            spread = {name: torch.tensor([one[name] for one in last]).std().item() for name in names}
            rows.append({"digits of": f"{arm}, deviation of {seeds} seeds", "iterations": "", **spread})
    start = {} if width == 1 else run.load("seed-0-0").fields["start"]
    return {"seeds": seeds, "width": width, "start": start, "costs": costs(run, width), "rows": rows, "curves": curves}


def overview(run: Run, seeds: int) -> Tensor:
    """Returns a grid of digits: a row for each way of drawing, the same latents in each column."""
    kept = run.load("teacher").tensors  # safetensors keeps no order
    parts = [kept["0"], kept["1"]]
    parts += [run.load(f"seed-0-{place}").tensors["samples"] for place in range(len(ARMS))]
    return (torch.cat([part[:SHOWN] for part in parts]) / 2 + 0.5).clamp(0, 1)


def page(run: Run, result: dict[str, Any], seeds: int) -> None:
    """Writes the page of the run, and the pictures."""
    report = Report("Digits in one step", run)
    ends = {arm: looks[0][-1] for arm, looks in result["curves"].items()}
    told = [f"{arm} {one['distance']:.2f} and {one['recall']:.2f}" for arm, one in ends.items()]
    report.answer(f"Fréchet distance and recall at equal seconds, seed 0: {'; '.join(told)}.")
    report.section("At equal seconds").table(result["rows"], NOTE)
    labels = ["teacher, 18 steps", "teacher, 1 step", *ARMS]
    report.images(
        overview(run, seeds), "The same latents and classes in each column.", columns=SHOWN, row_labels=labels
    )
    report.section("While they train")
    for name in ("distance", "recall"):
        series = [
            Series(arm, [one["seconds"] for one in looks[0]], [one[name] for one in looks[0]])
            for arm, looks in result["curves"].items()
        ]
        figure = lines_with_band(series, x_label="CPU seconds", y_label=name, log_y=name == "distance")
        report.plot(name, figure, f"{name.capitalize()} of the averaged generators by CPU seconds, seed 0.")
    report.save()
    figure = image_grid(overview(run, seeds), columns=SHOWN, row_labels=labels)
    write_whole(RESULTS / f"{name_of(result)}.png", run.figure("digits", figure).read_bytes())


def name_of(result: dict[str, Any]) -> str:
    """Returns the stem of the result files."""
    return "emd-digits" if result["width"] == 1 else "emd-digits-small"


NOTE = (
    "1790 digits of each against the 1797 real ones, Fréchet distance on pixels in [-1, 1]: one half of the real ones "
    "is .28 from the other. Precision, recall, coverage with five neighbours; accuracy of diffcore's classifier."
)


def markdown(result: dict[str, Any]) -> str:
    """Returns the result as Markdown."""
    rows = [
        {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in row.items()}
        for row in result["rows"]
    ]
    start = result["start"]
    small = ""
    if start:
        small = (
            f" The generator has {result['width']:g} of the teacher's channels and random weights; {WARM_STEPS} steps "
            f"of warming up bring it to a distance of {start['distance']:.2f} and a recall of {start['recall']:.2f}."
        )
    cost = ", ".join(f"{arm} {1000 * seconds:.0f} ms" for arm, seconds in result["costs"].items())
    lines = [
        "# Digits in one step",
        "",
        NOTE,
        "",
        f"Seeds: {result['seeds']}. CPU time of an iteration: {cost}.{small}",
        "",
    ]
    lines += [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    lines += [f"| {' | '.join(row.values())} |" for row in rows]
    lines += ["", "## While they train, seed 0", "", "| arm | iteration | seconds | distance | recall | precision |"]
    lines += ["|---|---|---|---|---|---|"]
    for arm, looks in result["curves"].items():
        for one in looks[0]:
            cells = "".join(f" {one[name]:.3f} |" for name in ("distance", "recall", "precision"))
            lines.append(f"| {arm} | {one['iteration']} | {one['seconds']:.0f} |{cells}")
    return "\n".join([*lines, ""])


def run(
    *,
    seeds: int = 1,
    minutes: float = 20.0,
    width: float = 1.0,
    out: Path = Path("runs/emd-digits"),
    smoke: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Trains and measures; returns 1 where something is not finite.

    Args:
        seeds: Number of trainings of each arm.
        minutes: CPU minutes of training for one seed, half for each arm.
        width: Share of the teacher's channels that the generator has; below 1 it begins with random weights.
        out: Run folder.
        smoke: Two iterations, no results.
    """
    torch.set_num_threads(1)
    config = {"minutes": minutes, "smoke": smoke} | ({} if width == 1 else {"width": width})
    with Run.open(out, command="emd_digits.py", config=config, inputs={}) as part:
        references(part)
        each = costs(part, width)
        for seed in range(seeds):
            for arm in ARMS:
                train_arm(part, arm, seed, 2 if smoke else round(60 * minutes / len(ARMS) / each[arm]), width)
        result = told(part, seeds, width)
        part.finish(result)  # further seeds can still be added
        if not smoke:
            page(part, result, seeds)
            write_json(RESULTS / f"{name_of(result)}.json", result)
            write_text(RESULTS / f"{name_of(result)}.md", markdown(result))
    print(markdown(result))
    return int(not all(math.isfinite(row["distance"]) for row in result["rows"]))


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(run)
    raise SystemExit(app())
