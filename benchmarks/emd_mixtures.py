"""EM Distillation on 25 Gaussians in the plane: what K, cancelled noise and sampler buy, and the rules that hold.

The setting is that of an earlier trial: exact teacher, small networks, three initialisations trained side by side in
one tensor batch. Six minutes of one core with --quick, which runs the rows that rules need; half an hour without. An
interrupted run continues. Writes emd-mixtures.json, .md and .png in benchmarks/results, and a page with pictures in the
run folder.
"""

import copy
import math
import os
import re
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
from diffcore.io.files import write_whole
from diffcore.io.jsonfile import write_json, write_text
from diffcore.report import Report
from diffcore.report.style import color, drawing
from diffcore.run import Run
from emd_distill.chain import langevin_eps_z
from emd_distill.distill import Draws, Settings, distill, sampled, situation
from emd_distill.losses import EMD, GeneratorLoss, Loss, Situation, mean_over
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
    """One of the two settings of the trial.

    Attributes:
        width: Number of hidden units.
        high: Largest noise level; the smallest is 0.03.
        corner: Whether the generator starts in one mode, or as the teacher's one step.
        batch: Number of rows for each initialisation.
        student_updates: Number of updates of the student score in an iteration.
        regressions: Number of Adam steps of the regressions at the start, on which a collapse later depends.
        probed: Update after which gradients are looked at.
    """

    width: int
    high: float
    corner: bool
    batch: int
    student_updates: int
    regressions: int
    probed: int


SETTINGS = {
    "narrow": Setting(40, 0.05, True, 128, 4, 400, 500),
    "wide": Setting(64, 3.0, False, 256, 1, 600, 1490),
}


