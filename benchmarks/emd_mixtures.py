"""EM Distillation on 25 Gaussians in the plane: what K, cancelled noise and sampler buy, and the rules that hold.

Specification 18: exact teacher, small networks, three initialisations trained side by side in one tensor batch. Some
minutes of one core with --quick, which runs the rows that rules need; about four times as long without. An interrupted
run continues. Writes emd-mixtures.json and .md in benchmarks/results, and a page with pictures in the run folder.
"""

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App
from torch import Tensor, nn
from torch.nn import functional as F

from diffcore.denoiser import Condition, Denoiser, EDMSchedule, NetworkDenoiser, Prediction
from diffcore.io.jsonfile import write_json, write_text
from diffcore.report import Report
from diffcore.report.style import color, drawing
from diffcore.run import Run
from emd_distill.distill import Draws, Settings, distill, sampled, situation
from emd_distill.losses import EMD
from emd_distill.noise_levels import noise_levels

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS, STD, SPACING = 3, 0.03, 0.354
GRID = SPACING * (torch.arange(5.0) - 2)
MEANS = torch.cartesian_prod(GRID, GRID)
SMOOTHING = 0.1
CONSTANT: dict[str, Any] = {"gamma_z": 0.001, "kappa": 0.0}
LEVELLED: dict[str, Any] = {"gamma_z": 0.05, "kappa": 0.25}


class Mixture(Denoiser):
    """The exact denoiser of the 25 Gaussians, in the precision of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = EDMSchedule()

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        sigma, means = t.view(-1, 1).to(x_t), MEANS.to(x_t)
        total = STD**2 + sigma.square()
        share = torch.softmax(-torch.cdist(x_t, means).square() / (2 * total), 1)
        x0 = (STD**2 * x_t + sigma.square() * share @ means) / total
        return Prediction(x0, x_t, torch.ones_like(sigma), sigma, "sample", in_range=True)


class Networks(nn.Module):
    """Perceptrons of one shape side by side; rows belong to them in equal blocks."""

    def __init__(self, sizes: list[int], seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for into, out in pairwise(sizes):
            for parts, shape in ((self.weights, (SEEDS, into, out)), (self.biases, (SEEDS, 1, out))):
                parts.append(nn.Parameter((2 * torch.rand(shape, generator=g) - 1) / math.sqrt(into)))

    def run(self, x: Tensor) -> Tensor:
        h = x.unflatten(0, (SEEDS, -1))
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, F.silu(h) if place else h, weight)
        return h.flatten(0, 1)


class Generator(Networks):
    """The one-step generator: latents in the plane to points in the plane."""

    def forward(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        return self.run(z)


class Score(Networks):
    """The network of the student score: scaled points and ln(sigma) / 4."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = math.pi * t[:, None] * torch.tensor([0.25, 0.5, 1.0, 2.0]).to(x)
        return self.run(torch.cat([x, phase.sin(), phase.cos(), t[:, None].to(x)], 1))


@dataclass(frozen=True)
class Setting:
    """One of the two settings of specification 18.1.

    Attributes:
        width: Number of hidden units.
        high: Largest noise level; the smallest is 0.03.
        corner: Whether the generator starts in one mode, or as the teacher's one step.
        batch: Number of rows for each initialisation.
        student_updates: Number of updates of the student score in an iteration.
    """

    width: int
    high: float
    corner: bool
    batch: int
    student_updates: int


SETTINGS = {
    "narrow": Setting(40, 0.05, True, 128, 4),
    "wide": Setting(64, 3.0, False, 256, 1),
}
ROWS: dict[str, dict[str, tuple[EMD, bool]]] = {  # loss, and whether a rule needs the row
    "narrow": {
        "K=0 (Diff-Instruct)": (EMD(num_steps=0, **CONSTANT), True),
        "K=4": (EMD(num_steps=4, **CONSTANT), True),
        "K=16": (EMD(num_steps=16, **CONSTANT), True),
        "K=16, eps only": (EMD(num_steps=16, gamma_z=0.0), False),
        "K=16, gamma_z .05, kappa .25": (EMD(num_steps=16, **LEVELLED), False),
        "K=16, chain in (x, z)": (EMD(num_steps=16, **CONSTANT, chain="x_z"), False),
        "K=16, last": (EMD(num_steps=16, **CONSTANT, noise_cancel="last"), False),
        "K=16, none": (EMD(num_steps=16, **CONSTANT, noise_cancel="none"), False),
        "K=16, stein": (EMD(num_steps=16, **LEVELLED, noise_cancel="stein"), False),
    },
    "wide": {
        "K=0 (Diff-Instruct)": (EMD(num_steps=0, **CONSTANT), True),
        "K=16": (EMD(num_steps=16, **CONSTANT), True),
        "K=16, last": (EMD(num_steps=16, **CONSTANT, noise_cancel="last"), True),
        "K=16, none": (EMD(num_steps=16, **CONSTANT, noise_cancel="none"), True),
        "K=4": (EMD(num_steps=4, **CONSTANT), False),
        "K=16, stein": (EMD(num_steps=16, **CONSTANT, noise_cancel="stein"), False),
    },
}


