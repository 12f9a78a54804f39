"""What the command correct computes, and its part of the page."""

import copy
from typing import Any

import torch
from torch import Tensor

from diffcore.cli import track
from diffcore.noise import philox_normal
from diffcore.report import Report, Series, lines_with_band
from diffcore.run import Run
from emd_distill.app.options import CorrectionOptions
from emd_distill.app.teachers import DIGITS, Teacher, time_of
from emd_distill.correct import Corrected, Segment, correct, fit_student
from emd_distill.generator import OneStepGenerator
from emd_distill.noise_levels import noise_levels

_SEED = 9  # of the latents
_SHOWN, _FOLLOWED = 10, 6
_PARTS = ("z", "eps", "residual", "sample", "drift", "finite")  # of a segment, as tensors


def compute(
    run: Run, teacher: Teacher, generator: OneStepGenerator, chain: CorrectionOptions, count: int, seed: int
) -> dict[str, Any]:
    """Learns the score, runs the chains, keeps what the page shows, and returns the summary.

    Args:
        run: Run that keeps the score's weights, so that an interrupted command goes on with the chains.
        teacher: Teacher whose samples the corrected ones should be like.
        generator: Generator whose samples are corrected.
        chain: Options of the chain.
        count: Number of samples to draw.
        seed: Seed of all draws but the latents.
    """
    student = _student(run, teacher, generator, chain, seed)
    rows = torch.arange(count)
    z, given = philox_normal(_SEED, rows, teacher.shape), teacher.given(count)
    begun = _begun(run)
    bar = iter(track(range(chain.steps - (begun[-1].done if begun else 0)), "chain"))

    def keep(segment: Segment) -> None:
        parts = {name: getattr(segment, name) for name in _PARTS}
        run.save(f"segment-{segment.done:06d}", parts, done=segment.done)
        for _ in range(segment.done - (begun[-1].done if begun else 0)):
            next(bar, None)
        begun.append(segment)

    done = correct(
        generator,
        teacher.denoiser,
        student,
        z,
        given,
        t=time_of(teacher.denoiser, chain.level),
        steps=chain.steps,
        gamma_e=chain.gamma_e,
        gamma_z=chain.gamma_z,
        kappa=chain.kappa,
        seed=seed,
        begun=tuple(begun),
        on_segment=keep,
    )
    for _ in bar:
        pass
    _keep_pictures(run, teacher, done)
    return _told(run, teacher, done, z, given, chain)


def _begun(run: Run) -> list[Segment]:
    """Returns the segments of the chain that an interrupted command has kept, without any gap."""
    found: list[Segment] = []
    for path in sorted((run.folder / "parts").glob("segment-*.json")):
        if not run.has(path.stem):
            break
        part = run.load(path.stem)
        found.append(Segment(part.fields["done"], **part.tensors))
    return found


def _student(run: Run, teacher: Teacher, generator: OneStepGenerator, chain: CorrectionOptions, seed: int) -> Any:
    """Returns the denoiser of the generator's samples, learned once in a run."""
    if run.has("student"):
        student = copy.deepcopy(teacher.denoiser)
        student.backbone.load_state_dict(run.load("student").tensors)
        return student.eval()
    bar = iter(track(range(chain.student_steps), "score of the generator"))
    high = 20.0 if teacher.name == DIGITS else None
    student = fit_student(
        teacher.denoiser,
        generator,
        teacher.shape,
        noise_levels(teacher.denoiser.schedule, mean=-1.0, high=high),
        conditions=teacher.conditions,
        steps=chain.student_steps,
        batch_size=chain.student_batch,
        learning_rate=chain.student_learning_rate,
        seed=seed,
        on_step=lambda step: next(bar, None),
    )
    next(bar, None)
    run.save("student", dict(student.backbone.state_dict()))
    return student