@dataclass(frozen=True)
class OnlyZ:
    """A chain in which the latents move alone; its residual is the drift at the last state.

    Attributes:
        num_steps: Number of Langevin steps.
    """

    num_steps: int

    def __call__(self, s: Situation) -> GeneratorLoss:
        """Returns the loss in a situation."""
        end = langevin_eps_z(
            s.generator, s.teacher, s.student, s.z, s.eps, s.t, gamma_e=0.0, **LEVELLED, noise_cancel="stein",
            noise=s.draw(self.num_steps, True), x0=s.x0,
        )  # fmt: skip
        y = s.generator(end.z, None)
        loss = 0.5 * mean_over(end.finite, (y - (y + end.u).detach()).square())
        return GeneratorLoss(loss, end.finite, end.first_drift, (end.z - s.z).flatten(1).square().mean(1).sqrt())


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        loss: Loss of the generator.
        needed: Whether a rule needs the row.
        longer: Factor of the number of updates.
        seed: Seed of all draws.
    """

    loss: Loss
    needed: bool = False
    longer: int = 1
    seed: int = 0


ABOUT = {
    "narrow": "Start in one corner, noise levels of .03 to .05, 1500 updates; mean and deviation of three starts. "
    "level: step of z .05 that depends on the level, kappa .25; else gamma_z .001 at all levels. K=0 is a lottery: 600 "
    "regression steps in place of 400 bring the trial from 24.7 to 34.5 ± 25, and this form from 40.4 to 34.6 ± 28.",
    "wide": "Start in the middle, noise levels of .03 to 3, 1500 updates; mean and deviation of three initialisations.",
}
_NOISE_CAPTION = (
    "150 batches at networks that stand still, with the same draws for each way of cancelling; mean of three seeds."
)
_OVERVIEW_CAPTION = "Samples of the three initialisations, one colour for each, over the 25 centres (crosses)."
TRIAL: dict[str, dict[str, str]] = {  # fKL of the trial's tables
    "narrow": {
        "K=0 (Diff-Instruct)": "24.7 ± 19",
        "K=4": "5.6 ± 3.6",
        "K=16": "1.06 ± .18",
        "K=16, eps only": "0.96 ± .69",
        "K=1, eps only": "21.9 ± 14",
        "K=8": "1.92 ± .53",
        "K=16, last": "1.37 ± .12",
        "K=16, none": "1.47 ± .28",
        "K=16, stein": "6.1 ± 7.1",
        "K=16, level": "0.80 ± .41",
        "K=16, level, stein": "1.04 ± .44",
        "K=16, level, none": "1.39 ± .29",
        "K=0, four times the updates": "10.7 ± 17",
    },
    "wide": {
        "K=0 (Diff-Instruct)": "0.075 ± .020",
        "K=4": "0.080 ± .022",
        "K=16": "0.080 ± .018",
        "K=16, stein": "0.075 ± .019",
        "K=16, last": "0.288 ± .002",
        "K=16, none": "0.302 ± .011",
    },
}
TRIAL_NOISE = {
    "narrow": {"none": 0.0105, "last": 0.0091, "complete": 0.0061, "stein": 0.0077},
    "wide": {"none": 0.199, "last": 0.168, "complete": 0.0045, "stein": 0.0068},
}
TRIAL_COST = {
    "K=0": 1.0, "K=1": 1.21, "K=2": 1.46, "K=4": 2.08, "K=8": 3.40, "K=16": 6.0, "K=16, eps only": 3.19,
    "K=16, stein": 6.3,
}  # fmt: skip
_COST_CAPTION = "Updates of three generators at once in the wide setting, one thread, the least of three rounds."
DIFF_INSTRUCT = EMD(num_steps=0, **CONSTANT)
ROWS: dict[str, dict[str, Row]] = {
    "narrow": {
        "K=0 (Diff-Instruct)": Row(DIFF_INSTRUCT, needed=True),
        "K=4": Row(EMD(num_steps=4, **CONSTANT), needed=True),
        "K=16": Row(EMD(num_steps=16, **CONSTANT), needed=True),
        "K=16, eps only": Row(EMD(num_steps=16, gamma_z=0.0), needed=True),
        "K=1, eps only": Row(EMD(num_steps=1, gamma_z=0.0)),
        "K=8": Row(EMD(num_steps=8, **CONSTANT)),
        "K=16, last": Row(EMD(num_steps=16, **CONSTANT, noise_cancel="last")),
        "K=16, none": Row(EMD(num_steps=16, **CONSTANT, noise_cancel="none")),
        "K=16, stein": Row(EMD(num_steps=16, **CONSTANT, noise_cancel="stein")),
        "K=16, level": Row(EMD(num_steps=16, **LEVELLED)),
        "K=16, (x, z), level": Row(EMD(num_steps=16, **LEVELLED, chain="x_z")),
        "K=16, x only": Row(EMD(num_steps=16, gamma_z=0.0, chain="x_z")),
        "K=16, z only, level": Row(OnlyZ(16)),
        "K=0, second stream of draws": Row(DIFF_INSTRUCT, seed=1),
        "K=16, level, stein": Row(EMD(num_steps=16, **LEVELLED, noise_cancel="stein")),
        "K=16, level, none": Row(EMD(num_steps=16, **LEVELLED, noise_cancel="none")),
        "K=0, four times the updates": Row(DIFF_INSTRUCT, longer=4),
    },
    "wide": {
        "K=0 (Diff-Instruct)": Row(DIFF_INSTRUCT, needed=True),
        "K=16": Row(EMD(num_steps=16, **CONSTANT), needed=True),
        "K=16, last": Row(EMD(num_steps=16, **CONSTANT, noise_cancel="last"), needed=True),
        "K=16, none": Row(EMD(num_steps=16, **CONSTANT, noise_cancel="none"), needed=True),
        "K=4": Row(EMD(num_steps=4, **CONSTANT)),
        "K=16, stein": Row(EMD(num_steps=16, **CONSTANT, noise_cancel="stein")),
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

    fitted(generator, first, setting.regressions, 1e-3)
    fitted(student, score, setting.regressions, 1e-3)
    return generator, student


@dataclass(frozen=True, eq=False)
class Trained:
    """What a row has come to.

    Attributes:
        generator: Averaged generators.
        milliseconds: CPU time of one update.
        probed: Generators and student scores in the midst of training, where they were asked for.
    """

    generator: nn.Module
    milliseconds: float
    probed: tuple[nn.Module, NetworkDenoiser] | None


def trained(name: str, row: Row, updates: int, *, probe: bool = False) -> Trained:
    """Trains one row of a setting's table."""
    setting = SETTINGS[name]
    generator, student = started(setting)
    settings = Settings(
        loss=row.loss,
        steps=row.longer * updates,
        batch_size=SEEDS * setting.batch,
        learning_rate=2e-4,
        student_learning_rate=1e-3,
        student_updates=setting.student_updates,
        clip=None,
        ema=0.995,
        seed=row.seed,
    )
    levels = noise_levels(EDMSchedule(), "loguniform", low=STD, high=setting.high)
    seen: list[tuple[nn.Module, NetworkDenoiser]] = []
    at = min(setting.probed, settings.steps)

    def look(step: int, told: GeneratorLoss, average: nn.Module) -> None:
        if probe and step + 1 == at:
            seen.append((copy.deepcopy(generator), copy.deepcopy(student)))

    begun = time.process_time()
    done = distill(Mixture(), generator, (2,), settings, student=student, time_sampler=levels, on_step=look)
    spent = 1000 * (time.process_time() - begun) / settings.steps
    return Trained(done.generator, spent, seen[0] if seen else None)


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
    """Returns the metrics of the trial for the samples of one generator."""
    distance, nearest = torch.cdist(x, MEANS).min(1)
    good = distance < 4 * STD
    share = torch.bincount(nearest[good], minlength=25) / len(x) * 25
    weights = share / share.sum().clamp(min=1e-9)  # of the samples that belong to a mode
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