def points(count: int, seed: int) -> Tensor:
    """Returns samples of the teacher."""
    g = torch.Generator().manual_seed(seed)
    chosen = MEANS[torch.randint(0, 25, (count,), generator=g)]
    return chosen + STD * torch.randn(count, 2, generator=g)


def fitted(module: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int, rate: float) -> None:
    """Trains a network on a loss of fresh draws."""
    g, optimizer = torch.Generator().manual_seed(7), torch.optim.Adam(module.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(g).backward()
        optimizer.step()


def started(setting: Setting) -> tuple[Generator, NetworkDenoiser]:
    """Returns copies of the generators and student scores of a setting at its start."""
    return copy.deepcopy(_started(setting))


@cache
def _started(setting: Setting) -> tuple[Generator, NetworkDenoiser]:
    h, rows, teacher = setting.width, SEEDS * setting.batch, Mixture()
    generator = Generator([2, h, h, h, 2], seed=1)
    student = NetworkDenoiser(Score([11, h, h, h, 2], seed=2), EDMSchedule(), "edm")
    levels = noise_levels(teacher.schedule, "loguniform", low=STD, high=setting.high)

    def first(g: torch.Generator) -> Tensor:
        z = torch.randn(rows, 2, generator=g)
        target = MEANS[0] + 0.05 * z if setting.corner else teacher(5 * z, torch.full((rows,), 5.0)).x0
        return (generator(z) - target).square().mean()

    def score(g: torch.Generator) -> Tensor:
        t = levels(torch.rand(rows, generator=g))
        chosen = MEANS[torch.randint(0, 25, (rows,), generator=g)] + STD * torch.randn(rows, 2, generator=g)
        x = chosen + t[:, None] * torch.randn(rows, 2, generator=g)
        found = student(x, t)
        return (found.output - found.target(teacher(x, t).x0, (x - teacher(x, t).x0) / t[:, None])).square().mean()

    fitted(generator, first, 600, 3e-3)
    fitted(student, score, 600, 2e-3)
    return generator, student


def trained(name: str, loss: EMD, updates: int) -> tuple[nn.Module, Any, float]:
    """Trains one row; returns the averaged generators, the student scores, and milliseconds per update."""
    setting = SETTINGS[name]
    generator, student = started(setting)
    settings = Settings(
        loss=loss,
        steps=updates,
        batch_size=SEEDS * setting.batch,
        learning_rate=2e-4,
        student_learning_rate=1e-3,
        student_updates=setting.student_updates,
        clip=None,
        ema=0.995,
    )
    levels = noise_levels(EDMSchedule(), "loguniform", low=STD, high=setting.high)
    begun = time.process_time()
    done = distill(Mixture(), generator, (2,), settings, student=student, time_sampler=levels)
    return done.generator, done.student, 1000 * (time.process_time() - begun) / updates


@torch.no_grad()
def drawn(generator: nn.Module, count: int = 10_000) -> Tensor:
    """Returns samples of each generator, from the same latents."""
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(11))
    return generator(z.repeat(SEEDS, 1)).unflatten(0, (SEEDS, count))