def _keep_pictures(run: Run, teacher: Teacher, done: Corrected) -> None:
    with torch.no_grad():
        shown = [teacher.to_pictures(x[:_SHOWN].float()).cpu() for x in (done.before, done.moved, done.after)]
        looks = torch.linspace(0, len(done.path) - 1, min(7, len(done.path))).round().long().unique().tolist()
        followed = [teacher.to_pictures(done.path[look, :_FOLLOWED].float()).cpu() for look in looks]
    labels = ["before", "latents moved", "corrected"]
    run.save("correction", {"pictures": torch.stack(shown)}, labels=labels)
    run.save(
        "path", {"pictures": torch.stack(followed, 1)}, steps=[done.path_steps[look] for look in looks]
    )  # fmt: skip
    moves = (done.path[1:] - done.path[:-1]).flatten(2).square().mean(2).sqrt().mean(1).tolist()
    run.save("movement", {}, steps=list(done.path_steps[1:]), drift=done.drift.tolist(), moves=moves)


def _told(
    run: Run, teacher: Teacher, done: Corrected, z: Tensor, given: Any, chain: CorrectionOptions
) -> dict[str, Any]:
    lost = int((~done.finite).sum())
    away = float((done.after - done.before).flatten(1).square().mean(1).sqrt().mean())
    answer = (
        f"{chain.steps} steps at sigma / alpha = {chain.level:g} moved samples by {away:.2f} per number on average."
    )
    result: dict[str, Any] = {"samples": len(z), "moved": away, "lost_chains": lost}
    if teacher.name == DIGITS:
        rows, quality = _quality(done, given)
        caption = (
            f"{len(z)} samples against the 1797 real digits; sets of another size do not compare. The corrected "
            "samples were not drawn in one step: they took the chain's steps too."
        )
        run.keep_table("quality", rows, caption)
        result["quality"] = quality
        first, last = rows[0], rows[-1]
        answer += (
            f" Their Fréchet distance to real digits went from {first['distance']} to {last['distance']}, their recall "
            f"from {first['recall']} to {last['recall']}; no weight of the generator was changed."
        )
    if lost:
        answer += f" {lost} of {len(z)} chains did not stay finite and are shown as they were; take a smaller gamma_z."
    return {"answer": answer, **result}


def _quality(done: Corrected, given: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from emd_distill.digits import load_judge, measure

    judge = load_judge()
    measured = {
        name: measure(x, given["class_labels"], judge).to_json()
        for name, x in (("before", done.before), ("latents moved", done.moved), ("corrected", done.after))
    }
    rows = [{"digits": name, **{key: round(value, 3) for key, value in one.items()}} for name, one in measured.items()]
    return rows, measured


def add_sections(report: Report, run: Run) -> None:
    """Adds what a run of correct shows.

    Args:
        report: Page that is written.
        run: Run that the page is about.
    """
    if run.has("correction"):
        part = run.load("correction")
        pictures = part.tensors["pictures"]
        report.section("Before and after").images(
            pictures.flatten(0, 1),
            "One latent in each column. Before: what the generator draws. Latents moved: what it draws from the "
            "latents at the end of the chain. Corrected: that, and what the drifts moved the sample by, without the "
            "injected noise.",
            columns=pictures.shape[1],
            row_labels=part.fields["labels"],
        )
    if run.has("path"):
        part = run.load("path")
        pictures = part.tensors["pictures"]
        report.section("Along the chain").images(
            pictures.flatten(0, 1),
            "One chain in each row; above the columns, the number of Langevin steps.",
            columns=pictures.shape[1],
            column_labels=[str(step) for step in part.fields["steps"]],
        )
    if run.has("movement"):
        fields = run.load("movement").fields
        lines = [
            Series("drift at that step", fields["steps"], fields["drift"]),
            Series("movement since the last point", fields["steps"], fields["moves"]),
        ]
        report.plot(
            "movement",
            lines_with_band(lines, x_label="Langevin step", y_label="root mean square"),
            "The drift is the difference of the two predicted noises. It does not go to zero, since the student score "
            "stays that of the uncorrected samples; the movement shows whether the chain has settled.",
        )
    if run.has("correction"):
        report.kept_table("quality", "How near to the real digits")