def gradients(
    name: str, generator: nn.Module, student: NetworkDenoiser, batches: int = 150
) -> dict[str, dict[str, float]]:
    """Returns signal and noise of the gradient for each way of cancelling, with networks that stand still.

    Signal is the norm of the mean gradient, from which the noise that a mean of so many batches keeps is taken away;
    all are means over seeds.
    """
    setting = SETTINGS[name]
    levels = noise_levels(EDMSchedule(), "loguniform", low=STD, high=setting.high)
    draws, rows = Draws(99, (2,), levels), torch.arange(SEEDS * setting.batch)
    generator = generator.requires_grad_(True)
    means, told = {}, {}
    for cancel in ("complete", "stein", "last", "none"):
        loss = EMD(num_steps=16, **CONSTANT, noise_cancel=cancel)
        # The loss is a mean over seeds and coordinates; the trial's gradients are of each seed's sum.
        found = [2 * SEEDS * _gradient(loss, generator, student, draws, step, rows) for step in range(batches)]
        mean, variance = torch.stack(found).mean(0), torch.stack(found).var(0).sum(1)
        means[cancel] = mean
        signal = (mean.square().sum(1) - variance / batches).clamp(min=0).sqrt()
        told[cancel] = {
            "signal": float(signal.mean()),
            "noise": float(variance.sqrt().mean()),
            "cosine": float(torch.cosine_similarity(mean, means["complete"], dim=1).mean()),
        }
    return told


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


def cost(updates: int = 40, rounds: int = 3) -> dict[str, float]:
    """Returns milliseconds of CPU of one update in the wide setting, the least of some rounds."""
    losses = {f"K={k}": EMD(num_steps=k, **CONSTANT) for k in (0, 1, 2, 4, 8, 16)}
    losses["K=16, eps only"] = EMD(num_steps=16, gamma_z=0.0)
    losses["K=16, stein"] = EMD(num_steps=16, **CONSTANT, noise_cancel="stein")
    found: list[dict[str, float]] = []
    for _ in range(rounds):  # one after another, so that a busy machine slows all alike
        found.append({row: trained("wide", Row(loss), updates).milliseconds for row, loss in losses.items()})
    return {row: min(one[row] for one in found) for row in losses}


def run(*, out: Path = Path("runs/emd-mixtures"), quick: bool = False, updates: int = 1500) -> int:
    """Trains and measures all rows; returns 1 where a hard rule does not hold.

    Args:
        out: Run folder.
        quick: Run the rows that rules need, and no others.
        updates: Number of generator updates; the rules are for 1500.
    """
    torch.set_num_threads(1)
    with Run.open(out, command="emd_mixtures.py", config={"updates": updates}, inputs={}) as part:
        for needed in (True, False):  # what rules need comes first, so that an interrupted run can be judged
            for name, rows in ROWS.items():
                for title, row in rows.items():
                    if row.needed == needed and (needed or not quick):
                        _row(part, name, title, row, updates)
        if not part.has("ratios"):
            ratios = {str(dtype): one_step_ratio(dtype) for dtype in (torch.float32, torch.float64)}
            part.save("ratios", {}, ratios=ratios)
        if not part.has("cost"):
            part.save("cost", {}, milliseconds=cost())
        result = _told(part)
        part.finish(result)  # a run of the quick rows can go on with the others
        _page(part, result)
        write_whole(RESULTS / "emd-mixtures.png", (part.folder / "figures" / "overview.png").read_bytes())
    write_json(RESULTS / "emd-mixtures.json", result)
    write_text(RESULTS / "emd-mixtures.md", _markdown(result))
    print(_markdown(result))
    return 0 if all(rule["held"] for rule in result["rules"] if rule["kind"] == "hard") else 1