def log_density(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """Returns log densities of an equal mixture of normals around centres."""
    parts = [torch.logsumexp(-torch.cdist(part, centres).square() / (2 * std**2), 1) for part in x.split(1000)]
    return torch.cat(parts) - math.log(len(centres)) - math.log(2 * math.pi * std**2)


def measured(x: Tensor) -> dict[str, float]:
    """Returns the metrics of specification 18.1 for the samples of one generator."""
    distance, nearest = torch.cdist(x, MEANS).min(1)
    good = distance < 4 * STD
    share = torch.bincount(nearest[good], minlength=25) / len(x) * 25
    weights = torch.bincount(nearest, minlength=25) / len(x)
    g = torch.Generator().manual_seed(13)
    real, few = points(4000, 12), x[:4000]
    wide = math.hypot(STD, SMOOTHING)
    smooth_real = real + SMOOTHING * torch.randn(real.shape, generator=g)
    smooth_fake = few + SMOOTHING * torch.randn(few.shape, generator=g)
    fkl = log_density(smooth_real, MEANS, wide) - log_density(smooth_real, x, SMOOTHING)
    # Its own centre is left out: a sample must not count as its own density.
    others = log_density(smooth_fake, x[4000:], SMOOTHING)
    rkl = others - log_density(smooth_fake, MEANS, wide)
    n = len(few)
    within = [float(torch.cdist(part, part).sum()) / (n * (n - 1)) for part in (few, real)]
    energy = 2 * float(torch.cdist(few, real).mean()) - sum(within)
    return {
        "covered": int((share >= 0.25).sum()),
        "hit": int((share >= 0.10).sum()),
        "hq": float(good.float().mean()),
        "TV": float((weights - 1 / 25).abs().sum() / 2),
        "fKL": float(fkl.mean()),
        "rKL": float(rkl.mean()),
        "ED": energy,
        "MMD2": _mmd(few, real),
    }


def _mmd(x: Tensor, y: Tensor) -> float:
    """Returns the unbiased squared maximum mean discrepancy, mean over four Gaussian widths."""
    n, squares = len(x), [torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y))]
    found = 0.0
    for width in (0.05, 0.1, 0.2, 0.4):
        own, other, cross = (torch.exp(-s / (2 * width**2)) for s in squares)
        found += float((own.sum() - n + other.sum() - n) / (n * (n - 1)) - 2 * cross.mean())
    return found / 4


def gradient_noise(generator: nn.Module, student: NetworkDenoiser, batches: int = 40) -> dict[str, float]:
    """Returns the gradient noise of each way of cancelling at a frozen iterate of the wide setting, mean over seeds."""
    setting = SETTINGS["wide"]
    levels = noise_levels(EDMSchedule(), "loguniform", low=STD, high=setting.high)
    draws, rows = Draws(99, (2,), levels), torch.arange(SEEDS * setting.batch)
    generator = copy.deepcopy(generator).requires_grad_(True)
    noise = {}
    for cancel in ("none", "last", "complete", "stein"):
        loss, found = EMD(num_steps=16, **CONSTANT, noise_cancel=cancel), []
        for step in range(batches):
            found.append(_gradient(loss, generator, student, draws, step, rows))
        noise[cancel] = float(torch.stack(found).var(0).sum(1).sqrt().mean())
    return noise


def _gradient(loss: EMD, generator: nn.Module, student: Denoiser, draws: Draws, step: int, rows: Tensor) -> Tensor:
    some, x0 = sampled(generator, draws, step, rows)
    generator.zero_grad()
    loss(situation(generator, Mixture(), student, x0, some, draws, step, rows)).loss.backward()
    return torch.cat([part.grad.flatten(1) for part in generator.parameters() if part.grad is not None], 1)


def one_step_ratio(dtype: torch.dtype) -> float:
    """Returns the ratio of the gradient norms of K=1, gamma_z=0 and K=0 on the same draws; it must be gamma_e."""
    torch.set_default_dtype(dtype)
    try:
        generator, student = started(replace(SETTINGS["narrow"], batch=32))
        generator, student = generator.to(dtype), student.to(dtype)
        levels = noise_levels(EDMSchedule(), "loguniform", low=STD, high=0.05)

        class Wide(Draws):
            def __call__(self, step: int, rows: Tensor, update: int = 0) -> Any:
                some = super().__call__(step, rows, update)
                return replace(some, z=some.z.to(dtype), eps=some.eps.to(dtype), t=some.t.to(dtype))

        draws, rows = Wide(5, (2,), levels), torch.arange(SEEDS * 32)
        norms = [_gradient(EMD(num_steps=k, gamma_z=0.0), generator, student, draws, 0, rows).norm() for k in (1, 0)]
        return float(norms[0] / norms[1])
    finally:
        torch.set_default_dtype(torch.float32)