def _key(name: str, title: str) -> str:
    return f"{name}-{re.sub('[^a-zA-Z0-9]+', '-', title).strip('-')}"


def _row(part: Run, name: str, title: str, row: Row, updates: int) -> None:
    key = _key(name, title)
    if part.has(key):
        return
    done = trained(name, row, updates, probe=title == "K=16")
    samples = drawn(done.generator)
    noise = gradients(name, *done.probed) if done.probed else None
    metrics = [measured(x) for x in samples]
    part.save(
        key, {"samples": samples[:, :2000]}, row=title, metrics=metrics, milliseconds=done.milliseconds, noise=noise
    )
    print(f"{name}: {title}: {_cells(metrics)} ({done.milliseconds:.1f} ms)", flush=True)


def _cells(metrics: list[dict[str, float]]) -> dict[str, str]:
    cells = {}
    for key in metrics[0]:
        values = torch.tensor([float(one[key]) for one in metrics])
        counts = key in ("covered", "hit")
        cells[key] = ", ".join(str(int(v)) for v in values) if counts else f"{values.mean():.3g} ± {values.std():.2g}"
    return cells


def _told(part: Run) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = {name: {} for name in ROWS}
    for name, rows in ROWS.items():
        for title in rows:
            if part.has(_key(name, title)):
                fields = part.load(_key(name, title)).fields
                tables[name][fields["row"]] = {k: fields[k] for k in ("metrics", "milliseconds", "noise")}
    ratios = part.load("ratios").fields["ratios"]
    spent = part.load("cost").fields["milliseconds"]
    rules = _rules(tables, ratios, spent)
    return {"tables": tables, "ratios": ratios, "cost": spent, "rules": rules}


def _rules(
    tables: dict[str, dict[str, Any]], ratios: dict[str, float], spent: dict[str, float]
) -> list[dict[str, Any]]:
    """Returns the acceptance rules with what was found."""

    def all_of(name: str, row: str, key: str) -> list[float]:
        return [one[key] for one in tables[name][row]["metrics"]]

    def mean(name: str, row: str, key: str) -> float:
        values = all_of(name, row, key)
        return sum(values) / len(values)

    narrow = [mean("narrow", row, "fKL") for row in ("K=16", "K=4", "K=0 (Diff-Instruct)")]
    wide = [mean("wide", row, "fKL") for row in ("K=16", "K=0 (Diff-Instruct)")]
    hits = [v for row in ("K=16", "K=0 (Diff-Instruct)") for v in all_of("wide", row, "hit")]
    noise = tables["wide"]["K=16"]["noise"]
    factor = noise["none"]["noise"] / noise["complete"]["noise"]
    pairs = [
        (cancelled, complete)
        for row in ("K=16, none", "K=16, last")
        for cancelled, complete in zip(all_of("wide", row, "covered"), all_of("wide", "K=16", "covered"), strict=True)
    ]
    dearer = spent["K=16"] / spent["K=0"]
    share = spent["K=16, eps only"] / spent["K=16"]
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
        ("cost of K=16 over K=0 at most 8", "soft", f"{dearer:.1f}", dearer <= 8),
        ("cost of eps only over eps and z at most .65 at K=16", "soft", f"{share:.2f}", share <= 0.65),
    ]
    return [{"rule": rule, "kind": kind, "found": value, "held": bool(held)} for rule, kind, value, held in found]