def run(out: Path = Path("runs/emd-mixtures"), *, quick: bool = False, updates: int = 1500) -> int:
    """Trains and measures all rows; returns 1 where a hard rule of specification 18.7 does not hold.

    Args:
        out: Run folder.
        quick: Run the rows that rules need, and no others.
        updates: Number of generator updates; the rules are for 1500.
    """
    torch.set_num_threads(1)
    config = {"quick": quick, "updates": updates}
    with Run.open(out, command="emd-distill mixtures", config=config, inputs={}) as part:
        if not part.finished:
            for name, rows in ROWS.items():
                for place, (row, (loss, needed)) in enumerate(rows.items()):
                    if not quick or needed:
                        _row(part, name, place, row, loss, updates)
            if not part.has("ratios"):
                ratios = {str(dtype): one_step_ratio(dtype) for dtype in (torch.float32, torch.float64)}
                part.save("ratios", {}, ratios=ratios)
            part.finish(_told(part, quick))
        result = part.result
        _page(part, result)
    write_json(RESULTS / "emd-mixtures.json", result)
    write_text(RESULTS / "emd-mixtures.md", _markdown(result))
    print(_markdown(result))
    return 0 if all(rule["held"] for rule in result["rules"] if rule["kind"] == "hard") else 1


def _row(part: Run, name: str, place: int, row: str, loss: EMD, updates: int) -> None:
    key = f"{name}-{place}"
    if part.has(key):
        return
    generator, student, milliseconds = trained(name, loss, updates)
    samples = drawn(generator)
    noise = gradient_noise(generator, student) if (name, row) == ("wide", "K=16") else None
    metrics = [measured(x) for x in samples]
    part.save(key, {"samples": samples[:, :2000]}, row=row, metrics=metrics, milliseconds=milliseconds, noise=noise)
    print(f"{name}: {row}: {_cells(metrics)} ({milliseconds:.1f} ms)", flush=True)


def _cells(metrics: list[dict[str, float]]) -> dict[str, str]:
    cells = {}
    for key in metrics[0]:
        values = torch.tensor([float(one[key]) for one in metrics])
        counts = key in ("covered", "hit")
        cells[key] = ", ".join(str(int(v)) for v in values) if counts else f"{values.mean():.3g} ± {values.std():.2g}"
    return cells


def _told(part: Run, quick: bool) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = {name: {} for name in ROWS}
    for name, rows in ROWS.items():
        for place in range(len(rows)):
            if part.has(f"{name}-{place}"):
                fields = part.load(f"{name}-{place}").fields
                tables[name][fields["row"]] = {k: fields[k] for k in ("metrics", "milliseconds", "noise")}
    ratios = part.load("ratios").fields["ratios"]
    return {"quick": quick, "tables": tables, "ratios": ratios, "rules": _rules(tables, ratios)}