def _row_of(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _off(ratios: dict[str, float], name: str) -> str:
    return f"off by {abs(ratios[f'torch.{name}'] / 0.16 - 1):.1e}"


def _near(ratios: dict[str, float], name: str, tolerance: float) -> bool:
    return abs(ratios[f"torch.{name}"] / 0.16 - 1) < tolerance


def _lines(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [
        {
            "method": row,
            **_cells(one["metrics"]),
            "fKL of the trial": TRIAL[name].get(row, ""),
            "ms of CPU per update": f"{one['milliseconds']:.1f}",
        }
        for row, one in result["tables"][name].items()
    ]


def _noises(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each setting and way of cancelling, with the trial's noise beside it."""
    return [
        {
            "setting": f"{name}, update {SETTINGS[name].probed}",
            "residual": cancel,
            **{key: f"{value:.3g}" for key, value in one.items()},
            "noise over signal": f"{one['noise'] / max(one['signal'], 1e-12):.2g}",
            "noise of the trial": TRIAL_NOISE[name][cancel],
        }
        for name in ROWS
        for cancel, one in result["tables"][name]["K=16"]["noise"].items()
    ]


def _costs(result: dict[str, Any]) -> list[dict[str, Any]]:
    spent = result["cost"]
    return [
        {
            "update": row,
            "ms of CPU": f"{value:.2f}",
            "over K=0": f"{value / spent['K=0']:.2f}",
            "over K=0 in the trial": TRIAL_COST[row],
        }
        for row, value in spent.items()
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row.values())} |" for row in rows), ""]


def _markdown(result: dict[str, Any]) -> str:
    lines = ["# EM Distillation on 25 Gaussians", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    for name, about in ABOUT.items():
        lines += [f"## {name.capitalize()} noise", "", about, "", *_table(_lines(result, name))]
    lines += ["## Gradient noise", "", _NOISE_CAPTION, "", *_table(_noises(result))]
    lines += ["## Cost", "", _COST_CAPTION, "", *_table(_costs(result))]
    rules = [{**rule, "held": "yes" if rule["held"] else "**no**"} for rule in result["rules"]]
    return "\n".join([*lines, "## Rules", "", *_table(rules)])


def _page(part: Run, result: dict[str, Any]) -> None:
    report = Report("25 Gaussians in one step", part)
    held = sum(rule["held"] for rule in result["rules"])
    report.answer(f"{held} of {len(result['rules'])} rules hold.")
    report.section("Rules").table([{**rule, "held": "yes" if rule["held"] else "no"} for rule in result["rules"]])
    report.section("Side by side").plot("overview", _overview(part), _OVERVIEW_CAPTION)
    for name, rows in ROWS.items():
        report.section(f"{name.capitalize()} noise").table(_lines(result, name), ABOUT[name])
        for row in rows:
            key = _key(name, row)
            if part.has(key):
                samples = part.load(key).tensors["samples"]
                report.plot(key, _picture(samples), f"{row}: 2000 samples of each of the three seeds.")
    report.section("Cost").table(_costs(result), _COST_CAPTION)
    report.section("Gradient noise").table(_noises(result), _NOISE_CAPTION)
    report.save()


def _overview(part: Run) -> Any:
    """Draws the samples of the rows that rules need, one row for each method and one column for each seed."""
    chosen = [
        ("narrow", "K=0 (Diff-Instruct)"), ("narrow", "K=4"), ("narrow", "K=16"), ("narrow", "K=16, eps only"),
        ("wide", "K=0 (Diff-Instruct)"), ("wide", "K=16"), ("wide", "K=16, last"), ("wide", "K=16, none"),
    ]  # fmt: skip
    with drawing(9.6, 5.2) as (figure, axes):
        axes.remove()
        grid = figure.subplots(2, 4)
        for place, (axis, (name, row)) in enumerate(zip(grid.flat, chosen, strict=True)):
            samples = part.load(_key(name, row)).tensors["samples"]
            for seed, x in enumerate(samples):
                axis.scatter(*x[:700].T.numpy(), s=0.7, color=color(seed), linewidths=0)
            axis.scatter(*MEANS.T.numpy(), s=12, marker="x", color="black", lw=0.8)
            axis.set_title(f"{'narrow' if place < 4 else 'wide'}: {row.split(' (')[0]}", fontsize=9)
            axis.set_aspect("equal")
            axis.set_xlim(-1.05, 1.05)
            axis.set_ylim(-1.05, 1.05)
            axis.set_axis_off()
    return figure


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