def _rules(tables: dict[str, dict[str, Any]], ratios: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the acceptance rules of specification 18.7 with what was found."""

    def all_of(name: str, row: str, key: str) -> list[float]:
        return [one[key] for one in tables[name][row]["metrics"]]

    def mean(name: str, row: str, key: str) -> float:
        values = all_of(name, row, key)
        return sum(values) / len(values)

    narrow = [mean("narrow", row, "fKL") for row in ("K=16", "K=4", "K=0 (Diff-Instruct)")]
    wide = [mean("wide", row, "fKL") for row in ("K=16", "K=0 (Diff-Instruct)")]
    hits = [v for row in ("K=16", "K=0 (Diff-Instruct)") for v in all_of("wide", row, "hit")]
    noise = tables["wide"]["K=16"]["noise"]
    factor = noise["none"] / noise["complete"]
    pairs = [
        (cancelled, complete)
        for row in ("K=16, none", "K=16, last")
        for cancelled, complete in zip(all_of("wide", row, "covered"), all_of("wide", "K=16", "covered"), strict=True)
    ]
    cost = tables["narrow"]["K=16"]["milliseconds"] / tables["narrow"]["K=0 (Diff-Instruct)"]["milliseconds"]
    worst = max(all_of("narrow", "K=16", "fKL"))
    collapsed = mean("narrow", "K=0 (Diff-Instruct)", "covered")
    found: list[tuple[str, str, str, bool]] = [
        ("narrow: fKL falls with K (16, 4, 0)", "hard", _row_of(narrow), narrow[0] < narrow[1] < narrow[2]),
        ("narrow: fKL of K=16 below 3 for every seed", "hard", f"{worst:.2f}", worst < 3),
        ("narrow: K=0 covers at most 8 modes in the mean", "hard", f"{collapsed:.1f}", collapsed <= 8),
        ("K=1 is .16 times Diff-Instruct in float32", "hard", _off(ratios, "float32"), _near(ratios, "float32", 1e-4)),
        ("K=1 is .16 times Diff-Instruct in float64", "hard", _off(ratios, "float64"), _near(ratios, "float64", 1e-9)),
        ("wide: fKL of K=16 and K=0 within .05", "hard", _row_of(wide), abs(wide[0] - wide[1]) < 0.05),
        ("wide: all 25 modes hit by both", "hard", str(int(min(hits))), min(hits) == 25),
        ("wide, late: gradient noise, none over complete, at least 10", "hard", f"{factor:.1f}", factor >= 10),
        ("wide: none and last cover fewer modes for every seed", "hard", str(pairs), all(a < b for a, b in pairs)),
        ("narrow: K=16 costs at most 8 times K=0", "soft", f"{cost:.1f}", cost <= 8),
    ]
    if "K=16, eps only" in tables["narrow"]:
        share = tables["narrow"]["K=16, eps only"]["milliseconds"] / tables["narrow"]["K=16"]["milliseconds"]
        found.append(("narrow: eps only costs at most .65 of eps and z", "soft", f"{share:.2f}", share <= 0.65))
    return [{"rule": rule, "kind": kind, "found": value, "held": bool(held)} for rule, kind, value, held in found]


def _row_of(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _off(ratios: dict[str, float], name: str) -> str:
    return f"off by {abs(ratios[f'torch.{name}'] / 0.16 - 1):.1e}"


def _near(ratios: dict[str, float], name: str, tolerance: float) -> bool:
    return abs(ratios[f"torch.{name}"] / 0.16 - 1) < tolerance


def _lines(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [
        {"method": row, **_cells(one["metrics"]), "ms of CPU per update": f"{one['milliseconds']:.1f}"}
        for row, one in result["tables"][name].items()
    ]


def _markdown(result: dict[str, Any]) -> str:
    lines = ["# EM Distillation on 25 Gaussians", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    for name in ROWS:
        rows = _lines(result, name)
        lines += [f"## {name.capitalize()} noise", "", f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
        lines += [f"| {' | '.join(str(cell) for cell in row.values())} |" for row in rows] + [""]
    noise = result["tables"]["wide"]["K=16"]["noise"]
    lines += ["Gradient noise late in the wide setting: " + ", ".join(f"{k} {v:.4f}" for k, v in noise.items()), ""]
    lines += ["| rule | kind | found | held |", "|---|---|---|---|"]
    lines += [
        f"| {r['rule']} | {r['kind']} | {r['found']} | {'yes' if r['held'] else '**no**'} |" for r in result["rules"]
    ]
    return "\n".join([*lines, ""])


def _page(part: Run, result: dict[str, Any]) -> None:
    report = Report("25 Gaussians in one step", part)
    held = sum(rule["held"] for rule in result["rules"])
    report.answer(f"{held} of {len(result['rules'])} rules hold.")
    report.section("Rules").table([{**rule, "held": "yes" if rule["held"] else "no"} for rule in result["rules"]])
    for name, rows in ROWS.items():
        report.section(f"{name.capitalize()} noise").table(_lines(result, name), "Mean and deviation of three seeds.")
        for place, row in enumerate(rows):
            if part.has(f"{name}-{place}"):
                samples = part.load(f"{name}-{place}").tensors["samples"]
                report.plot(f"{name}-{place}", _picture(samples), f"{row}: 2000 samples of each of the three seeds.")
    report.save()


def _picture(samples: Tensor) -> Any:
    with drawing(8.4, 2.9) as (figure, axes):
        for place, x in enumerate(samples):
            axes.scatter(*(x + torch.tensor([2.4 * place, 0.0])).T.numpy(), s=1, color=color(0), linewidths=0)
            axes.scatter(*(MEANS + torch.tensor([2.4 * place, 0.0])).T.numpy(), s=7, marker="x", color=color(1), lw=0.7)
        axes.set_aspect("equal")
        axes.set_xlim(-1.2, 6.0)
        axes.set_ylim(-1.2, 1.2)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(run)
    raise SystemExit(app())
